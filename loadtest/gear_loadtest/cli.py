"""The command `gear-loadtest`: options in, table and JSON out, and an exit status that a script can trust.

Exit status: 0 all requests succeeded, 1 some failed or the server is unusable, 2 the command line is wrong,
3 the load tester itself was the bottleneck, so the figures are not the server's.
"""

import asyncio
import random
import resource
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from gear_loadtest.errors import LoadTestError, UsageError
from gear_loadtest.output_files import OutputFiles
from gear_loadtest.plan import LoadPlan, read_plan_rows, refuse_flood, resolve, search_rates
from gear_loadtest.target import parse_target

_MAX_OPEN_FILES = 65536
_LOAD, _REQUEST, _SEARCH, _OUTPUT = "Load", "Request", "Objective and comparison", "Output"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(no_args_is_help=True)
def load_test(
    url: Annotated[
        str | None,
        Argument(help="Base URL, such as http://127.0.0.1:8000.", metavar="URL", show_default=False),
    ] = None,
    rate: Annotated[
        float | None,
        Option(help="Open loop: requests per second, whatever the server does.", metavar="R", rich_help_panel=_LOAD),
    ] = None,
    arrivals: Annotated[
        str,
        Option(
            help="Around --rate: poisson, constant, gamma:SHAPE (bursts below 1) or ramp:FROM (rising from FROM/s).",
            metavar="KIND",
            rich_help_panel=_LOAD,
        ),
    ] = "poisson",
    concurrency: Annotated[
        int | None,
        Option(
            min=1,
            help="Closed loop: requests kept running; 1 unless --rate is given.",
            metavar="N",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        Option(
            help="Replay the times and lengths of a CSV or JSONL file.",
            metavar="FILE",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    num_requests: Annotated[
        int | None,
        Option(
            min=1,
            help="Requests in all; 100 unless --duration-s is given.",
            metavar="N",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    duration_s: Annotated[
        float | None,
        Option(help="Seconds in which requests start.", metavar="S", rich_help_panel=_LOAD, show_default=False),
    ] = None,
    warmup_s: Annotated[
        float, Option(help="Seconds at the start that are not measured.", metavar="S", rich_help_panel=_LOAD)
    ] = 0.0,
    seed: Annotated[
        int | None,
        Option(
            help="Of arrival times and prompts. Drawn anew each time: a server may have cached the last run's prompts.",
            metavar="N",
            rich_help_panel=_LOAD,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        Option(
            help="Model to ask for: the first that the server lists, unless named.",
            metavar="NAME",
            rich_help_panel=_REQUEST,
            show_default=False,
        ),
    ] = None,
    input_len: Annotated[
        str,
        Option(
            help="Tokens in a prompt, about: 512, uniform:100-900 or lognormal:512,0.8 (median, sigma).",
            metavar="N",
            rich_help_panel=_REQUEST,
        ),
    ] = "512",
    output_len: Annotated[
        str, Option(help="Tokens in an answer, written likewise.", metavar="N", rich_help_panel=_REQUEST)
    ] = "128",
    dataset: Annotated[
        Path | None,
        Option(
            help="Prompts, or only lengths, from a CSV or JSONL file.",
            metavar="FILE",
            rich_help_panel=_REQUEST,
            show_default=False,
        ),
    ] = None,
    prefix_len: Annotated[
        int,
        Option(min=0, help="Tokens with which all prompts begin alike.", metavar="N", rich_help_panel=_REQUEST),
    ] = 0,
    turns: Annotated[
        int,
        Option(
            min=1,
            help="Requests of a conversation: each holds what was said before. An arrival is a conversation.",
            metavar="N",
            rich_help_panel=_REQUEST,
        ),
    ] = 1,
    timeout_s: Annotated[
        float,
        Option(help="Seconds that one request may take.", metavar="S", rich_help_panel=_REQUEST),
    ] = 600.0,
    slo: Annotated[
        str | None,
        Option(
            help="Objective, such as ttft=500ms,itl=50ms,p=99: adds goodput; failed requests miss it.",
            metavar="LIMITS",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    find_max: Annotated[
        bool,
        Option(
            "--find-max-rate", help="Search the highest rate that meets --slo, from --rate on.", rich_help_panel=_SEARCH
        ),
    ] = False,
    sweep_rates: Annotated[
        str | None,
        Option(
            "--sweep",
            help="Run at several rates, such as 1,2,4,8, for 30 s each unless --duration-s is given.",
            metavar="RATES",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    compare_paths: Annotated[
        tuple[Path, Path] | None,
        Option(
            "--compare",
            help="Measure nothing: ratios of two --json reports, with confidence intervals.",
            metavar="A B",
            rich_help_panel=_SEARCH,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int,
        Option(
            min=1,
            max=256,
            help="Processes that send: more where one says INVALID for want of CPU.",
            metavar="N",
            rich_help_panel=_LOAD,
        ),
    ] = 1,
    json_path: Annotated[
        Path | None,
        Option(
            "--json",
            help="Write everything that was measured.",
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    csv_path: Annotated[
        Path | None,
        Option(
            "--csv",
            help="Write a row of figures for each run.",
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    html_path: Annotated[
        Path | None,
        Option(
            "--html",
            help="Write a page with tables and plots, complete in itself.",
            metavar="FILE",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    png_path: Annotated[
        Path | None,
        Option("--png", help="Write the plots.", metavar="FILE", rich_help_panel=_OUTPUT, show_default=False),
    ] = None,
    metrics_url: Annotated[
        str | None,
        Option(
            help="Where the server's metrics are, if not at URL/metrics (gear-serve --metrics-port).",
            metavar="URL",
            rich_help_panel="Other",
            show_default=False,
        ),
    ] = None,
    own_target: Annotated[
        bool,
        Option("--i-own-this-target", help="Allow heavy load on another machine.", rich_help_panel="Other"),
    ] = False,
) -> None:
    """Measure throughput and latency of an OpenAI-compatible server.

    Sends random prompts to /v1/completions as streams. An API key is taken from GEAR_API_KEY or OPENAI_API_KEY.
    Ctrl-C ends the run early and reports what was measured.
    """
    try:
        if compare_paths is not None:
            _compare(*compare_paths)
            return
        if url is None:
            raise UsageError("no URL is given: name the server, such as http://127.0.0.1:8000")
        plan = LoadPlan(
            model=model,
            rate=rate,
            concurrency=concurrency,
            trace=trace,
            arrivals=arrivals,
            num_requests=num_requests,
            duration_s=duration_s,
            warmup_s=warmup_s,
            input_len=input_len,
            output_len=output_len,
            dataset=dataset,
            prefix_len=prefix_len,
            turns=turns,
            slo=slo,
            seed=seed if seed is not None else random.randrange(2**31),
            timeout_s=timeout_s,
            workers=workers,
            metrics_url=metrics_url,
        )
        files = OutputFiles(json=json_path, csv=csv_path, html=html_path, png=png_path)
        rates = search_rates(plan, sweep_rates, find_max=find_max)
        status = _measure(url, plan, rates, find_max, files, own_target)
    except LoadTestError as error:
        print(f"gear-loadtest: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_status) from None
    raise typer.Exit(status)


def _compare(a_path: Path, b_path: Path) -> None:
    from rich.console import Console

    from gear_loadtest.compare import compare, read_run
    from gear_loadtest.table import render_comparison

    a, b = read_run(a_path), read_run(b_path)
    Console().print(render_comparison(a, b, compare(a, b)))


def _measure(url: str, plan: LoadPlan, rates: list[float], find_max: bool, files: OutputFiles, own_target: bool) -> int:
    """The exit status. `rates`: of a sweep, the first of a search, or none for a single run."""
    target = parse_target(url)
    plan = plan.at_rate(rates[-1]) if rates else resolve(plan)
    rows = read_plan_rows(plan)
    refuse_flood(plan, target, rows, own_target=own_target, searches=find_max)
    files.check()
    _allow_many_connections()

    from rich.console import Console  # these cost more than --help may

    from gear_loadtest.campaign import run_campaign, run_once

    screen = Console(stderr=True)
    if rates:
        return asyncio.run(run_campaign(plan, target, rows, rates, find_max=find_max, files=files, screen=screen))
    return asyncio.run(run_once(plan, target, rows, files=files, screen=screen))


def _allow_many_connections() -> None:
    """Each request in flight holds a connection, and the usual soft limit is 1024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
