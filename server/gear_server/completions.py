"""POST /v1/completions: text or token ids in, text that goes on from there out.

Several prompts and `n` answers to each are choices of one response, numbered as OpenAI does.
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
from gear_server.encoding import check_capacity, encode_text
from gear_server.generate import Delta, Generation, Plan, Prompt, Usage
from gear_server.json_body import JsonRoute
from gear_server.openai_types import CompletionRequest
from gear_server.respond import Answer, answer, log_unknown, new_id, resolve_model, usage_fields
from gear_server.sampling import sampling_params
from gear_server.sse import Chunk

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/completions", summary="Continue a text")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        arrived_s = time.perf_counter()
        context.traffic.refuse_if_draining()
        model = resolve_model(context, body.model)
        log_unknown(body)
        check_capacity(context, len(body.prompt) * body.n)
        prompts = await asyncio.to_thread(_encode, context, body)
        plan = Plan(
            request_id=new_id("cmpl"),
            prompts=prompts,
            prompt_param="prompt",
            arrived_s=arrived_s,
            n=body.n,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            priority=body.priority,
            timeout_s=body.timeout,
            cache_salt=cache_salt(request, body.cache_salt, isolate_keys=context.settings.isolate_keys),
        )
        form = CompletionFormat(plan.request_id, model, with_usage_field=body.stream_options is not None)
        return await answer(request, body, Generation(plan, context), form)

    return router


def _encode(context: Context, body: CompletionRequest) -> list[Prompt]:
    """Runs in a thread."""
    prompts: list[Prompt] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            token_ids = encode_text(context, prompt, "prompt", add_special_tokens=body.add_special_tokens)
        else:
            token_ids = prompt
        max_tokens = body.max_tokens
        if max_tokens is None:  # the default never makes a prompt too long that fits
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, context.engine.info.max_model_len - len(token_ids)))
        echo = _echo(context, prompt) if body.echo else ""
        prompts.append(Prompt(token_ids=token_ids, params=sampling_params(body, max_tokens), echo=echo))
    return prompts


def _echo(context: Context, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else context.tokenizer.text_of(prompt)


class CompletionFormat:
    """OpenAI's text_completion objects."""

    def __init__(self, request_id: str, model: str, *, with_usage_field: bool) -> None:
        self._head = {"id": request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tail: dict[str, Any] = {"usage": None} if with_usage_field else {}

    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        choices = [
            _choice(one.index, one.text, finish_reason=one.finish_reason, stop_reason=one.stop_reason)
            for one in answers
        ]
        return self._head | {"choices": choices, "usage": usage_fields(usage)}

    def chunks(self, delta: Delta) -> Iterable[Chunk]:
        if not delta.text and delta.finish_reason is None:
            return []
        choice = _choice(delta.index, delta.text, finish_reason=delta.finish_reason, stop_reason=delta.stop_reason)
        return [{**self._head, "choices": [choice], **self._tail}]

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._head, "choices": [], "usage": usage_fields(usage)}


def _choice(index: int, text: str, **ending: Any) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, **ending}
