"""A few live lines on the terminal while a run goes on.

Looks at the run four times a second and never writes to it; without a terminal it shows nothing.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import perf_counter

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gear_loadtest.distribution import Histogram
from gear_loadtest.plan import LoadPlan
from gear_loadtest.rows import Row
from gear_loadtest.run_log import Glance

_REFRESH_S = 0.25
_NUM_BARS = 40
_BARS = "▁▂▃▄▅▆▇█"


@asynccontextmanager
async def live_progress(
    look: Callable[[], Glance], plan: LoadPlan, rows: list[Row], console: Console
) -> AsyncIterator[None]:
    """The lines are gone when the run ends: the report follows in their place."""
    if not console.is_terminal:
        yield
        return
    view = LiveView(plan, plan.num_expected(len(rows)))
    with Live(console=console, transient=True, auto_refresh=False) as live:
        refreshing = asyncio.create_task(_refresh(live, view, look))
        try:
            yield
        finally:
            refreshing.cancel()


async def _refresh(live: Live, view: "LiveView", look: Callable[[], Glance]) -> None:
    while True:
        live.update(view.draw(look()), refresh=True)
        await asyncio.sleep(_REFRESH_S)


class LiveView:
    """Remembers the last ten seconds of throughput, and draws."""

    def __init__(self, plan: LoadPlan, num_requests: int | None) -> None:
        self.plan = plan
        self.num_requests = num_requests
        self.start = self.looked_at = perf_counter()
        self.num_chunks = 0
        self.chunk_rates: deque[float] = deque(maxlen=_NUM_BARS)
        self.num_running: deque[float] = deque(maxlen=_NUM_BARS)

    def draw(self, now: Glance) -> Group:
        elapsed_s = perf_counter() - self.start
        passed_s, self.looked_at = perf_counter() - self.looked_at, perf_counter()
        if passed_s > 0.01:
            self.chunk_rates.append((now.num_chunks - self.num_chunks) / passed_s)
            self.num_running.append(now.num_running)
            self.num_chunks = now.num_chunks
        return Group(self._bar(now, elapsed_s), *self._figures(now))

    def _bar(self, now: Glance, elapsed_s: float) -> Table:
        if self.num_requests:
            total, done, said = (
                float(self.num_requests),
                float(now.num_ended),
                f"{now.num_ended:,}/{self.num_requests:,}",
            )
        else:
            total, done, said = self.plan.duration_s or 1.0, elapsed_s, f"{now.num_ended:,} ended"
        line = Table.grid(expand=True, padding=(0, 1))
        line.add_column(ratio=1)
        errors = f"{now.num_failed:,} failed" if now.num_failed else ""
        phase = "warm-up" if elapsed_s < self.plan.warmup_s else ""
        clock = f"{int(elapsed_s) // 60}:{int(elapsed_s) % 60:02d}"
        bar = ProgressBar(total=total, completed=min(done, total))
        line.add_row(bar, Text(said), Text(errors, "bold red"), Text(phase, "yellow"), Text(clock, "dim"))
        return line

    def _figures(self, now: Glance) -> list[Text]:
        rate = sum(self.chunk_rates) / max(1, len(self.chunk_rates))
        return [
            _figure("running", f"{now.num_running:,}", self.num_running),
            _figure("chunks/s", f"{rate:,.0f}", self.chunk_rates),
            Text.assemble(
                ("TTFT, ITL  ", "dim"), _recent(now.recent_ttft_s), (" · ", "dim"), _recent(now.recent_itl_s)
            ),
        ]


def _figure(name: str, value: str, history: deque[float]) -> Text:
    highest = max(history, default=0.0) or 1.0
    bars = "".join(_BARS[round(one / highest * (len(_BARS) - 1))] for one in history)
    return Text.assemble((f"{name:<10} ", "dim"), (f"{value:>8}  ", "bold"), (bars, "cyan"))


def _recent(measured: Histogram) -> str:
    if not measured.num:
        return "–"
    p50, p99 = measured.quantiles((0.5, 0.99))
    return f"p50 {p50 * 1000:,.1f}, p99 {p99 * 1000:,.1f} ms"
