"""The report as a person reads it: 80 columns, milliseconds, and what went wrong at the end, where it is seen.

Everything that a server sent is printed as plain text, never as markup.
"""

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gear_loadtest.distribution import Distribution
from gear_loadtest.lengths import parse_lengths
from gear_loadtest.plan import LoadPlan
from gear_loadtest.report import Report

_WIDTH = 80


def render(report: Report) -> RenderableType:
    parts: list[RenderableType] = [_heading(report), _throughput(report)]
    if report.num_ok:
        parts += [_latency(report), Padding(_steady(report), (0, 1))]
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
