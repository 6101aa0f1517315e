"""When requests start: on a schedule (open loop), or when another has ended (closed loop).

Knows nothing of what a request is; `send(index, intended_at)` runs one to its end and raises nothing.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from time import perf_counter

Send = Callable[[int, float], Coroutine[None, None, None]]


def poisson_offsets(rate: float, seed: int) -> Iterator[float]:
    """Seconds since the start of each arrival of a Poisson process, without end; the first is at 0."""
    gaps = random.Random(seed)
    offset_s = 0.0
    while True:
        yield offset_s
        offset_s += gaps.expovariate(rate)


async def open_loop(send: Send, indices: Iterable[int], offsets_s: Iterable[float]) -> None:
    """Start every request at its time, however many are still running.

    `intended_at` is the time on the schedule: when this machine wakes late, the delay is measured, not forgiven.
    """
    start = perf_counter()
    async with asyncio.TaskGroup() as requests:
        for index, offset_s in zip(indices, offsets_s, strict=False):  # the offsets have no end
            intended_at = start + offset_s
            await asyncio.sleep(max(0.0, intended_at - perf_counter()))  # even when late: others must run too
            requests.create_task(send(index, intended_at))


async def closed_loop(send: Send, indices: Iterable[int], concurrency: int) -> None:
    """Keep `concurrency` requests running; each is intended for the moment it can be sent."""
    remaining = iter(indices)  # shared: every worker takes the next

    async def work() -> None:
        for index in remaining:
            await send(index, perf_counter())

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work())
