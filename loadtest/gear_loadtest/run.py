"""A load test from the first look at the server to its report.

Arrival says when, workload says what, transport says how, the log keeps what happened; this file only joins them.
"""

import asyncio
import itertools
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter

import aiohttp
from rich.console import Console

from gear_loadtest.arrival import Send, closed_loop, open_loop
from gear_loadtest.lengths import parse_lengths
from gear_loadtest.plan import LoadPlan
from gear_loadtest.preflight import find_model, measure_vocabulary
from gear_loadtest.progress import live_progress
from gear_loadtest.record import RequestRecord
from gear_loadtest.report import Report, make_report
from gear_loadtest.rows import Row
from gear_loadtest.run_log import RunLog
from gear_loadtest.server_metrics import watched_server
from gear_loadtest.slo import parse_objective
from gear_loadtest.target import Target
from gear_loadtest.timeline import Timeline
from gear_loadtest.transport import completion_body, open_session, stream_completion
from gear_loadtest.workload import Workload


class ObjectiveLost(Exception):
    """More requests were bad than the objective allows: what is still to come cannot change that."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one worker runs: every `plan.workers`-th arrival, beginning with `worker`."""

    plan: LoadPlan
    target: Target
    model: str
    workload: Workload
    max_bad: int | None  # stop once more requests are bad
    worker: int = 0


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
        async with watched_server(session, target) as server:
            log = new_log(plan, perf_counter())
            async with live_progress(log.glance, plan, rows, console):
                interrupted = await run_job(job, log, session)
            duration_s = perf_counter() - log.timeline.start
    return make_report(
        log, plan=plan, target=target, model=model, date=date, duration_s=duration_s, interrupted=interrupted,
        server=server,
    )  # fmt: skip


def new_log(plan: LoadPlan, start: float) -> RunLog:
    log = RunLog(Timeline(start + plan.warmup_s))
    if plan.slo is not None:
        log.is_good = parse_objective(plan.slo).is_good
    return log


async def run_job(job: Job, log: RunLog, session: aiohttp.ClientSession) -> bool:
    """Fill the log; true if it was cancelled."""

    async def send(index: int, intended_at: float) -> None:
        history = ""
        for turn in range(job.plan.turns):
            ask = job.workload.ask(index * job.plan.turns + turn, history)
            record = RequestRecord(intended_at, text=[] if job.plan.turns > 1 else None)
            await _request(job, log, session, record, completion_body(job.model, ask.prompt, ask.output_len))
            if record.failure is not None:
                return  # the conversation has lost its answer
            history = ask.prompt + "".join(record.text or ())
            intended_at = perf_counter()

    async with log.effort.watched():
        return await _until_interrupted(_arrivals(job, send, log.timeline.start - job.plan.warmup_s))


async def _request(job: Job, log: RunLog, session: aiohttp.ClientSession, record: RequestRecord, body: bytes) -> None:
    log.running.add(record)
    try:
        await stream_completion(session, job.target.url("/v1/completions"), body, record)
        log.end(record)
    except asyncio.CancelledError:
        log.num_cancelled += 1
        raise
    finally:
        log.running.discard(record)
    if job.max_bad is not None and log.num_bad > job.max_bad:
        raise ObjectiveLost


def _arrivals(job: Job, send: Send, start: float) -> Coroutine[None, None, None]:
    plan, rows = job.plan, job.workload.rows
    schedule = plan.schedule(rows)
    if schedule is not None:
        return open_loop(send, itertools.islice(schedule, job.worker, None, plan.workers), start)
    assert plan.concurrency is not None
    num = plan.num_arrivals(len(rows))
    indices = itertools.count() if math.isinf(num) else range(int(num))
    concurrency = len(range(job.worker, plan.concurrency, plan.workers))
    until = start + (plan.duration_s or math.inf)
    return closed_loop(send, itertools.islice(indices, job.worker, None, plan.workers), concurrency, until)


async def _until_interrupted(arrivals: Coroutine[None, None, None]) -> bool:
    """True if the run was cancelled: `asyncio.run` turns the first Ctrl-C into a cancellation of its main task."""
    try:
        await _until_lost(arrivals)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # it is answered here, by a report
        return True
    return False


async def _until_lost(arrivals: Coroutine[None, None, None]) -> None:
    try:
        await arrivals
    except* ObjectiveLost:
        pass
