"""A load test from the first look at the server to its report.

Asks the server once, lets one process or several do the job, and has a report made of their log.
"""

from datetime import UTC, datetime
from time import perf_counter

from rich.console import Console

from gear_loadtest.job import Job, new_log, run_job
from gear_loadtest.lengths import parse_lengths
from gear_loadtest.plan import LoadPlan
from gear_loadtest.preflight import find_model, measure_vocabulary
from gear_loadtest.progress import live_progress
from gear_loadtest.report import Report, make_report
from gear_loadtest.rows import Row
from gear_loadtest.server_metrics import watched_server
from gear_loadtest.target import Target
from gear_loadtest.transport import open_session
from gear_loadtest.workers import run_in_workers
from gear_loadtest.workload import Workload


async def run_load_test(
    plan: LoadPlan,
    target: Target,
    console: Console,
    rows: list[Row] | None = None,
    max_bad: int | None = None,
) -> Report:
    """Cancelling it (Ctrl-C) while requests run ends the run and reports what was measured.

    `rows` are those of the trace or data set. Raises `ServerUnusable` before the first request.
    """
    rows = rows or []
    async with open_session(plan.timeout_s) as session:
        model = await find_model(session, target, plan.model)
        workload = Workload(
            parse_lengths("--input-len", plan.input_len),
            parse_lengths("--output-len", plan.output_len),
            await measure_vocabulary(session, target, model),
            plan.seed,
            plan.prefix_len,
            rows,
        )
        job = Job(plan, target, model, workload, max_bad)
        date = datetime.now(UTC)
        async with watched_server(session, plan.metrics_url or target.url("/metrics")) as server:
            if plan.workers > 1:
                log, interrupted = await run_in_workers(job, console)
            else:
                log = new_log(plan, perf_counter())
                async with live_progress(log.glance, plan, rows, console):
                    interrupted = await run_job(job, log, session)
            duration_s = perf_counter() - log.timeline.start
    return make_report(
        log, plan=plan, target=target, model=model, date=date, duration_s=duration_s, interrupted=interrupted,
        server=server,
    )  # fmt: skip
