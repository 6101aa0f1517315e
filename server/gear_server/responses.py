"""POST /v1/responses: OpenAI's Responses API without its memory, translated to a chat request and back.

Generates nothing itself: `chat.py` submits, and errors name the fields that the caller sent.
"""

import time
import uuid
from itertools import count
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gear_engine.protocol import FinishReason
from gear_server.api_document import generating
from gear_server.chat import start_chat
from gear_server.context import Context
from gear_server.errors import ApiError, renamed
from gear_server.generate import Delta, Generation, Usage
from gear_server.json_body import JsonRoute
from gear_server.openai_types import ChatRequest
from gear_server.respond import Answer, answer_whole, log_unknown, refuse_aborted, resolve_model
from gear_server.responses_types import (
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    Items,
    MessageItem,
    NamedFunction,
    ResponsesRequest,
    TextFormat,
    TextPart,
)
from gear_server.sse import EventStream, named_event

# What a chat request calls a field, and what the caller called it.
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}


def response_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/responses", summary="Answer a conversation", responses=generating())
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        model = resolve_model(context, body.model)
        log_unknown(body)
        form = ResponseFormat(body, model)
        with renamed(_NAMES):
            generation = await start_chat(context, request, to_chat(body), form.id)
        if body.stream:
            return EventStream(generation, ResponseEvents(form, generation))
        return await answer_whole(request, generation, form.whole)

    return router


def to_chat(body: ResponsesRequest) -> ChatRequest:
    messages = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    fields: dict[str, Any] = {
        "messages": messages + _chat_messages(body.input),
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
    }
    if body.tools:
        fields["tools"] = [_chat_tool(tool) for tool in body.tools]
        fields["tool_choice"] = _chat_tool_choice(body.tool_choice)
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _chat_format(body.text.format)
    return ChatRequest.model_validate(fields)


def _chat_messages(items: Items) -> list[dict[str, Any]]:
    """Calls that follow one another are one message of the assistant, with what it said before; reasoning is left
    out, as models expect."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item:
            case MessageItem():
                messages.append({"role": item.role, "content": _parts(item.content)})
            case FunctionCallItem():
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case FunctionOutputItem():
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _parts(item.output)})
    return messages


def _parts(parts: list[TextPart]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": part.text} for part in parts]


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_unset=True)}


def _chat_tool_choice(choice: str | NamedFunction) -> str | dict[str, Any]:
    return choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}


def _chat_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.json_schema}}


class ResponseFormat:
    """OpenAI's response object, as far as it is known when it is asked for."""

    def __init__(self, body: ResponsesRequest, model: str) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self.message_id = f"msg_{uuid.uuid4().hex}"
        self._asked = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice if isinstance(body.tool_choice, str) else body.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools],
            "top_p": body.top_p,
            "truncation": body.truncation,
            "user": body.user,
        }
        if body.text is not None:
            self._asked["text"] |= body.text.model_dump(exclude_unset=True, by_alias=True)

    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        refuse_aborted(answers[0].finish_reason)
        return self.ended(answers[0].text, answers[0].finish_reason, usage)

    def begun(self) -> dict[str, Any]:
        return self._response("in_progress")

    def ended(self, text: str, finish_reason: FinishReason | None, usage: Usage) -> dict[str, Any]:
        status = status_of(finish_reason)
        more: dict[str, Any] = {"output": [self.message(status, text)], "usage": _usage_fields(usage)}
        if status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._response(status, **more)

    def failed(self, error: ApiError) -> dict[str, Any]:
        return self._response("failed", error={"code": "server_error", "message": error.message})

    def message(self, status: str, text: str | None) -> dict[str, Any]:
        """An item of the output; without a text it has no content yet."""
        content = [] if text is None else [output_text(text)]
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._asked | {"status": status} | known | more


class ResponseEvents:
    """response.created and in_progress, then an item that is added, grows and is done, then the response again."""

    def __init__(self, form: ResponseFormat, generation: Generation) -> None:
        self._form = form
        self._generation = generation
        self._numbers = count()
        self._is_open = False  # the item
        self._pieces: list[str] = []
        self._finish_reason: FinishReason | None = None

    def opening(self) -> bytes:
        begun = self._form.begun()
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def of(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._of_one, deltas))

    def ending(self) -> bytes:
        response = self._form.ended("".join(self._pieces), self._finish_reason, self._generation.usage())
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        return self._event("response.failed", response=self._form.failed(error))

    def _of_one(self, delta: Delta) -> bytes:
        refuse_aborted(delta.finish_reason)
        events = b""
        if not self._is_open and (delta.text or delta.finish_reason is not None):  # an empty answer has an item too
            self._is_open = True
            item = self._form.message("in_progress", None)
            events += self._event("response.output_item.added", output_index=0, item=item)
            events += self._part_event("response.content_part.added", part=output_text(""))
        if delta.text:
            self._pieces.append(delta.text)
            events += self._part_event("response.output_text.delta", delta=delta.text, logprobs=[])
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            text = "".join(self._pieces)
            events += self._part_event("response.output_text.done", text=text, logprobs=[])
            events += self._part_event("response.content_part.done", part=output_text(text))
            item = self._form.message(status_of(delta.finish_reason), text)
            events += self._event("response.output_item.done", output_index=0, item=item)
        return events

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._form.message_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return named_event({"type": kind, "sequence_number": next(self._numbers), **fields})


def output_text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def status_of(finish_reason: FinishReason | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }
