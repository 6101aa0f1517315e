"""One run or several, and everything that is printed and written of them.

Returns the command's exit status.
"""

import dataclasses

import orjson
from rich.console import Console

from gear_loadtest.csv_report import to_csv
from gear_loadtest.output_files import OutputFiles, write
from gear_loadtest.plan import LoadPlan
from gear_loadtest.report import Report
from gear_loadtest.rows import Row
from gear_loadtest.run import run_load_test
from gear_loadtest.search import Sweep, find_max_rate, sweep
from gear_loadtest.slo import parse_objective
from gear_loadtest.table import render, render_runs, render_sweep
from gear_loadtest.target import Target

_JSON_OPTIONS = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE


async def run_once(plan: LoadPlan, target: Target, rows: list[Row], *, files: OutputFiles, screen: Console) -> int:
    report = await run_load_test(plan, target, screen, rows)
    Console().print(render(report))
    _write_all(report, files)
    if report.num_errors or report.objective_met is False:
        return 1
    return 3 if report.client.invalid else 0


async def run_campaign(
    plan: LoadPlan,
    target: Target,
    rows: list[Row],
    rates: list[float],
    *,
    find_max: bool,
    files: OutputFiles,
    screen: Console,
) -> int:
    """Ctrl-C ends it with what was measured."""
    num_runs = 0

    async def run_at(rate: float) -> Report:
        nonlocal num_runs
        num_runs += 1  # other prompts each time: the server may have cached the last run's
        at_rate = dataclasses.replace(plan.at_rate(rate), seed=plan.seed + num_runs)
        return await run_load_test(at_rate, target, screen, rows, max_bad=_max_bad(at_rate) if find_max else None)

    def tell(report: Report) -> None:
        screen.print(render_runs([report]))

    result = await (find_max_rate(run_at, rates[0], tell) if find_max else sweep(run_at, rates, tell))
    Console().print(render_sweep(result))
    _write_all(result, files)
    return _status(result, find_max=find_max)


def _write_all(outcome: Report | Sweep, files: OutputFiles) -> None:
    runs = outcome.runs if isinstance(outcome, Sweep) else [outcome]
    write(files.json, lambda: orjson.dumps(outcome, default=str, option=_JSON_OPTIONS))
    write(files.csv, lambda: to_csv(runs).encode())
    if files.html is None and files.png is None:
        return
    from gear_loadtest.html_report import run_page, sweep_page  # matplotlib takes a second
    from gear_loadtest.plots import png

    page = (lambda: sweep_page(outcome)) if isinstance(outcome, Sweep) else (lambda: run_page(outcome))
    write(files.html, lambda: page().encode())
    write(files.png, lambda: png(outcome))


def _max_bad(plan: LoadPlan) -> int | None:
    """A run that can no longer meet the objective is not worth its time."""
    num, objective = plan.num_expected(0), parse_objective(plan.slo or "")
    return None if num is None else objective.max_bad(num) + 1  # arrivals are random: there may be a few more


def _status(result: Sweep, *, find_max: bool) -> int:
    if find_max:
        return 0 if result.max_rate is not None else 1
    if any(run.num_errors for run in result.runs):
        return 1
    return 3 if any(run.client.invalid for run in result.runs) else 0
