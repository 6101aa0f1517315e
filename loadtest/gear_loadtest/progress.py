"""One live line on the terminal while a run goes on.

Reads the log four times a second and never writes to it; without a terminal it shows nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gear_loadtest.run_log import RunLog

_REFRESH_S = 0.25


@asynccontextmanager
async def live_progress(log: RunLog, num_requests: int, console: Console) -> AsyncIterator[None]:
    """The line is gone when the run ends: the report follows in its place."""
    if not console.is_terminal:
        yield
        return
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, auto_refresh=False, expand=True) as progress:
        refreshing = asyncio.create_task(_refresh(progress, log, num_requests))
        try:
            yield
        finally:
            refreshing.cancel()


async def _refresh(progress: Progress, log: RunLog, num_requests: int) -> None:
    start = perf_counter()
    bar = progress.add_task("", total=num_requests)
    while True:
        progress.update(bar, completed=log.num_ended, description=_describe(log, perf_counter() - start))
        progress.refresh()
        await asyncio.sleep(_REFRESH_S)


def _describe(log: RunLog, elapsed_s: float) -> str:
    num_errors = log.num_failed
    errors = f" · [red]{num_errors} failed[/]" if num_errors else ""
    return f"{len(log.running)} running · {log.num_chunks / elapsed_s:,.0f} chunks/s{errors}"
