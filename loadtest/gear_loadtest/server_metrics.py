"""The server's own view of a run, from its metrics: before, once a second during, and after.

Knows the names that GearServe exports; another server's absence of them is said, not an error.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

import aiohttp

_INTERVAL_S = 1.0
_IDLE_WITHIN_S = 5.0  # of the end of a run before this one, whose cancelled requests may be under way for a step or two
_IDLE_CHECK_S = 0.1
_UNDER_WAY = ("gear_requests_running", "gear_requests_waiting", "gear_requests_swapped")
_TIMEOUT = aiohttp.ClientTimeout(total=5)

GAUGES = (  # name, what it is
    ("gear_peak_memory_bytes", "peak memory"),
    ("gear_kv_peak_bytes", "KV peak since start"),
    ('gear_kv_bytes{state="sealed"}', "KV bytes, sealed"),
    ('gear_kv_bytes{state="open"}', "KV bytes, open"),
    ("gear_kv_saved_bytes", "KV bytes saved"),
    ("gear_kv_compression_ratio", "compression ratio"),
    ("gear_kv_tokens", "KV tokens"),
    ('gear_pages{state="active"}', "pages, active"),
    ('gear_pages{state="cached"}', "pages, cached"),
    ('gear_pages{state="free"}', "pages, free"),
    ("gear_requests_running", "sequences running"),
    ("gear_requests_waiting", "sequences waiting"),
    ("gear_requests_swapped", "sequences swapped"),
)
COUNTERS = (
    ('gear_swaps_total{direction="out"}', "swaps out"),
    ('gear_swaps_total{direction="in"}', "swaps in"),
    ("gear_preemptions_total", "preemptions"),
    ("gear_prefix_hits_total", "prefix hits"),
    ("gear_cached_tokens_total", "prompt tokens cached"),
    ("gear_prompt_tokens_total", "prompt tokens"),
    ("gear_generation_tokens_total", "tokens generated"),
)
_WANTED = {name for name, _ in (*GAUGES, *COUNTERS)}
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_SERIES = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)(?: \d+)?")


@dataclass(frozen=True, slots=True)
class GaugeView:
    before: float | None
    lowest: float
    highest: float
    after: float | None


@dataclass(slots=True)
class ServerReport:
    """`gauges` and `counters` (what was added during the run) by name; what a server lacks is in `absent`."""

    problem: str | None = None  # why there is nothing, if so
    num_scrapes: int = 0
    gauges: dict[str, GaugeView] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


@asynccontextmanager
async def watched_server(session: aiohttp.ClientSession, url: str) -> AsyncIterator[ServerReport]:
    """The report is filled when the block ends; a server that stops answering leaves what came before."""
    report = ServerReport()
    before = await _scrape_idle(session, url)
    if isinstance(before, str):
        report.problem = before
        yield report
        return
    extremes = _Extremes()
    extremes.take(before)
    watching = asyncio.create_task(_watch(session, url, extremes))
    try:
        yield report
    finally:
        watching.cancel()
    after = await _scrape(session, url)
    if isinstance(after, str):
        report.problem = f"{after} after the run"
        after = {}
    extremes.take(after)
    _fill(report, before, after, extremes)


class _Extremes:
    def __init__(self) -> None:
        self.num = 0
        self.lowest: dict[str, float] = {}
        self.highest: dict[str, float] = {}

    def take(self, values: dict[str, float]) -> None:
        self.num += bool(values)
        for name, value in values.items():
            self.lowest[name] = min(value, self.lowest.get(name, value))
            self.highest[name] = max(value, self.highest.get(name, value))


async def _watch(session: aiohttp.ClientSession, url: str, extremes: _Extremes) -> None:
    while True:
        await asyncio.sleep(_INTERVAL_S)
        values = await _scrape(session, url)
        if not isinstance(values, str):
            extremes.take(values)


def _fill(report: ServerReport, before: dict[str, float], after: dict[str, float], extremes: _Extremes) -> None:
    report.num_scrapes = extremes.num
    for name, _ in GAUGES:
        if name in extremes.highest:
            lowest, highest = extremes.lowest[name], extremes.highest[name]
            report.gauges[name] = GaugeView(before.get(name), lowest, highest, after.get(name))
    for name, _ in COUNTERS:
        if name in before and name in after:
            report.counters[name] = after[name] - before[name]
    report.absent = sorted(_WANTED - report.gauges.keys() - report.counters.keys())


async def _scrape_idle(session: aiohttp.ClientSession, url: str) -> dict[str, float] | str:
    """As `_scrape`, once no request is under way, or as it is if that takes too long: the server has other clients."""
    last = asyncio.get_running_loop().time() + _IDLE_WITHIN_S
    while True:
        values = await _scrape(session, url)
        if isinstance(values, str) or not any(values.get(name) for name in _UNDER_WAY):
            return values
        if asyncio.get_running_loop().time() > last:
            return values
        await asyncio.sleep(_IDLE_CHECK_S)


async def _scrape(session: aiohttp.ClientSession, url: str) -> dict[str, float] | str:
    """The values wanted, or why there are none."""
    try:
        async with session.get(url, timeout=_TIMEOUT, allow_redirects=False) as response:
            if response.status != HTTPStatus.OK:
                return f"{url} answered {response.status}"
            return parse_metrics(await response.text(errors="replace"))
    except (aiohttp.ClientError, OSError):  # OSError: also a timeout
        return f"{url} did not answer"


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus' text format: the sums over models of what is wanted, by name and the labels besides `model`."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("gear_"):
            continue
        match = _SERIES.fullmatch(line)
        if match is None:
            continue
        name, labels, number = match.groups()
        others = [f'{label}="{value}"' for label, value in _LABEL.findall(labels or "") if label != "model"]
        key = f"{name}{{{','.join(others)}}}" if others else name
        try:
            value = float(number)
        except ValueError:
            continue
        if key in _WANTED:
            values[key] = values.get(key, 0.0) + value
    return values
