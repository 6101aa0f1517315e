"""The plots of a report: latencies as distributions and over time, throughput and load; of a sweep, its knee.

Drawn without a display and without pyplot's global state; as PNG, or as SVG to stand within a page.
"""

import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gear_loadtest.distribution import Histogram
from gear_loadtest.report import Report, read_timeline
from gear_loadtest.search import Sweep
from gear_loadtest.timeline import Timeline

_BLUE, _ORANGE, _GREEN, _GREY = "#2563eb", "#ea580c", "#059669", "#94a3b8"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#64748b",
    "axes.grid": True,
    "grid.color": "#e2e8f0",
    "legend.frameon": False,
    "svg.hashsalt": "gear",  # the same report gives the same file
    "svg.fonttype": "path",
}


def png(subject: Report | Sweep) -> bytes:
    return _save(subject, "png")


def svg(subject: Report | Sweep) -> str:
    """An element for HTML: without the XML header, the document type and the metadata, which name web addresses."""
    text = _save(subject, "svg").decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _save(subject: Report | Sweep, kind: str) -> bytes:
    file = io.BytesIO()
    with rc_context(_STYLE):
        figure = _run_figure(subject) if isinstance(subject, Report) else _sweep_figure(subject)
        figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _run_figure(report: Report) -> Figure:
    timeline = read_timeline(report)
    total = timeline.total()
    figure = Figure(figsize=(10, 8.4), layout="constrained")
    axes = figure.subplots(3, 2)
    _draw_shares(axes[0, 0], "TTFT", total.ttft_s, total.service_ttft_s)
    _draw_shares(axes[0, 1], "E2E", total.e2e_s, total.service_e2e_s)
    _draw_shares(axes[1, 0], "Gaps between chunks (ITL)", total.itl_s, None)
    _draw_latency(axes[1, 1], timeline)
    rates = [tally.output_tokens / timeline.width_s for tally in timeline]
    _draw_over_time(axes[2, 0], "Output tokens/s", rates, timeline, report, _GREEN)
    _draw_over_time(axes[2, 1], "Requests under way", timeline.num_running(), timeline, report, _BLUE)
    return figure


def _draw_shares(axes: Axes, title: str, measured: Histogram, from_send: Histogram | None) -> None:
    """Against the share that is slower, on a scale where every nine has the same width."""
    axes.set_title(f"{title}, ms, by percentile")
    for histogram, name, color, style in (
        (from_send, "from the send", _GREY, "--"), (measured, "from the intended start", _BLUE, "-")
    ):  # fmt: skip
        if histogram is None or not histogram.num:
            continue
        values, shares = histogram.cumulative()
        slower = [max(1 - before, 1 / histogram.num) for before in [0.0, *shares[:-1]]]
        values_ms = [value * 1000 for value in values]
        axes.step(slower, values_ms, style, where="post", color=color, label=name if from_send else None)
    axes.set_xscale("log")
    axes.invert_xaxis()
    nines = [(0.5, "p50"), (0.1, "p90"), (0.01, "p99"), (0.001, "p99.9"), (0.0001, "p99.99")]
    nines = [(share, name) for share, name in nines if measured.num * share >= 0.5]
    axes.set_xticks([share for share, _ in nines], [name for _, name in nines])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    if from_send is not None and measured.num:
        axes.legend(loc="lower right")


def _draw_latency(axes: Axes, timeline: Timeline) -> None:
    axes.set_title("TTFT over time, ms")
    points = [
        ((index + 0.5) * timeline.width_s, [1000 * value for value in tally.ttft_s.quantiles((0.5, 0.99))])
        for index, tally in enumerate(timeline)
        if tally.ttft_s.num
    ]
    times = [time for time, _ in points]
    axes.plot(times, [p99 for _, (_, p99) in points], ".-", color=_ORANGE, label="p99")
    axes.plot(times, [p50 for _, (p50, _) in points], ".-", color=_BLUE, label="p50")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds after the warm-up, when a request was intended")
    if points:
        axes.legend(loc="upper left")


def _draw_over_time(
    axes: Axes, title: str, values: list[float], timeline: Timeline, report: Report, color: str
) -> None:
    axes.set_title(title)
    edges = [min(index * timeline.width_s, report.duration_s) for index in range(len(values) + 1)]
    axes.stairs(values, edges, color=color, fill=True, alpha=0.25)
    axes.stairs(values, edges, color=color)
    if report.steady is not None:
        axes.axvspan(report.steady.start_s, report.steady.end_s, color=_GREY, alpha=0.15, label="steady")
        axes.legend(loc="lower right")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds after the warm-up")


def _sweep_figure(result: Sweep) -> Figure:
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    runs = [run for run in result.runs if run.num_ok and not run.interrupted]
    rates = [run.command.rate or 0.0 for run in runs]
    left.set_title("Requests/s done, by requests/s asked")
    left.plot(rates, rates, "--", color=_GREY, label="asked")
    left.plot(rates, [run.request_throughput for run in runs], "o-", color=_GREEN, label="done")
    if any(run.goodput is not None for run in runs):
        left.plot(rates, [run.goodput or 0.0 for run in runs], "o--", color=_BLUE, label="good")
    right.set_title("Latency, ms, by requests/s asked")
    right.plot(
        rates, [run.ttft_s.p99 * 1000 if run.ttft_s else None for run in runs], "o-", color=_ORANGE, label="TTFT p99"
    )
    right.plot(rates, [run.e2e_s.p50 * 1000 if run.e2e_s else None for run in runs], "o-", color=_BLUE, label="E2E p50")
    for axes in (left, right):
        for rate, name, color in ((result.knee_rate, "knee", "black"), (result.max_rate, "highest", _GREEN)):
            if rate is not None:
                axes.axvline(rate, color=color, linestyle=":", label=f"{name}: {rate:.3g}/s")
        axes.set_ylim(bottom=0)
        axes.margins(y=0.25)
        axes.legend(loc="upper left", ncols=2)
    return figure
