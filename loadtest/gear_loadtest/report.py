"""The outcome of a run: its fields are the keys of the JSON file.

Only requests that succeeded enter latencies and throughput; failures are counted by kind, and against the objective.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gear_loadtest.distribution import Distribution
from gear_loadtest.plan import LoadPlan
from gear_loadtest.run_log import ClientEffort, RunLog
from gear_loadtest.server_metrics import ServerReport
from gear_loadtest.slo import parse_objective
from gear_loadtest.target import Target
from gear_loadtest.timeline import SteadyWindow, Tally, Timeline

_MAX_CPU_SHARE = 0.9  # of one core: what is left is no reserve
_MAX_DELAY_S = 0.010  # on average: of sending, or of the event loop's waking up
_MIN_JUDGED_S = 1.0  # start-up takes all of a core for a moment


@dataclass(frozen=True, slots=True)
class ChunkCounts:
    """A chunk is usually a token; where it is not, gaps between chunks are not gaps between tokens."""

    total: int
    num_requests_differing: int  # whose chunks are not as many as the tokens in usage
    num_requests_without_usage: int  # whose tokens are counted by chunks


@dataclass(frozen=True, slots=True)
class ClientReport:
    """The load tester itself: a busy one measures itself."""

    invalid: str | None  # why these figures are not the server's, if the client was the bottleneck
    cpu_share: float  # of one core, by the busiest process
    cpu_ms_per_chunk: float | None
    late_s: Distribution | None  # from the intended start to the send
    wake_up_delay_s: Distribution | None  # of the event loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    url: str
    model: str
    date: str  # ISO 8601, when the first request was sent
    command: LoadPlan
    interrupted: bool
    num_requests: int  # that ended, well or not, without those of the warm-up
    num_ok: int
    num_errors: int
    num_cancelled: int  # still running when interrupted
    num_warm_up: int
    errors: dict[str, int]  # by kind
    error_examples: dict[str, str]  # the first message of each kind
    duration_s: float  # without the warm-up, as all that follows
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
    objective_met: bool | None  # None: no --slo was given
    good_share: float | None  # of all requests, failed ones too
    goodput: float | None  # good requests per second
    good_token_throughput: float | None
    client: ClientReport
    server: ServerReport
    steady: SteadyWindow | None
    not_steady: str | None  # why there is no steady window
    slice_width_s: float
    slices: list[dict[str, Any]]  # one `Tally` each: what plots and comparisons are made of


def make_report(
    log: RunLog,
    *,
    plan: LoadPlan,
    target: Target,
    model: str,
    date: datetime,
    duration_s: float,
    interrupted: bool,
    server: ServerReport,
) -> Report:
    timeline, total = log.timeline, log.timeline.total()
    duration_s = max(duration_s, 1e-9)  # interrupted within the warm-up: nothing was measured, in no time
    all_counted = total.num_with_prompt == total.num_ok
    input_tokens_mean = total.prompt_tokens / total.num_with_prompt if total.num_with_prompt else None
    steady = timeline.steady_window()
    objective = parse_objective(plan.slo) if plan.slo else None
    return Report(
        url=target.base_url,
        model=model,
        date=date.isoformat(timespec="milliseconds"),
        command=plan,
        interrupted=interrupted,
        num_requests=total.num_requests,
        num_ok=total.num_ok,
        num_errors=total.num_errors,
        num_cancelled=log.num_cancelled,
        num_warm_up=log.num_warm_up,
        errors=dict(total.errors.most_common()),
        error_examples=log.error_examples,
        duration_s=duration_s,
        request_throughput=total.num_finished / duration_s,
        output_token_throughput=total.output_tokens / duration_s,
        total_token_throughput=(
            (total.num_finished * (input_tokens_mean or 0.0) + total.output_tokens) / duration_s
            if all_counted
            else None
        ),
        input_tokens_mean=input_tokens_mean,
        output_tokens_mean=total.completion_tokens / total.num_ok if total.num_ok else None,
        chunks=ChunkCounts(total.num_chunks, total.num_differing, total.num_without_usage),
        ttft_s=total.ttft_s.distribution(),
        itl_s=total.itl_s.distribution(),
        tpot_s=total.tpot_s.distribution(),
        e2e_s=total.e2e_s.distribution(),
        service_ttft_s=total.service_ttft_s.distribution(),
        service_e2e_s=total.service_e2e_s.distribution(),
        objective_met=objective.is_met(total.num_good, total.num_requests) if objective else None,
        good_share=total.num_good / max(1, total.num_requests) if objective else None,
        goodput=total.num_good / duration_s if objective else None,
        good_token_throughput=total.good_tokens / duration_s if objective else None,
        client=_client_report(log.effort, total),
        server=server,
        steady=steady if isinstance(steady, SteadyWindow) else None,
        not_steady=steady if isinstance(steady, str) else None,
        slice_width_s=timeline.width_s,
        slices=[tally.encode() for tally in timeline],
    )


def read_timeline(report: Report) -> Timeline:
    return Timeline(0.0, report.slice_width_s, [Tally.decode(encoded) for encoded in report.slices])


def _client_report(effort: ClientEffort, total: Tally) -> ClientReport:
    return ClientReport(
        invalid=_why_invalid(effort, total),
        cpu_share=effort.cpu_share,
        cpu_ms_per_chunk=effort.cpu_s * 1000 / effort.num_chunks if effort.num_chunks else None,
        late_s=total.late_s.distribution(),
        wake_up_delay_s=effort.wake_up_delay_s.distribution(),
    )


def _why_invalid(effort: ClientEffort, total: Tally) -> str | None:
    late_s = total.late_s.total / total.late_s.num if total.late_s.num else 0.0
    delay = effort.wake_up_delay_s
    if late_s > _MAX_DELAY_S:
        return f"it sent {late_s * 1000:,.0f} ms late on average, which TTFT and E2E include"
    if effort.wall_s < _MIN_JUDGED_S:
        return None
    if effort.cpu_share > _MAX_CPU_SHARE:
        return f"it used {effort.cpu_share:.0%} of a core"
    if delay.num and delay.total / delay.num > _MAX_DELAY_S:
        return f"its event loop woke {delay.total / delay.num * 1000:,.0f} ms late on average"
    return None
