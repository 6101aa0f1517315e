"""What the user asked for, and whether it may be run: one kind of arrivals, and no flood on a stranger's server.

Knows nothing of how requests are sent.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gear_loadtest.arrival import Pattern, offsets, parse_pattern
from gear_loadtest.errors import UsageError
from gear_loadtest.lengths import parse_lengths
from gear_loadtest.rows import Row, read_rows
from gear_loadtest.slo import parse_objective
from gear_loadtest.target import Target, parse_target

MAX_FOREIGN_RATE = 50.0  # requests/s
MAX_FOREIGN_CONCURRENCY = 64
DEFAULT_NUM_REQUESTS = 100
DEFAULT_DURATION_S = 30.0  # of each of several runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Exactly one of `rate` (open loop), `concurrency` (closed loop) and `trace` is set: `resolve` sees to it.

    With several turns, an arrival is a conversation: its turns are requests that follow one another.
    """

    model: str | None = None  # None: the first that the server lists
    rate: float | None = None  # requests/s
    concurrency: int | None = None
    trace: Path | None = None
    arrivals: str = "poisson"
    num_requests: int | None = None
    duration_s: float | None = None  # in which requests start
    warmup_s: float = 0.0  # of that
    input_len: str = "512"  # tokens
    output_len: str = "128"  # tokens
    dataset: Path | None = None
    prefix_len: int = 0  # tokens
    turns: int = 1
    slo: str | None = None
    seed: int = 0
    timeout_s: float = 600.0  # of one request, from send to end
    workers: int = 1
    metrics_url: str | None = None  # None: the target's /metrics

    def __post_init__(self) -> None:
        for option, value in (
            ("--rate", self.rate),
            ("--timeout-s", self.timeout_s),
            ("--duration-s", self.duration_s),
        ):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{option} is {value:g}: give a number above 0")
        if not 0 <= self.warmup_s < (self.duration_s or math.inf):
            raise UsageError(f"--warmup-s is {self.warmup_s:g}: give seconds from 0 to less than the run takes")
        parse_lengths("--input-len", self.input_len)
        parse_lengths("--output-len", self.output_len)
        if self.slo is not None:
            parse_objective(self.slo)
        if parse_pattern(self.arrivals) != Pattern() and self.rate is None:
            raise UsageError(f"--arrivals {self.arrivals} spreads requests around a rate: give --rate too")
        if self.concurrency is not None and self.workers > self.concurrency:
            raise UsageError(f"--workers {self.workers} have less than one request each: raise --concurrency")
        if self.metrics_url is not None:
            parse_target(self.metrics_url)
        if self.dataset is not None and self.trace is not None:
            raise UsageError("--dataset and --trace exclude each other: a trace says what is asked, too")
        if self.turns > 1 and self.trace is not None:
            raise UsageError("--turns and --trace exclude each other: a trace has its own times")

    @property
    def ramp_s(self) -> float:
        """A ramp takes the whole run."""
        first = parse_pattern(self.arrivals).ramp_from
        if first is None or self.rate is None:
            return 0.0
        return self.duration_s or self.num_arrivals(0) / ((first + self.rate) / 2)

    def num_arrivals(self, num_rows: int) -> float:
        """At most; `num_rows` of the trace, if there is one."""
        asked = self.num_requests if self.num_requests is not None else math.inf
        if self.trace is not None:
            return min(asked, num_rows)
        return math.ceil(asked / self.turns) if math.isfinite(asked) else math.inf

    def num_expected(self, num_rows: int) -> int | None:
        """Requests in all, about; `None` where only time ends a closed loop."""
        num = self.num_arrivals(num_rows) * self.turns
        if math.isfinite(num):
            return int(num)
        mean_rate = ((parse_pattern(self.arrivals).ramp_from or self.rate) + self.rate) / 2 if self.rate else None
        return round(mean_rate * self.turns * self.duration_s) if mean_rate and self.duration_s else None

    def schedule(self, rows: list[Row]) -> Iterator[tuple[int, float]] | None:
        """(index, seconds after the start) of each arrival; `None` for a closed loop."""
        if self.concurrency is not None:
            return None
        times = (
            (row.time_s or 0.0 for row in rows)
            if self.rate is None
            else offsets(parse_pattern(self.arrivals), self.rate, self.seed, self.ramp_s)
        )
        num = self.num_arrivals(len(rows))
        arrivals = enumerate(times if math.isinf(num) else itertools.islice(times, int(num)))
        return itertools.takewhile(lambda arrival: arrival[1] < (self.duration_s or math.inf), arrivals)

    def at_rate(self, rate: float) -> "LoadPlan":
        """For one run of several; by default it ends by time, so that all take the same."""
        by_default = DEFAULT_DURATION_S if self.num_requests is None else None
        return replace(self, rate=rate, duration_s=self.duration_s or by_default)


def resolve(plan: LoadPlan) -> LoadPlan:
    """With exactly one kind of arrivals and an end, by default one request at a time and 100 in all."""
    asked = {"--rate": plan.rate, "--concurrency": plan.concurrency, "--trace": plan.trace}
    given = [option for option, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UsageError(
            f"{' and '.join(given)} exclude each other: give --rate to send on a schedule whatever the server does, "
            "--concurrency to keep that many requests running, or --trace to replay a file's times"
        )
    if not given:
        plan = replace(plan, concurrency=1)
    if plan.num_requests is None and plan.duration_s is None and plan.trace is None:
        plan = replace(plan, num_requests=DEFAULT_NUM_REQUESTS)
    return plan


def search_rates(plan: LoadPlan, sweep: str | None, *, find_max: bool) -> list[float]:
    """The rates of a sweep, the first of a search, or none. Raises `UsageError`."""
    if sweep is None and not find_max:
        return []
    if sweep is not None and find_max:
        raise UsageError("--sweep and --find-max-rate exclude each other: a search chooses its own rates")
    if plan.concurrency is not None or plan.trace is not None:
        raise UsageError("--sweep and --find-max-rate vary the rate: leave --concurrency and --trace out")
    if find_max and plan.slo is None:
        raise UsageError("--find-max-rate needs an objective: add --slo, such as --slo ttft=500ms,itl=50ms,p=99")
    if sweep is None:
        return [plan.rate or 1.0]
    try:
        rates = sorted({float(part) for part in sweep.split(",")})
    except ValueError:
        rates = []
    if not rates or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise UsageError(f"cannot read --sweep {sweep!r}: give rates in requests/s, such as 1,2,4,8")
    return rates


def read_plan_rows(plan: LoadPlan) -> list[Row]:
    if plan.trace is not None:
        return read_rows("--trace", plan.trace, with_times=True)
    return read_rows("--dataset", plan.dataset, with_times=False) if plan.dataset is not None else []


def refuse_flood(plan: LoadPlan, target: Target, rows: list[Row], *, own_target: bool, searches: bool = False) -> None:
    """Raise `UsageError` if the plan would press hard on a server that may be somebody else's."""
    if own_target or target.is_loopback or target.is_encrypted:
        return
    if searches:
        raise UsageError(
            f"{target.base_url} is not this machine, and a search presses until it fails: "
            "add --i-own-this-target if you may do that"
        )
    rate = max(plan.rate or 0.0, parse_pattern(plan.arrivals).ramp_from or 0.0, _peak_rate(rows))
    if rate > MAX_FOREIGN_RATE or (plan.concurrency or 0) > MAX_FOREIGN_CONCURRENCY:
        raise UsageError(
            f"{target.base_url} is not this machine, and more than {MAX_FOREIGN_RATE:g} requests/s or "
            f"{MAX_FOREIGN_CONCURRENCY} at once is a flood: add --i-own-this-target if you may do that"
        )


def _peak_rate(rows: list[Row]) -> float:
    """Of a trace: the most requests in one second."""
    times = [row.time_s for row in rows if row.time_s is not None]
    peak = first = 0
    for last, time_s in enumerate(times):
        while times[first] <= time_s - 1:
            first += 1
        peak = max(peak, last - first + 1)
    return float(peak)
