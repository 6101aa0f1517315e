"""The outcome of a run: its fields are the keys of the JSON file.

Only requests that succeeded enter latencies and throughput; failures are counted by kind.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from gear_loadtest.distribution import Distribution, distribution
from gear_loadtest.plan import LoadPlan
from gear_loadtest.record import RequestRecord, RunLog
from gear_loadtest.target import Target


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """A chunk is usually a token; where it is not, gaps between chunks are not gaps between tokens."""

    total: int
    num_requests_differing: int  # whose chunks are not as many as the tokens in usage
    num_requests_without_usage: int  # whose tokens are counted by chunks


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    url: str
    model: str
    date: str  # ISO 8601, when the first request was sent
    command: LoadPlan
    interrupted: bool
    num_requests: int  # that ended, well or not
    num_ok: int
    num_errors: int
    num_cancelled: int  # still running when interrupted
    errors: dict[str, int]  # by kind
    error_examples: dict[str, str]  # the first message of each kind
    duration_s: float
    request_throughput: float  # per second, as the next two
    output_token_throughput: float
    total_token_throughput: float | None  # None: the server sends no usage, so prompts cannot be counted
    input_tokens_mean: float | None
    output_tokens_mean: float | None
    chunks: ChunkCounts
    ttft_s: Distribution | None
    itl_s: Distribution | None
    tpot_s: Distribution | None
    e2e_s: Distribution | None
    service_ttft_s: Distribution | None
    service_e2e_s: Distribution | None


def make_report(
    log: RunLog, *, plan: LoadPlan, target: Target, model: str, date: datetime, duration_s: float, interrupted: bool
) -> Report:
    succeeded = [record for record in log.ended if record.failure is None]
    output_tokens = sum(record.output_tokens for record in succeeded)
    input_counts = [record.prompt_tokens for record in succeeded if record.prompt_tokens is not None]
    all_counted = len(input_counts) == len(succeeded)
    return Report(
        url=target.base_url,
        model=model,
        date=date.isoformat(timespec="seconds"),
        command=plan,
        interrupted=interrupted,
        num_requests=len(log.ended),
        num_ok=len(succeeded),
        num_errors=len(log.ended) - len(succeeded),
        num_cancelled=log.num_cancelled,
        errors=dict(log.errors.most_common()),
        error_examples=_first_messages(log.ended),
        duration_s=duration_s,
        request_throughput=len(succeeded) / duration_s,
        output_token_throughput=output_tokens / duration_s,
        total_token_throughput=(sum(input_counts) + output_tokens) / duration_s if all_counted else None,
        input_tokens_mean=sum(input_counts) / len(input_counts) if input_counts else None,
        output_tokens_mean=output_tokens / len(succeeded) if succeeded else None,
        chunks=_count_chunks(succeeded),
        ttft_s=distribution(_known(record.ttft_s for record in succeeded)),
        itl_s=distribution(_joined_itls(succeeded)),
        tpot_s=distribution(_known(record.tpot_s for record in succeeded)),
        e2e_s=distribution([record.e2e_s for record in succeeded]),
        service_ttft_s=distribution(_known(record.service_ttft_s for record in succeeded)),
        service_e2e_s=distribution([record.service_e2e_s for record in succeeded]),
    )


def _known(measured: Iterable[float | None]) -> list[float]:
    return [value for value in measured if value is not None]


def _joined_itls(records: list[RequestRecord]) -> "array[float]":
    """Eight bytes each: there is one for every token of the run."""
    joined = array("d")
    for record in records:
        joined.extend(record.itls_s)
    return joined


def _count_chunks(records: list[RequestRecord]) -> ChunkCounts:
    return ChunkCounts(
        total=sum(record.num_chunks for record in records),
        num_requests_differing=sum(record.num_chunks != record.output_tokens for record in records),
        num_requests_without_usage=sum(record.completion_tokens is None for record in records),
    )


def _first_messages(records: list[RequestRecord]) -> dict[str, str]:
    messages: dict[str, str] = {}
    for record in records:
        if record.failure is not None:
            messages.setdefault(record.failure.kind, record.failure.message)
    return messages
