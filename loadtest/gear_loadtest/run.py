"""A load test from the first look at the server to its report.

Arrival says when, transport says how, the log keeps what happened; this file only joins them.
"""

import asyncio
from collections.abc import Coroutine
from datetime import UTC, datetime
from time import perf_counter

from rich.console import Console

from gear_loadtest.arrival import Send, closed_loop, open_loop, poisson_offsets
from gear_loadtest.plan import LoadPlan
from gear_loadtest.preflight import count_words, find_model
from gear_loadtest.progress import live_progress
from gear_loadtest.prompts import PromptMaker
from gear_loadtest.record import RequestRecord
from gear_loadtest.report import Report, make_report
from gear_loadtest.run_log import RunLog
from gear_loadtest.target import Target
from gear_loadtest.timeline import Timeline
from gear_loadtest.transport import completion_body, open_session, stream_completion


async def run_load_test(plan: LoadPlan, target: Target, console: Console) -> Report:
    """Cancelling it (Ctrl-C) while requests run ends the run and reports what was measured.

    Raises `ServerUnusable` before the first request.
    """
    async with open_session(plan.timeout_s) as session:
        model = await find_model(session, target, plan.model)
        prompts = PromptMaker(await count_words(session, target, model, plan.input_len), plan.seed)
        log = RunLog(Timeline(perf_counter()))

        async def send(index: int, intended_at: float) -> None:
            record = RequestRecord(intended_at)
            body = completion_body(model, prompts.make(index), plan.output_len)
            log.running.add(record)
            try:
                await stream_completion(session, target.url("/v1/completions"), body, record)
                log.end(record)
            except asyncio.CancelledError:
                log.num_cancelled += 1
                raise
            finally:
                log.running.discard(record)

        date = datetime.now(UTC)
        async with live_progress(log, plan.num_requests, console), log.effort.watched():
            interrupted = await _until_interrupted(_arrivals(send, plan))
        duration_s = perf_counter() - log.timeline.start
    return make_report(
        log, plan=plan, target=target, model=model, date=date, duration_s=duration_s, interrupted=interrupted
    )


def _arrivals(send: Send, plan: LoadPlan) -> Coroutine[None, None, None]:
    indices = range(plan.num_requests)
    if plan.rate is not None:
        return open_loop(send, indices, poisson_offsets(plan.rate, plan.seed))
    assert plan.concurrency is not None
    return closed_loop(send, indices, plan.concurrency)


async def _until_interrupted(arrivals: Coroutine[None, None, None]) -> bool:
    """True if the run was cancelled: `asyncio.run` turns the first Ctrl-C into a cancellation of its main task."""
    try:
        await arrivals
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # it is answered here, by a report
        return True
    return False
