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

from gear_server.account import GENERATION_KEY
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
from gear_server.sse import Chunk, EventStream, named_event
from gear_server.tool_calls import ToolCall

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
        request.scope[GENERATION_KEY] = generation
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


class ContentBlocks:
    """What an answer consists of, as blocks: thinking, text, calls of tools; each grows until another begins."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._open = ""  # the kind of the last block while it may grow
        self._arguments = ""  # of the call that it is, as text

    def take(self, gained: Answer | Delta) -> list[Chunk]:
        """Add to the blocks; the events that tell of it."""
        refuse_aborted(gained.finish_reason)
        events: list[Chunk] = []
        if gained.reasoning:
            events += self._grow("thinking", {"thinking": "", "signature": ""}, gained.reasoning)
        if gained.text:
            events += self._grow("text", {"text": ""}, gained.text)
        for call in gained.tool_calls:
            events += self._add_call(call)
        if gained.finish_reason is not None:
            if not self.blocks:  # an empty answer is an empty text
                events += self._begin("text", {"text": ""})
            events += self._end()
        return events

    def _grow(self, kind: str, empty: dict[str, Any], text: str) -> list[Chunk]:
        begun = [] if self._open == kind else self._begin(kind, empty)
        self.blocks[-1][kind] += text
        return [*begun, self._delta({"type": f"{kind}_delta", kind: text})]

    def _add_call(self, call: ToolCall) -> list[Chunk]:
        """Id and name come with a call's first piece."""
        begun = self._begin("tool_use", {"id": call.id, "name": call.name, "input": {}}) if call.id else []
        self._arguments += call.arguments
        grown = [self._delta({"type": "input_json_delta", "partial_json": call.arguments})] if call.arguments else []
        return begun + grown

    def _begin(self, kind: str, fields: dict[str, Any]) -> list[Chunk]:
        ended = self._end() if self._open else []
        self._open, self._arguments = kind, ""
        self.blocks.append({"type": kind, **fields})
        start = {
            "type": "content_block_start",
            "index": len(self.blocks) - 1,
            "content_block": {"type": kind, **fields},
        }
        return [*ended, start]

    def _end(self) -> list[Chunk]:
        stop = {"type": "content_block_stop", "index": len(self.blocks) - 1}
        if self._open == "tool_use":
            try:
                self.blocks[-1]["input"] = orjson.loads(self._arguments or "{}")
            except orjson.JSONDecodeError:  # cut by max_tokens, as the stop reason says: not a call that can be made
                self.blocks.pop()
        self._open = ""
        return [stop]

    def _delta(self, delta: dict[str, Any]) -> Chunk:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def whole_message(message_id: str, model: str, answer: Answer, usage: Usage) -> dict[str, Any]:
    content = ContentBlocks()
    content.take(answer)
    ending = _ending(answer)
    return _message(message_id, model) | {"content": content.blocks, "usage": _usage_fields(usage), **ending}


class MessageEvents:
    """message_start, then blocks that start, grow and stop, then message_delta and message_stop."""

    def __init__(self, message_id: str, model: str, generation: Generation) -> None:
        self._id, self._model = message_id, model
        self._generation = generation
        self._content = ContentBlocks()
        self._ending: dict[str, Any] = {}

    def opening(self) -> bytes:
        """What is cached is known later; message_delta says it."""
        message = _message(self._id, self._model) | {"usage": _usage_fields(self._generation.usage())}
        return named_event({"type": "message_start", "message": message}) + named_event({"type": "ping"})

    def of(self, deltas: list[Delta]) -> bytes:
        if deltas and deltas[-1].finish_reason is not None:
            self._ending = _ending(deltas[-1])
        return b"".join(named_event(event) for delta in deltas for event in self._content.take(delta))

    def ending(self) -> bytes:
        usage = _usage_fields(self._generation.usage())
        end = {"type": "message_delta", "delta": self._ending, "usage": usage}
        return named_event(end) + named_event({"type": "message_stop"})

    def failure(self, error: ApiError) -> bytes:
        return named_event(error.anthropic_body)


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


_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def _ending(ended: Answer | Delta) -> dict[str, Any]:
    """A stop string that ended the answer is named; the model's own end is a turn's end."""
    if isinstance(ended.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": ended.stop_reason}
    return {"stop_reason": _STOP_REASONS.get(ended.finish_reason or "", "end_turn"), "stop_sequence": None}


def _usage_fields(usage: Usage) -> dict[str, int]:
    """Anthropic counts the prompt in three parts that add up; what is cached here costs nothing to write."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
    }
