"""The way that generating routes share: check, encode, submit, and answer whole or as a stream.

What the answer looks like is the route's business (`AnswerFormat`).
"""

import logging
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from gear_engine.protocol import TokenLogprobs
from gear_server.account import GENERATION_KEY
from gear_server.context import Context
from gear_server.disconnect import unless_disconnected
from gear_server.errors import ApiError, GenerationFailed
from gear_server.generate import Delta, EndReason, Generation, Usage
from gear_server.openai_types import SamplingBody
from gear_server.sse import Chunk, ChunkEvents, EventStream
from gear_server.tool_calls import ToolCall, merge

logger = logging.getLogger("gear_server")


@dataclass(slots=True)
class Answer:
    """A whole choice."""

    index: int
    pieces: list[str] = field(default_factory=list)
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.reasoning += delta.reasoning
        merge(self.tool_calls, delta.tool_calls)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class AnswerFormat(Protocol):
    def whole(self, answers: list[Answer], usage: Usage) -> dict[str, Any]: ...

    def chunks(self, delta: Delta) -> Iterable[Chunk]: ...

    def usage_chunk(self, usage: Usage) -> Chunk: ...


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def resolve_model(context: Context, model: str | None) -> str:
    """The name to answer with. Raises 404 for a model that is not served."""
    names = context.model_names
    if model is None:
        return names[0]
    if model not in names:
        message = f"the model {model[:100]!r} is not served here; served: {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return model


def log_unknown(body: BaseModel) -> None:
    """Other servers' extra fields do no harm; whoever wonders about one finds it in the debug log."""
    if body.model_extra:
        logger.debug("ignored fields: %s", ", ".join(sorted(body.model_extra)))


async def answer(request: Request, body: SamplingBody, generation: Generation, form: AnswerFormat) -> Response:
    """The response to a submitted request; whichever way it ends, the generation is closed."""
    request.scope[GENERATION_KEY] = generation
    if not body.stream:
        return await answer_whole(request, generation, form.whole)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    last_chunk = (lambda: form.usage_chunk(generation.usage())) if include_usage else None
    return EventStream(generation, ChunkEvents(form.chunks, last_chunk))


async def answer_whole(
    request: Request, generation: Generation, to_content: Callable[[list[Answer], Usage], dict[str, Any]]
) -> Response:
    try:
        answers = await unless_disconnected(request.receive, _collect(generation))
        return json_response(to_content(answers, generation.usage()))
    finally:
        generation.close()


def refuse_aborted(finish_reason: EndReason | None) -> None:
    """For APIs that have no word for an answer cut short by the server: it failed, and may be asked for again."""
    if finish_reason == "abort":
        raise GenerationFailed(503, "the server is shutting down and cut this answer short", code="draining")


def json_response(content: dict[str, Any]) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def usage_fields(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


async def _collect(generation: Generation) -> list[Answer]:
    answers = [Answer(choice.index) for choice in generation.choices]
    while (deltas := await generation.next_deltas()) is not None:
        for delta in deltas:
            answers[delta.index].add(delta)
    return answers
