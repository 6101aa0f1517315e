"""POST /v1/chat/completions: a conversation in, the assistant's next message out.

The model's own chat template makes the prompt; without `max_tokens` an answer may fill what is left of the context.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from gear_server.answer_reader import CLOSE, OPEN, AnswerReader, ReasoningReader
from gear_server.api_document import generating
from gear_server.auth import cache_salt
from gear_server.context import Context
from gear_server.encoding import check_capacity, encode_rendered, render_chat, truncated
from gear_server.generate import Delta, Generation, Plan, Prompt, Usage
from gear_server.json_body import JsonRoute
from gear_server.logprobs import TokenNames, chat_logprobs, prompt_logprobs
from gear_server.message_types import NamedTool
from gear_server.openai_types import ChatRequest
from gear_server.respond import Answer, answer, log_unknown, new_id, resolve_model, usage_fields
from gear_server.sampling import sampling_params
from gear_server.sse import Chunk
from gear_server.structured import calls_shape, either, grammar_of, wanted_shape
from gear_server.tool_calls import ToolCall, ToolCallReader, tool_style


def chat_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/chat/completions", summary="Answer a conversation", responses=generating())
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        model = resolve_model(context, body.model)
        log_unknown(body)
        generation = await start_chat(context, request, body, new_id("chatcmpl"))
        return await answer(request, body, generation, ChatFormat(generation.plan, model, body, context))

    return router


async def start_chat(context: Context, request: Request, body: ChatRequest, request_id: str) -> Generation:
    """Submit a conversation: every API that has messages comes through here, translated to chat's."""
    arrived_s = time.perf_counter()
    context.traffic.refuse_if_draining()
    check_capacity(context, body.n)
    salt = cache_salt(request, body.cache_salt, isolate_keys=context.settings.isolate_keys)
    plan = await asyncio.to_thread(_plan, context, body, request_id, arrived_s, salt)
    return Generation(plan, context)


def _plan(context: Context, body: ChatRequest, request_id: str, arrived_s: float, salt: str) -> Plan:
    """Runs in a thread: templates, tokenizers and grammars take their time."""
    text = render_chat(context, body, body.messages)
    max_tokens = body.max_completion_tokens or body.max_tokens
    token_ids = truncated(context, encode_rendered(context, body, text), body, max_tokens)
    if max_tokens is None:
        max_tokens = max(1, context.engine.info.max_model_len - len(token_ids))
    params = sampling_params(
        body,
        max_tokens,
        logprobs=body.top_logprobs if body.logprobs else None,
        prompt_logprobs=body.prompt_logprobs,
        grammar=_grammar(context, body, text),
    )
    style = tool_style(_template_source(context))
    special_id = context.tokenizer.special_id
    markers = [*(style.markers if body.offered_tools else ()), *((OPEN, CLOSE) if _thinks(context, text) else ())]
    return Plan(
        request_id=request_id,
        prompts=[Prompt(token_ids=token_ids, params=params)],
        prompt_param="messages",
        arrived_s=arrived_s,
        n=body.n,
        stop=body.stop,
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        keep_special_ids=frozenset(i for marker in markers if (i := special_id(marker)) is not None),
        make_reader=lambda: _reader(context, body, text),
        priority=body.priority,
        timeout_s=body.timeout,
        cache_salt=salt,
    )


def _reader(context: Context, body: ChatRequest, prompt: str) -> AnswerReader:
    reasoning = ReasoningReader(is_open=_is_thinking(prompt)) if _thinks(context, prompt) else None
    if not body.offered_tools:
        return AnswerReader(reasoning, None)
    several = body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool)
    names = {tool.function.name for tool in body.tools}
    style = tool_style(_template_source(context))
    return AnswerReader(reasoning, ToolCallReader(style, names, None if several else 1))


def _grammar(context: Context, body: ChatRequest, prompt: str) -> str:
    """Of an answer that must look like something or call a tool; "" for any other. Raises `RequestError`."""
    shape, forced = wanted_shape(body), body.forced_tools
    if shape is None and not forced:
        return ""
    source, special_id = _template_source(context), context.tokenizer.special_id
    tools = forced or body.offered_tools
    if tools:
        several = body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool)
        named_form = "[ARGS]" in source
        calls = calls_shape(tool_style(source), tools, several=several, named_form=named_form, special_id=special_id)
        shape = calls if forced or shape is None else either(shape, calls)
    assert shape is not None
    thinks = _thinks(context, prompt)
    return grammar_of(shape, thinks=thinks, is_thinking=thinks and _is_thinking(prompt), special_id=special_id)


def _template_source(context: Context) -> str:
    return "" if context.template is None else context.template.source


def _thinks(context: Context, prompt: str) -> bool:
    """Whether the model may begin with reasoning: its template knows it, and the prompt has not closed it already."""
    return CLOSE in _template_source(context) and not prompt.rstrip().endswith(CLOSE)


def _is_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith(OPEN)


class ChatFormat:
    """OpenAI's chat.completion and chat.completion.chunk objects, with what vLLM adds to them."""

    def __init__(self, plan: Plan, model: str, body: ChatRequest, context: Context) -> None:
        self._id, self._model, self._created = plan.request_id, model, int(time.time())
        self._body = body
        self._prompt_token_ids = plan.prompts[0].token_ids
        self._names = TokenNames(context.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._chunk_head = self._head("chat.completion.chunk")
        self._tail: dict[str, Any] = {"usage": None} if body.stream_options is not None else {}
        self._opened: set[int] = set()  # choices whose role has been sent

    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": one.index,
                "message": _message(one),
                **self._told(one),
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in answers
        ]
        whole = self._head("chat.completion") | {"choices": choices, "usage": usage_fields(usage)}
        if self._body.return_token_ids:
            whole["prompt_token_ids"] = self._prompt_token_ids
        if self._body.prompt_logprobs is not None:
            told = answers[0].prompt_logprobs or []
            whole["prompt_logprobs"] = prompt_logprobs(self._names, self._prompt_token_ids, told)
        return whole

    def chunks(self, delta: Delta) -> Iterable[Chunk]:
        """The role comes first, then what the answer is made of, then the reason of the end, as OpenAI sends them."""
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            first = {"prompt_token_ids": self._prompt_token_ids} if self._body.return_token_ids else {}
            yield {**self._chunk(delta.index, {"role": "assistant", "content": ""}, None, {"logprobs": None}), **first}
        told = self._told(delta)
        pieces = list(_pieces(delta))
        wants_tokens = self._body.logprobs or self._body.return_token_ids
        if not pieces and wants_tokens and delta.token_ids:
            pieces = [{"content": ""}]  # tokens whose text is held back, or which have none
        for piece in pieces:
            yield self._chunk(delta.index, piece, None, told)
            told = {"logprobs": None}  # once for each token
        if delta.finish_reason is not None:
            end = {"stop_reason": delta.stop_reason, "logprobs": None}
            yield self._chunk(delta.index, {}, delta.finish_reason, end)

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._chunk_head, "choices": [], "usage": usage_fields(usage)}

    def _told(self, one: Answer | Delta) -> dict[str, Any]:
        """What is said of the tokens."""
        logprobs = chat_logprobs(self._names, one.token_ids, one.logprobs or []) if self._body.logprobs else None
        ids = {"token_ids": one.token_ids} if self._body.return_token_ids else {}
        return {"logprobs": logprobs, **ids}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None, more: dict[str, Any]) -> Chunk:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, **more}
        return {**self._chunk_head, "choices": [choice], **self._tail}


def _message(one: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": one.text, "refusal": None}
    if one.reasoning:
        message["reasoning_content"] = one.reasoning
    if one.tool_calls:
        message["content"] = one.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in one.tool_calls
        ]
    return message


def _pieces(delta: Delta) -> Iterable[dict[str, Any]]:
    if delta.reasoning:
        yield {"reasoning_content": delta.reasoning}
    if delta.text:
        yield {"content": delta.text}
    for call in delta.tool_calls:
        yield {"tool_calls": [_call_piece(call)]}


def _call_piece(call: ToolCall) -> dict[str, Any]:
    """Id and name come once, with the call's first piece."""
    if not call.id:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
