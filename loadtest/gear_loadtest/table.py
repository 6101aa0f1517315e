"""The report as a person reads it: 80 columns, milliseconds, and what went wrong at the end, where it is seen.

Everything that a server sent is printed as plain text, never as markup.
"""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gear_loadtest.compare import Ratio, Run, differences
from gear_loadtest.distribution import Distribution
from gear_loadtest.lengths import parse_lengths
from gear_loadtest.plan import LoadPlan
from gear_loadtest.report import Report
from gear_loadtest.search import Sweep
from gear_loadtest.server_metrics import COUNTERS, GAUGES, ServerReport

_WIDTH = 80


def render(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_heading(report), _throughput(report)]
    if report.num_ok:
        parts += [_latency(report), Padding(_steady(report), (0, 1))]
    if report.goodput is not None:
        parts.append(Padding(_objective(report), (0, 1)))
    parts.append(_server(report.server))
    if report.errors:
        parts.append(_errors(report))
    parts += [Padding(Text(note, "yellow"), (0, 1)) for note in _notes(report)]
    if report.client.invalid:
        parts.append(Padding(_invalid(report.client.invalid), (0, 1)))
    return Group(*(Padding(part, (1, 0, 0, 0)) for part in parts), "")


def _heading(report: Report) -> Text:
    plan = report.command
    text = Text()
    text.append(f" {report.model}", "bold").append(f" at {report.url}\n")
    text.append(f" {describe_load(plan)} · seed {plan.seed} · {report.duration_s:,.1f} s\n", "dim")
    text.append(f" {report.num_ok:,} ok", "bold green" if report.num_ok else "bold")
    text.append(", ").append(f"{report.num_errors:,} failed", "bold red" if report.num_errors else "")
    if report.num_warm_up:
        text.append(f", {report.num_warm_up:,} in the warm-up")
    if report.interrupted:
        planned = f"{plan.num_requests:,} were" if plan.num_requests else f"{plan.duration_s or 0:g} s were"
        text.append(f", {report.num_cancelled:,} cut off · interrupted, {planned} planned", "yellow")
    return text


def describe_load(plan: LoadPlan) -> str:
    if plan.trace is not None:
        load = f"trace {plan.trace.name}"
    elif plan.rate is not None:
        spread = "" if plan.arrivals == "poisson" else f" ({plan.arrivals})"
        load = f"open loop, {plan.rate:g} {'conversations' if plan.turns > 1 else 'requests'}/s{spread}"
    else:
        load = f"closed loop, {plan.concurrency} at once"
    if plan.turns > 1:
        load += f", {plan.turns} turns"
    return f"{load}, {plan.prefix_len:,} tokens shared" if plan.prefix_len else load


def _throughput(report: Report) -> Table:
    table = _table()
    table.add_column(_title("Throughput", ""), ratio=1)
    table.add_column("per second", justify="right")
    table.add_column("", width=6)
    table.add_column(_title("Length", "tokens"), ratio=1)
    table.add_column("mean", justify="right", width=8)
    table.add_column("asked", justify="right", width=8)
    plan = report.command
    from_file = plan.trace or plan.dataset
    asked_in, asked_out = (
        None if from_file else parse_lengths("", text).mean for text in (plan.input_len, plan.output_len)
    )
    rows = (
        ("requests", report.request_throughput, "prompt", report.input_tokens_mean, asked_in),
        ("output tokens", report.output_token_throughput, "output", report.output_tokens_mean, asked_out),
        ("total tokens", report.total_token_throughput, "", None, None),
    )
    for what, per_second, of_what, mean, asked in rows:
        sizes = (_number(mean), f"{asked:,.0f}" if asked else "–") if of_what else ("", "")
        table.add_row(what, Text(_number(per_second), "bold"), "", of_what, *sizes)
    return table


def _latency(report: Report) -> Table:
    table = _table()
    table.add_column(_title("Latency", "milliseconds"), ratio=1)
    for column in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right", width=8)
    rows = [
        ("TTFT", "first chunk", report.ttft_s),
        ("ITL", "chunk gaps", report.itl_s),
        ("TPOT", "per token", report.tpot_s),
        ("E2E", "whole answer", report.e2e_s),
    ]
    if report.command.rate is not None:  # in a closed loop a request is intended for when it is sent
        rows += [("", "TTFT from send", report.service_ttft_s), ("", "E2E from send", report.service_e2e_s)]
    for name, meaning, measured in rows:
        table.add_row(Text.assemble(f"{name:<5}", (meaning, "dim")), *_milliseconds(measured))
    return table


def _objective(report: Report) -> Text:
    verdict = ("met", "bold green") if report.objective_met else ("missed", "bold red")
    return Text.assemble(
        "Objective ", (report.command.slo or "", "bold"), " ", verdict, ": ",
        f"{report.good_share or 0:.1%} good; goodput {_number(report.goodput)} requests/s, "
        f"{_number(report.good_token_throughput)} output tokens/s.",
    )  # fmt: skip


def _server(server: ServerReport) -> RenderableType:
    """What the server's own metrics say, beside the client's figures; counters are what the run added."""
    if not server.gauges and not server.counters:
        reason = server.problem or "its /metrics has none of GearServe's names"
        return Padding(Text(f"No server-side view: {reason}.", "dim"), (0, 1))
    table = _table()
    table.add_column(_title("Server", "its /metrics"), ratio=1)
    for column in ("before", "lowest", "highest", "after"):
        table.add_column(column, justify="right", width=10)
    for name, what in GAUGES:
        if (view := server.gauges.get(name)) is not None:
            values = (view.before, view.lowest, view.highest, view.after)
            table.add_row(what, *(_quantity(name, value) for value in values))
    for name, what in COUNTERS:
        if name in server.counters:
            table.add_row(what, "", "", "", f"+{server.counters[name]:,.0f}")
    notes = [f"Absent from its metrics: {', '.join(server.absent)}."] if server.absent else []
    notes += [f"{server.problem}."] if server.problem else []
    return Group(table, *(Padding(Text(note, "dim"), (0, 1)) for note in notes))


def _quantity(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    if "_bytes" in name:
        return f"{value / 2**30:,.2f} GiB" if abs(value) >= 2**30 else f"{value / 2**20:,.1f} MiB"
    return f"{value:.2f}×" if "ratio" in name else f"{value:,.0f}"


def _errors(report: Report) -> Table:
    table = _table()
    table.add_column(_title("Errors", "", "red"), no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("for example", ratio=1, overflow="fold")
    for kind, count in report.errors.items():
        table.add_row(kind, Text(f"{count:,}", "bold red"), Text(report.error_examples[kind], "dim"))
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, width=_WIDTH, header_style="dim", show_edge=False)


def _title(name: str, unit: str, style: str = "cyan") -> Text:
    return Text.assemble((name, f"not dim bold {style}"), f"  {unit}" if unit else "")


def _steady(report: Report) -> Text:
    steady = report.steady
    if steady is None:
        reason = report.not_steady or ""
        return Text(f"{reason[:1].upper()}{reason[1:]}.", "yellow" if "fell behind" in reason else "dim")
    return Text(
        f"Steady from {steady.start_s:.1f} to {steady.end_s:.1f} s, {steady.num_running_mean:,.1f} requests at once: "
        f"{_number(steady.output_token_throughput)} output tokens/s.",
        "dim",
    )


def _invalid(reason: str) -> Text:
    remedy = "Add --workers, lower the load, or give the load tester a machine of its own."
    return Text.assemble(("INVALID", "bold reverse red"), f" The client was the bottleneck: {reason}. {remedy}")


def _notes(report: Report) -> list[str]:
    """What the figures do not say by themselves."""
    notes = []
    chunks = report.chunks
    if chunks.num_requests_without_usage:
        notes.append(
            f"{chunks.num_requests_without_usage:,} of {report.num_ok:,} requests came without usage: "
            "their output tokens are counted by chunks, their prompts not at all."
        )
    if chunks.num_requests_differing:
        notes.append(
            f"{chunks.num_requests_differing:,} of {report.num_ok:,} requests had more or fewer chunks "
            "than tokens: ITL is the gap between chunks, TPOT the time of a token."
        )
    return notes


def _milliseconds(measured: Distribution | None) -> list[str]:
    if measured is None:
        return ["–"] * 5
    return [_number(value * 1000) for value in (measured.mean, measured.p50, measured.p90, measured.p99, measured.max)]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f}" if abs(value) < 10 else f"{value:,.1f}" if abs(value) < 10_000 else f"{value:,.0f}"


def render_runs(runs: list[Report]) -> Table:
    """One row a run; TTFT and ITL at the 99th percentile."""
    table = _table()
    table.collapse_padding = True
    for name in ("asked/s", "done/s", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "good", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        good = "–" if run.good_share is None else f"{run.good_share:.1%}"
        verdict = {None: Text(""), True: Text("met", "green"), False: Text("missed", "red")}[run.objective_met]
        if run.interrupted or run.client.invalid:
            verdict = Text("cut off" if run.interrupted else "INVALID", "bold yellow")
        if run.num_errors and run.good_share is None:
            verdict = Text(f"{run.num_errors:,} failed", "bold red")
        table.add_row(
            f"{run.command.rate:,.3g}", _number(run.request_throughput), _number(run.output_token_throughput),
            *(_milliseconds(measured)[place] for measured in (run.ttft_s, run.itl_s) for place in (1, 3)),
            good, verdict,
        )  # fmt: skip
    return table


def render_sweep(result: Sweep) -> RenderableType:
    parts: list[RenderableType] = [render_runs(result.runs)]
    if result.max_rate is not None:
        parts.append(Text(f" Highest rate that meets the objective: {result.max_rate:,.3g} requests/s.", "bold green"))
    elif result.runs[-1].objective_met is not None and not any(run.objective_met for run in result.runs):
        parts.append(Text(" No rate met the objective.", "bold red"))
    if result.knee_rate is not None:
        parts.append(Text(f" Knee, where throughput over latency is greatest: {result.knee_rate:,.3g} requests/s."))
    elif len(result.runs) > 2:
        parts.append(Text(" No knee within these rates.", "dim"))
    if result.interrupted:
        parts.append(Text(" Interrupted: this is what was measured.", "yellow"))
    return Group("", *parts, "")


def render_comparison(a: Run, b: Run, ratios: list[Ratio]) -> RenderableType:
    table = _table()
    table.add_column(_title("B over A", ""), ratio=1, no_wrap=True)
    for name in ("A", "B", "ratio", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    styles = {"better": "green", "worse": "red"}
    for one in ratios:
        scale, unit = (1, "") if one.higher_is_better else (1000, " ms")
        table.add_row(
            one.name, _number(one.a * scale) + unit, _number(one.b * scale) + unit, Text(f"{one.ratio:.3f}", "bold"),
            f"{one.low:.3f}–{one.high:.3f}", Text(one.verdict, styles.get(one.verdict, "dim")),
        )  # fmt: skip
    names = Text.assemble((" A ", "bold"), a.name, ("   B ", "bold"), b.name)
    return Group("", names, "", table, *(Text(f" {text}", "yellow") for text in differences(a, b)), "")
