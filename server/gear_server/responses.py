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

from gear_server.account import GENERATION_KEY
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
from gear_server.sse import Chunk, EventStream, named_event
from gear_server.tool_calls import ToolCall

# What a chat request calls a field, and what the caller called it.
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def response_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/responses", summary="Answer a conversation", responses=generating())
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        model = resolve_model(context, body.model)
        log_unknown(body)
        form = ResponseFormat(body, model)
        with renamed(_NAMES):
            generation = await start_chat(context, request, to_chat(body), form.id)
        request.scope[GENERATION_KEY] = generation
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
    if body.tools or body.tool_choice not in ("auto", "none"):
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
        output = OutputItems()
        output.take(answers[0])
        return self.ended(output, usage)

    def begun(self) -> dict[str, Any]:
        return self._response("in_progress")

    def ended(self, output: "OutputItems", usage: Usage) -> dict[str, Any]:
        more: dict[str, Any] = {"output": output.items, "usage": _usage_fields(usage)}
        if output.status == "incomplete":
            more["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._response(output.status, **more)

    def failed(self, error: ApiError) -> dict[str, Any]:
        return self._response("failed", error={"code": "server_error", "message": error.message})

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        known: dict[str, Any] = {"error": None, "incomplete_details": None, "output": [], "usage": None}
        return self._asked | {"status": status} | known | more


class OutputItems:
    """What an answer consists of, as items: reasoning, a message, calls of functions; each grows until another
    begins."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.status = "in_progress"
        self._open = ""  # the type of the last item while it may grow

    def take(self, gained: Answer | Delta) -> list[Chunk]:
        """Add to the items; the events that tell of it."""
        refuse_aborted(gained.finish_reason)
        events: list[Chunk] = []
        if gained.reasoning:
            events += self._grow("reasoning", gained.reasoning)
        if gained.text:
            events += self._grow("message", gained.text)
        for call in gained.tool_calls:
            events += self._add_call(call)
        if gained.finish_reason is not None:
            if not self.items:  # an empty answer is an empty message
                events += self._begin_text("message")
            self.status = "incomplete" if gained.finish_reason == "length" else "completed"
            events += self._end(self.status)
        return events

    def _grow(self, kind: str, text: str) -> list[Chunk]:
        begun = [] if self._open == kind else self._begin_text(kind)
        part = self.items[-1]["content"][0]
        part["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [*begun, self._event(f"response.{part['type']}.delta", content_index=0, delta=text, **more)]

    def _begin_text(self, kind: str) -> list[Chunk]:
        item = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", "content": []}
        more: dict[str, Any] = {"role": "assistant"}
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if kind == "reasoning":
            more, part = {"summary": []}, {"type": "reasoning_text", "text": ""}
        begun = self._begin(item | more)
        self.items[-1]["content"] = [part]
        return [*begun, self._event("response.content_part.added", content_index=0, part=dict(part))]

    def _add_call(self, call: ToolCall) -> list[Chunk]:
        """Id and name come with a call's first piece."""
        events: list[Chunk] = []
        if call.id:
            item_id = f"{_PREFIXES['function_call']}_{uuid.uuid4().hex}"
            item = {"id": item_id, "type": "function_call", "status": "in_progress", "arguments": ""}
            events += self._begin(item | {"call_id": call.id, "name": call.name})
        if call.arguments:
            self.items[-1]["arguments"] += call.arguments
            events.append(self._event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _begin(self, item: dict[str, Any]) -> list[Chunk]:
        ended = self._end("completed") if self._open else []
        self._open = item["type"]
        self.items.append(item)
        added = {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)}
        return [*ended, added]

    def _end(self, status: str) -> list[Chunk]:
        """The last item is whole now."""
        item = self.items[-1]
        item["status"] = status
        self._open = ""
        if item["type"] == "function_call":
            told = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._event("response.function_call_arguments.done", **told)]
        else:
            part = item["content"][0]
            more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
            text_done = self._event(f"response.{part['type']}.done", content_index=0, text=part["text"], **more)
            events = [text_done, self._event("response.content_part.done", content_index=0, part=part)]
        done = {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}
        return [*events, done]

    def _event(self, kind: str, **fields: Any) -> Chunk:
        """About the last item."""
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}


class ResponseEvents:
    """response.created and in_progress, then items that are added, grow and are done, then the response again."""

    def __init__(self, form: ResponseFormat, generation: Generation) -> None:
        self._form = form
        self._generation = generation
        self._output = OutputItems()
        self._numbers = count()

    def opening(self) -> bytes:
        begun = self._form.begun()
        return b"".join(
            self._numbered({"type": kind, "response": begun}) for kind in ("response.created", "response.in_progress")
        )

    def of(self, deltas: list[Delta]) -> bytes:
        return b"".join(self._numbered(event) for delta in deltas for event in self._output.take(delta))

    def ending(self) -> bytes:
        response = self._form.ended(self._output, self._generation.usage())
        return self._numbered({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: ApiError) -> bytes:
        return self._numbered({"type": "response.failed", "response": self._form.failed(error)})

    def _numbered(self, event: Chunk) -> bytes:
        return named_event(event | {"sequence_number": next(self._numbers)})


def _usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }
