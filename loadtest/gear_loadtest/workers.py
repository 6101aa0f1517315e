"""A run spread over processes, for more load than one core can send: each takes every n-th arrival.

All share one clock (`perf_counter` is the machine's, not the process's) and start together; their logs are merged into
one, as if one process had made it.
"""

import asyncio
import contextlib
import functools
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import perf_counter
from typing import Any

from rich.console import Console

from gear_loadtest.errors import LoadTestError
from gear_loadtest.job import Job, new_log, run_job
from gear_loadtest.progress import live_progress
from gear_loadtest.run_log import Glance, RunLog
from gear_loadtest.transport import open_session

_START_DELAY_S = 0.1  # for the word to reach all
_GLANCE_S = 0.25


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    glance: Glance | None = None

    async def receive(self) -> Any:
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.connection.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self.connection.fileno())
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            raise LoadTestError("a worker died: lower --workers, or look for want of memory") from None

    async def follow(self) -> tuple[RunLog, bool]:
        while isinstance(message := await self.receive(), Glance):
            self.glance = message
        log, interrupted = message
        return log, interrupted


async def run_in_workers(job: Job, console: Console) -> tuple[RunLog, bool]:
    """The log of all, and whether they were interrupted: cancelling this stops the workers, which report none the less.

    Raises `LoadTestError` if one dies.
    """
    with _processes(job) as workers:
        await asyncio.gather(*(worker.receive() for worker in workers))  # they are ready
        start = perf_counter() + _START_DELAY_S
        for worker in workers:
            worker.connection.send(start)
        async with live_progress(functools.partial(_look, workers), job.plan, job.workload.rows, console):
            outcomes = await _outcomes(workers)
    log = new_log(job.plan, start)
    for other, _ in outcomes:
        log.merge(other)
    return log, any(interrupted for _, interrupted in outcomes)


async def _outcomes(workers: list[_Worker]) -> list[tuple[RunLog, bool]]:
    following = asyncio.gather(*(worker.follow() for worker in workers))
    try:
        return await asyncio.shield(following)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # it is answered by a report
        for worker in workers:
            worker.process.terminate()
        return await following


def _look(workers: list[_Worker]) -> Glance:
    glances = [worker.glance for worker in workers if worker.glance is not None]
    return functools.reduce(Glance.plus, glances, Glance.nothing())


@contextmanager
def _processes(job: Job) -> Iterator[list[_Worker]]:
    context = multiprocessing.get_context("spawn")
    workers = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; this one tells the others
    try:
        for number in range(job.plan.workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(replace(job, worker=number), theirs), daemon=True)
            process.start()
            theirs.close()  # so that its death is seen
            workers.append(_Worker(process, ours))
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()  # it has said all it had to
            worker.process.join()


def _main(job: Job, connection: Connection) -> None:
    asyncio.run(_work(job, connection))


async def _work(job: Job, connection: Connection) -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with open_session(job.plan.timeout_s) as session:
        connection.send("ready")
        log = new_log(job.plan, await asyncio.to_thread(connection.recv))
        glancing = asyncio.create_task(_send_glances(log, connection))
        interrupted = await run_job(job, log, session)
        glancing.cancel()
        log.running.clear()
        with contextlib.suppress(BrokenPipeError):
            connection.send((log, interrupted))


async def _send_glances(log: RunLog, connection: Connection) -> None:
    while True:
        await asyncio.sleep(_GLANCE_S)
        connection.send(log.glance())
