"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, translated to a chat request and back.

Generates nothing itself: `chat.py` submits, and errors name the fields that the caller sent.
"""

import asyncio
import uuid
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gear_server.anthropic_types import (
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from gear_server.api_document import AnthropicError, errors, generating
from gear_server.chat import start_chat
from gear_server.context import Context
from gear_server.encoding import encode_chat
from gear_server.errors import ApiError, renamed
from gear_server.generate import Delta, Generation, Usage
from gear_server.json_body import JsonRoute
from gear_server.openai_types import ChatRequest
from gear_server.respond import Answer, answer_whole, json_response, log_unknown, refuse_aborted, resolve_model
from gear_server.sse import EventStream, named_event

# What a chat request calls a field, and what the caller called it.
_NAMES = {"stop": "stop_sequences", "continue_final_message": "messages", "response_format": "output_config"}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def message_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["Anthropic"])

    @router.post("/v1/messages", summary="Answer a conversation", responses=generating(AnthropicError))
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        model = resolve_model(context, body.model)
        log_unknown(body)
        message_id = f"msg_{uuid.uuid4().hex}"
        with renamed(_NAMES):
            generation = await start_chat(context, request, to_chat(body), message_id)
        if body.stream:
            return EventStream(generation, MessageEvents(message_id, model, generation))
        return await answer_whole(
            request, generation, lambda answers, usage: whole_message(message_id, model, answers[0], usage)
        )

    @router.post(
        "/v1/messages/count_tokens",
        summary="Count a conversation's tokens",
        responses=errors(400, 401, 404, 413, 415, shape=AnthropicError),
    )
    async def count_tokens(body: CountTokensRequest) -> Response:
        resolve_model(context, body.model)
        log_unknown(body)
        with renamed(_NAMES):
            chat = ChatRequest.model_validate(_prompt_fields(body))
            token_ids = await asyncio.to_thread(encode_chat, context, chat, chat.messages)
        return json_response({"input_tokens": len(token_ids)})

    return router


def to_chat(body: MessagesRequest) -> ChatRequest:
    fields = _prompt_fields(body) | {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "seed": body.seed,
        "priority": body.priority,
        "cache_salt": body.cache_salt,
    }
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "answer", "schema": body.output_config.format.json_schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return ChatRequest.model_validate(fields)


def _prompt_fields(body: CountTokensRequest) -> dict[str, Any]:
    """The fields of a chat request that its prompt is made of."""
    messages = [{"role": "system", "content": _parts(body.system)}] if body.system else []
    for message in body.messages:
        messages += _chat_messages(message)
    fields: dict[str, Any] = {"messages": messages}
    if body.messages[-1].role == "assistant":  # "prefill": the answer goes on from it
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if body.tools:
        fields |= {"tools": [_chat_tool(tool) for tool in body.tools], **_chat_tool_choice(body.tool_choice)}
    if body.thinking is not None and body.thinking.type != "adaptive":
        fields["chat_template_kwargs"] = {"enable_thinking": body.thinking.type == "enabled"}
    return fields


def _chat_messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in a chat; thinking is left out, as models expect."""
    results = [block for block in message.content if isinstance(block, ToolResultBlock)]
    calls = [block for block in message.content if isinstance(block, ToolUseBlock)]
    texts = [block for block in message.content if isinstance(block, TextBlock)]
    messages: list[dict[str, Any]] = [
        {"role": "tool", "tool_call_id": result.tool_use_id, "content": _parts(result.content)} for result in results
    ]
    spoken: dict[str, Any] = {"role": message.role, "content": _parts(texts)}
    if calls:
        spoken["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": orjson.dumps(call.input).decode()},
            }
            for call in calls
        ]
    return [*messages, spoken] if texts or calls or not results else messages


def _parts(blocks: list[TextBlock]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": block.text} for block in blocks]


def _chat_tool(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: AnthropicToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    named = {"type": "function", "function": {"name": choice.name}}
    tool_choice = _TOOL_CHOICES.get(choice.type, named)
    return {"tool_choice": tool_choice, "parallel_tool_calls": not choice.disable_parallel_tool_use}


def whole_message(message_id: str, model: str, answer: Answer, usage: Usage) -> dict[str, Any]:
    refuse_aborted(answer.finish_reason)
    ending = _ending(answer.finish_reason, answer.stop_reason)
    content = [{"type": "text", "text": answer.text}]
    return _message(message_id, model) | {"content": content, "usage": _usage_fields(usage), **ending}


class MessageEvents:
    """message_start, then blocks that start, grow and stop, then message_delta and message_stop."""

    def __init__(self, message_id: str, model: str, generation: Generation) -> None:
        self._id, self._model = message_id, model
        self._generation = generation
        self._is_open = False  # the block of text
        self._ending: dict[str, Any] = {}

    def opening(self) -> bytes:
        """What is cached is known later; message_delta says it."""
        message = _message(self._id, self._model) | {"usage": _usage_fields(self._generation.usage())}
        return named_event({"type": "message_start", "message": message}) + named_event({"type": "ping"})

    def of(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._of_one, deltas))

    def ending(self) -> bytes:
        usage = _usage_fields(self._generation.usage())
        end = {"type": "message_delta", "delta": self._ending, "usage": usage}
        return named_event(end) + named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return named_event(error.anthropic_body)

    def _of_one(self, delta: Delta) -> bytes:
        refuse_aborted(delta.finish_reason)
        events = b""
        if not self._is_open and (delta.text or delta.finish_reason is not None):  # an empty answer has a block too
            self._is_open = True
            block = {"type": "text", "text": ""}
            events += named_event({"type": "content_block_start", "index": 0, "content_block": block})
        if delta.text:
            piece = {"type": "text_delta", "text": delta.text}
            events += named_event({"type": "content_block_delta", "index": 0, "delta": piece})
        if delta.finish_reason is not None:
            events += named_event({"type": "content_block_stop", "index": 0})
            self._ending = _ending(delta.finish_reason, delta.stop_reason)
        return events


def _message(message_id: str, model: str) -> dict[str, Any]:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _ending(finish_reason: str | None, stop_reason: str | int | None) -> dict[str, Any]:
    """A stop string that ended the answer is named; the model's own end is a turn's end."""
    if isinstance(stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
    return {"stop_reason": "max_tokens" if finish_reason == "length" else "end_turn", "stop_sequence": None}


def _usage_fields(usage: Usage) -> dict[str, int]:
    """Anthropic counts the prompt in three parts that add up; what is cached here costs nothing to write."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }
