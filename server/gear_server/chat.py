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

from gear_server.auth import cache_salt
from gear_server.context import Context
from gear_server.encoding import check_capacity, encode_chat
from gear_server.generate import Delta, Generation, Plan, Prompt, Usage
from gear_server.json_body import JsonRoute
from gear_server.openai_types import ChatRequest
from gear_server.respond import Answer, answer, log_unknown, new_id, resolve_model, usage_fields
from gear_server.sampling import sampling_params
from gear_server.sse import Chunk


def chat_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        arrived_s = time.perf_counter()
        context.traffic.refuse_if_draining()
        model = resolve_model(context, body.model)
        log_unknown(body)
        check_capacity(context, body.n)
        token_ids = await asyncio.to_thread(encode_chat, context, body, body.messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:
            max_tokens = max(1, context.engine.info.max_model_len - len(token_ids))
        plan = Plan(
            request_id=new_id("chatcmpl"),
            prompts=[Prompt(token_ids=token_ids, params=sampling_params(body, max_tokens))],
            prompt_param="messages",
            arrived_s=arrived_s,
            n=body.n,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            priority=body.priority,
            timeout_s=body.timeout,
            cache_salt=cache_salt(request, body.cache_salt, isolate_keys=context.settings.isolate_keys),
        )
        form = ChatFormat(plan.request_id, model, with_usage_field=body.stream_options is not None)
        return await answer(request, body, Generation(plan, context), form)

    return router


class ChatFormat:
    """OpenAI's chat.completion and chat.completion.chunk objects."""

    def __init__(self, request_id: str, model: str, *, with_usage_field: bool) -> None:
        self._id, self._model, self._created = request_id, model, int(time.time())
        self._chunk_head = self._head("chat.completion.chunk")
        self._tail: dict[str, Any] = {"usage": None} if with_usage_field else {}
        self._opened: set[int] = set()  # choices whose role has been sent

    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": one.index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": one.finish_reason,
                "stop_reason": one.stop_reason,
            }
            for one in answers
        ]
        return self._head("chat.completion") | {"choices": choices, "usage": usage_fields(usage)}

    def chunks(self, delta: Delta) -> Iterable[Chunk]:
        """The role comes first, then text, then the reason of the end, as OpenAI sends them."""
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            yield self._chunk(delta.index, {"role": "assistant", "content": ""}, None)
        if delta.text:
            yield self._chunk(delta.index, {"content": delta.text}, None)
        if delta.finish_reason is not None:
            yield self._chunk(delta.index, {}, delta.finish_reason, stop_reason=delta.stop_reason)

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._chunk_head, "choices": [], "usage": usage_fields(usage)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None, **more: Any) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **more}
        return {**self._chunk_head, "choices": [choice], **self._tail}
