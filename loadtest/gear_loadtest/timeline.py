"""A run in slices of time, each a tally: at most 64, whatever the run's length, so a million requests fit too.

A request's latencies lie in the slice it was intended for, its tokens where they arrived. Knows nothing of HTTP.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gear_loadtest.distribution import Histogram
from gear_loadtest.record import RequestRecord

_MAX_SLICES = 64
_FIRST_WIDTH_S = 0.125
_MIN_STEADY_SLICES = 8


@dataclass(slots=True)
class Tally:
    """Every field adds up: slices into longer slices, workers into a run."""

    num_ok: int = 0
    num_good: int = 0  # ok, and within the objective if there is one
    errors: "Counter[str]" = field(default_factory=Counter)  # by kind
    num_finished: int = 0  # ended well in this slice, whenever they were sent
    output_tokens: float = 0.0  # that arrived in this slice; a request's tokens are spread evenly over its chunks
    good_tokens: float = 0.0  # of the good requests intended for this slice
    busy_s: float = 0.0  # seconds that requests were under way, all together: ÷ width, how many at once
    num_chunks: int = 0
    num_with_prompt: int = 0  # the next is the sum over these
    prompt_tokens: int = 0
    completion_tokens: int = 0  # of the requests intended for this slice
    num_differing: int = 0  # requests whose chunks are not as many as the tokens in usage
    num_without_usage: int = 0
    ttft_s: Histogram = field(default_factory=Histogram)
    itl_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)
    e2e_s: Histogram = field(default_factory=Histogram)
    service_ttft_s: Histogram = field(default_factory=Histogram)
    service_e2e_s: Histogram = field(default_factory=Histogram)
    late_s: Histogram = field(default_factory=Histogram)

    @property
    def num_errors(self) -> int:
        return self.errors.total()

    @property
    def num_requests(self) -> int:
        return self.num_ok + self.num_errors

    def merge(self, other: "Tally") -> None:
        for one in dataclasses.fields(self):
            mine, theirs = getattr(self, one.name), getattr(other, one.name)
            if isinstance(mine, Histogram):
                mine.merge(theirs)
            elif isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, one.name, mine + theirs)

    def encode(self) -> dict[str, Any]:
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        return {name: value.encode() if isinstance(value, Histogram) else value for name, value in values.items()}

    @classmethod
    def decode(cls, encoded: dict[str, Any]) -> "Tally":
        """Raises `KeyError`, `TypeError` or `ValueError` for what `encode` did not write."""
        tally = cls()
        for one in dataclasses.fields(cls):
            value, default = encoded[one.name], getattr(tally, one.name)
            if isinstance(default, Histogram):
                value = Histogram.decode(value)
            setattr(tally, one.name, Counter(value) if isinstance(default, Counter) else value)
        return tally


def merged(tallies: Iterable[Tally]) -> Tally:
    whole = Tally()
    for tally in tallies:
        whole.merge(tally)
    return whole


@dataclass(frozen=True, slots=True)
class SteadyWindow:
    """Where the load was level, in seconds after the warm-up: after it built up, before the last request was sent."""

    start_s: float
    end_s: float
    num_running_mean: float
    output_token_throughput: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


@dataclass(slots=True)
class Timeline:
    """Time 0 is `start` (`perf_counter`), the end of the warm-up. Slices double in width when they grow too many."""

    start: float
    width_s: float = _FIRST_WIDTH_S
    slices: list[Tally] = field(default_factory=list)
    last_intended_s: float = 0.0

    def note(self, record: RequestRecord, ended_at: float, *, is_good: bool) -> None:
        """Take in a request that ended, well or not. One intended for the warm-up counts only for what came after."""
        self._note_busy(record.sent_at - self.start, ended_at - self.start)
        if record.failure is None:
            self._note_tokens(record)
        intended_s = record.intended_at - self.start
        if intended_s >= 0:
            self.last_intended_s = max(self.last_intended_s, intended_s)
            _note_latencies(self._at(intended_s), record, is_good=is_good)

    def _at(self, time_s: float) -> Tally:
        while time_s >= self.width_s * _MAX_SLICES:
            self.widen()
        while len(self.slices) <= int(time_s / self.width_s):
            self.slices.append(Tally())
        return self.slices[int(time_s / self.width_s)]

    def widen(self) -> None:
        """Join the slices two by two."""
        self.width_s *= 2
        self.slices = [merged(self.slices[first : first + 2]) for first in range(0, len(self.slices), 2)]

    def _note_busy(self, since_s: float, until_s: float) -> None:
        since_s = max(0.0, since_s)
        if until_s <= since_s:
            return
        self._at(until_s)
        for index in range(int(since_s / self.width_s), int(until_s / self.width_s) + 1):
            start_s = index * self.width_s
            self.slices[index].busy_s += min(until_s, start_s + self.width_s) - max(since_s, start_s)

    def _note_tokens(self, record: RequestRecord) -> None:
        finished_s = record.finished_at - self.start
        if finished_s < 0:
            return
        self._at(finished_s).num_finished += 1
        times_s = np.asarray(record.chunk_times) - self.start
        times_s = times_s[times_s >= 0]
        if not times_s.size:
            return
        tokens_per_chunk = record.output_tokens / record.num_chunks
        for index, num_chunks in enumerate(np.bincount((times_s / self.width_s).astype(np.int64)).tolist()):
            self.slices[index].output_tokens += num_chunks * tokens_per_chunk

    def merge(self, other: "Timeline") -> None:
        """Another worker's, with the same start."""
        while self.width_s < other.width_s:
            self.widen()
        while other.width_s < self.width_s:
            other.widen()
        if other.slices:
            self._at((len(other.slices) - 1) * self.width_s)
        for mine, theirs in zip(self.slices, other.slices, strict=False):
            mine.merge(theirs)
        self.last_intended_s = max(self.last_intended_s, other.last_intended_s)

    def total(self) -> Tally:
        return merged(self.slices)

    def num_running(self) -> list[float]:
        """How many requests were under way in each slice, on average."""
        return [tally.busy_s / self.width_s for tally in self.slices]

    def __iter__(self) -> Iterator[Tally]:
        return iter(self.slices)

    def steady_window(self) -> SteadyWindow | str:
        """Found in the number of requests under way; or a sentence that says why there is none.

        Its start is where the marginal standard error of the rest is least (MSER, White 1997). It only ever cuts the
        beginning and the end: a stall in between is the server's.
        """
        num_slices = int(self.last_intended_s / self.width_s)
        if num_slices < _MIN_STEADY_SLICES:
            return f"too short to find a steady state ({self.last_intended_s:.1f} s of load)"
        level = np.array(self.num_running()[:num_slices])
        errors = [level[cut:].var() / (num_slices - cut) for cut in range(num_slices // 2 + 1)]
        first = int(np.argmin(errors))
        before, after = np.array_split(level[first:], 2)
        if after.mean() > 1.25 * before.mean() + 1:
            return (
                f"no steady state: {before.mean():.1f}, then {after.mean():.1f} requests were under way on average, "
                "so the server fell behind the load"
            )
        inside = merged(self.slices[first:num_slices])
        p50, p99 = inside.ttft_s.quantiles((0.5, 0.99)) if inside.ttft_s.num else (None, None)
        length_s = (num_slices - first) * self.width_s
        return SteadyWindow(
            first * self.width_s, num_slices * self.width_s, float(level[first:].mean()),
            inside.output_tokens / length_s, p50, p99,
        )  # fmt: skip


def _note_latencies(tally: Tally, record: RequestRecord, *, is_good: bool) -> None:
    if record.failure is not None:
        tally.errors[record.failure.kind] += 1
        return
    tally.num_ok += 1
    tally.num_good += is_good
    tally.good_tokens += record.output_tokens if is_good else 0
    tally.num_chunks += record.num_chunks
    tally.completion_tokens += record.output_tokens
    tally.num_differing += record.num_chunks != record.output_tokens
    tally.num_without_usage += record.completion_tokens is None
    if record.prompt_tokens is not None:
        tally.num_with_prompt += 1
        tally.prompt_tokens += record.prompt_tokens
    tally.e2e_s.add(record.e2e_s)
    tally.service_e2e_s.add(record.service_e2e_s)
    tally.late_s.add(record.late_s)
    tally.itl_s.add_many(record.itls_s)
    for histogram, value in (
        (tally.ttft_s, record.ttft_s), (tally.service_ttft_s, record.service_ttft_s), (tally.tpot_s, record.tpot_s)
    ):  # fmt: skip
        if value is not None:
            histogram.add(value)
