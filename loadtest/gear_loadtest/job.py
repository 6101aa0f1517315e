"""What one process does in a run: its arrivals, one request after another, and a log of what came of them.

Knows nothing of other processes, nor of what is reported.
"""

import asyncio
import itertools
import math
from collections.abc import Coroutine
from dataclasses import dataclass
from time import perf_counter

import aiohttp

from gear_loadtest.arrival import Send, closed_loop, open_loop
from gear_loadtest.plan import LoadPlan
from gear_loadtest.record import RequestRecord
from gear_loadtest.run_log import RunLog
from gear_loadtest.slo import parse_objective
from gear_loadtest.target import Target
from gear_loadtest.timeline import Timeline
from gear_loadtest.transport import completion_body, stream_completion
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
