"""What one process knows of its run while it goes on, and hands over at the end: bounded, whatever the run's length.

Also watches the process itself: a client that cannot keep up measures itself, not the server.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter, process_time

from gear_loadtest.distribution import Histogram
from gear_loadtest.record import RequestRecord
from gear_loadtest.timeline import Timeline, merged

_TICK_S = 0.05
_NUM_RECENT_SLICES = 8

IsGood = Callable[[RequestRecord], bool]


def good_if_ok(record: RequestRecord) -> bool:
    return record.failure is None


@dataclass(slots=True)
class ClientEffort:
    """How hard the client itself worked; `cpu_s` and `num_chunks` of the busiest process among several."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    num_chunks: int = 0
    wake_up_delay_s: Histogram = field(default_factory=Histogram)  # of the event loop, every 50 ms

    @property
    def cpu_share(self) -> float:
        return self.cpu_s / self.wall_s if self.wall_s else 0.0

    def merge(self, other: "ClientEffort") -> None:
        if other.cpu_share > self.cpu_share:
            self.cpu_s, self.wall_s, self.num_chunks = other.cpu_s, other.wall_s, other.num_chunks
        self.wake_up_delay_s.merge(other.wake_up_delay_s)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        wall, cpu = perf_counter(), process_time()
        try:
            yield
        finally:
            self.wall_s, self.cpu_s = perf_counter() - wall, process_time() - cpu
            watching.cancel()

    async def _watch(self) -> None:
        while True:
            due = perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.wake_up_delay_s.add(max(0.0, perf_counter() - due))


@dataclass(frozen=True, slots=True)
class Glance:
    """A run at one moment, for the live view: small, since workers send it several times a second."""

    num_ended: int
    num_failed: int
    num_running: int
    num_chunks: int
    recent_ttft_s: Histogram
    recent_itl_s: Histogram

    @classmethod
    def nothing(cls) -> "Glance":
        return cls(0, 0, 0, 0, Histogram(), Histogram())

    def plus(self, other: "Glance") -> "Glance":
        for mine, theirs in ((self.recent_ttft_s, other.recent_ttft_s), (self.recent_itl_s, other.recent_itl_s)):
            mine.merge(theirs)
        return Glance(
            self.num_ended + other.num_ended,
            self.num_failed + other.num_failed,
            self.num_running + other.num_running,
            self.num_chunks + other.num_chunks,
            self.recent_ttft_s,
            self.recent_itl_s,
        )


@dataclass(slots=True)
class RunLog:
    timeline: Timeline
    is_good: IsGood = good_if_ok
    running: set[RequestRecord] = field(default_factory=set)
    error_examples: dict[str, str] = field(default_factory=dict)  # the first message of each kind
    num_warm_up: int = 0  # requests intended for the warm-up: sent, and left out of the latencies
    num_cancelled: int = 0  # running when the user stopped the run: neither a success nor an error
    num_ended: int = 0
    num_failed: int = 0
    num_bad: int = 0  # failed, or ended outside the objective
    effort: ClientEffort = field(default_factory=ClientEffort)

    def end(self, record: RequestRecord) -> None:
        is_good = record.failure is None and self.is_good(record)
        ended_at = record.finished_at if record.failure is None else perf_counter()
        self.timeline.note(record, ended_at, is_good=is_good)
        self.num_ended += 1
        self.num_failed += record.failure is not None
        self.effort.num_chunks += record.num_chunks
        if record.intended_at < self.timeline.start:
            self.num_warm_up += 1
            return
        self.num_bad += not is_good
        if record.failure is not None:
            self.error_examples.setdefault(record.failure.kind, record.failure.message)

    @property
    def num_chunks(self) -> int:
        return self.effort.num_chunks + sum(record.num_chunks for record in self.running)

    def glance(self) -> Glance:
        recent = merged(self.timeline.slices[-_NUM_RECENT_SLICES:])
        return Glance(self.num_ended, self.num_failed, len(self.running), self.num_chunks, recent.ttft_s, recent.itl_s)

    def merge(self, other: "RunLog") -> None:
        """Another worker's, once both have ended."""
        self.timeline.merge(other.timeline)
        self.error_examples = other.error_examples | self.error_examples
        for name in ("num_warm_up", "num_cancelled", "num_ended", "num_failed", "num_bad"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.effort.merge(other.effort)
