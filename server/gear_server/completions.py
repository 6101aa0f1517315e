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

from gear_server.api_document import generating
from gear_server.auth import cache_salt
from gear_server.context import Context
from gear_server.encoding import check_capacity, encode_text, truncated
from gear_server.generate import Delta, Generation, Plan, Prompt, Usage
from gear_server.json_body import JsonRoute
from gear_server.logprobs import CompletionLogprobs, TokenNames, cut, joined, prompt_logprobs
from gear_server.openai_types import CompletionRequest
from gear_server.respond import Answer, answer, log_unknown, new_id, resolve_model, usage_fields
from gear_server.sampling import sampling_params
from gear_server.sse import Chunk
from gear_server.structured import grammar_of, wanted_shape

DEFAULT_MAX_TOKENS = 16  # OpenAI's


def completion_routes(context: Context) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, tags=["OpenAI"])

    @router.post("/v1/completions", summary="Continue a text", responses=generating())
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        arrived_s = time.perf_counter()
        context.traffic.refuse_if_draining()
        model = resolve_model(context, body.model)
        log_unknown(body)
        check_capacity(context, len(body.prompt) * body.num_drawn)
        prompts = await asyncio.to_thread(_encode, context, body)
        plan = Plan(
            request_id=new_id("cmpl"),
            prompts=prompts,
            prompt_param="prompt",
            arrived_s=arrived_s,
            n=body.num_drawn,
            stop=body.stop,
            include_stop=body.include_stop_str_in_output,
            skip_special_tokens=body.skip_special_tokens,
            priority=body.priority,
            timeout_s=body.timeout,
            cache_salt=cache_salt(request, body.cache_salt, isolate_keys=context.settings.isolate_keys),
        )
        return await answer(request, body, Generation(plan, context), CompletionFormat(plan, model, body, context))

    return router


def _encode(context: Context, body: CompletionRequest) -> list[Prompt]:
    """Runs in a thread."""
    shape = wanted_shape(body)
    grammar = "" if shape is None else grammar_of(shape, special_id=context.tokenizer.special_id)
    prompts: list[Prompt] = []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            may_be_cut = body.truncate_prompt_tokens is not None
            token_ids = encode_text(
                context, prompt, "prompt", add_special_tokens=body.add_special_tokens, may_be_cut=may_be_cut
            )
        else:
            token_ids = prompt
        kept = truncated(context, token_ids, body, DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens)
        max_tokens = body.max_tokens
        if max_tokens is None:  # the default never makes a prompt too long that fits
            max_tokens = max(1, min(DEFAULT_MAX_TOKENS, context.engine.info.max_model_len - len(kept)))
        whole = prompt if len(kept) == len(token_ids) else kept
        prompts.append(
            Prompt(
                token_ids=kept,
                params=sampling_params(
                    body,
                    max(1, max_tokens),
                    logprobs=_num_logprobs(body),
                    prompt_logprobs=_num_prompt_logprobs(body),
                    grammar=grammar,
                ),
                echo=_text_of(context, whole, body) if body.echo else "",
                echo_only=max_tokens == 0,
            )
        )
    return prompts


def _num_logprobs(body: CompletionRequest) -> int | None:
    """Also wanted without being asked for where the likeliest answers are to be found."""
    return 0 if body.logprobs is None and body.num_drawn > body.n else body.logprobs


def _num_prompt_logprobs(body: CompletionRequest) -> int | None:
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    return max((count for count in asked if count is not None), default=None)


def _text_of(context: Context, prompt: str | list[int], body: CompletionRequest) -> str:
    if isinstance(prompt, str):
        return prompt
    return context.tokenizer.text_of(prompt, skip_special_tokens=body.skip_special_tokens)


class CompletionFormat:
    """OpenAI's text_completion objects, with what vLLM adds to them."""

    def __init__(self, plan: Plan, model: str, body: CompletionRequest, context: Context) -> None:
        self._head = {"id": plan.request_id, "object": "text_completion", "created": int(time.time()), "model": model}
        self._tail: dict[str, Any] = {"usage": None} if body.stream_options is not None else {}
        self._body = body
        self._plan = plan
        self._names = TokenNames(context.tokenizer, as_ids=body.return_tokens_as_token_ids)
        self._logprobs: dict[int, CompletionLogprobs] = {}  # of the choices that have begun

    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]:
        chosen = _likeliest(answers, self._body)
        choices = [{**self._choice(one), "index": index} for index, one in enumerate(chosen)]
        return self._head | {"choices": choices, "usage": usage_fields(usage)}

    def chunks(self, delta: Delta) -> Iterable[Chunk]:
        wants_tokens = self._body.return_token_ids or self._body.logprobs is not None
        if not delta.text and delta.finish_reason is None and not (wants_tokens and delta.token_ids):
            return []
        return [{**self._head, "choices": [self._choice(delta)], **self._tail}]

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._head, "choices": [], "usage": usage_fields(usage)}

    def _choice(self, one: Answer | Delta) -> dict[str, Any]:
        begins = one.index not in self._logprobs
        choice: dict[str, Any] = {
            "index": one.index,
            "text": one.text,
            "logprobs": self._logprobs_of(one),
            "finish_reason": one.finish_reason,
            "stop_reason": one.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = one.token_ids
            if begins:
                choice["prompt_token_ids"] = self._prompt_of(one)
        if self._body.prompt_logprobs is not None:
            told = cut(one.prompt_logprobs or [], self._body.prompt_logprobs)
            choice["prompt_logprobs"] = prompt_logprobs(self._names, self._prompt_of(one), told)
        return choice

    def _logprobs_of(self, one: Answer | Delta) -> dict[str, Any] | None:
        begins = one.index not in self._logprobs
        lists = self._logprobs.setdefault(one.index, CompletionLogprobs(self._names))
        if self._body.logprobs is None:
            return None
        pieces = []
        if begins and self._body.echo and one.prompt_logprobs is not None:
            told = cut(one.prompt_logprobs, self._body.logprobs)
            pieces.append(lists.prompt(self._prompt_of(one), told))
        pieces.append(lists.piece(one.token_ids, one.logprobs or []))
        return joined(pieces)

    def _prompt_of(self, one: Answer | Delta) -> list[int]:
        return self._plan.prompts[one.index // self._plan.n].token_ids


def _likeliest(answers: list[Answer], body: CompletionRequest) -> list[Answer]:
    """Of each prompt's answers the n whose tokens are the likeliest on average, best first; all, if all are sent."""
    if body.num_drawn == body.n:
        return answers
    chosen: list[Answer] = []
    for start in range(0, len(answers), body.num_drawn):
        drawn = answers[start : start + body.num_drawn]
        chosen += sorted(drawn, key=_mean_logprob, reverse=True)[: body.n]
    return chosen


def _mean_logprob(one: Answer) -> float:
    told = one.logprobs or []
    return sum(lp.logprob for lp in told) / max(1, len(told))
