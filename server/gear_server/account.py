"""What became of a request for an answer, told once it has ended: for its line in the log and for its span.

Numbers, reasons and times; neither what was asked nor what was answered.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gear_engine.protocol import FinishReason

if TYPE_CHECKING:
    from starlette.types import Scope

    from gear_server.generate import Generation

GENERATION_KEY = "gear_generation"  # in the scope of a request that was submitted to the engine


@dataclass(frozen=True, slots=True)
class Account:
    """Times are `perf_counter`; of several sequences, those of the first to come so far."""

    response_id: str
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    finish_reasons: list[FinishReason]
    submitted_s: float
    scheduled_s: float | None  # its first step began
    first_token_s: float | None


def account_of(scope: "Scope") -> Account | None:
    """None for a request that never came to the engine."""
    generation: Generation | None = scope.get(GENERATION_KEY)
    if generation is None:
        return None
    usage = generation.usage()
    queued = [one.stream.queue_time_s for one in generation.choices if one.stream.queue_time_s is not None]
    first = [one.first_output_s for one in generation.choices if one.first_output_s is not None]
    return Account(
        response_id=generation.request_id,
        num_prompt_tokens=usage.num_prompt_tokens,
        num_completion_tokens=usage.num_completion_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        finish_reasons=[one.finish_reason for one in generation.choices if one.finish_reason is not None],
        submitted_s=generation.submitted_s,
        scheduled_s=generation.submitted_s + min(queued) if queued else None,
        first_token_s=min(first, default=None),
    )
