"""When requests start: on a schedule (open loop), or when another has ended (closed loop).

Knows nothing of what a request is; `send(index, intended_at)` runs one to its end and raises nothing.
"""

import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from gear_loadtest.errors import UsageError

Send = Callable[[int, float], Coroutine[None, None, None]]


@dataclass(frozen=True, slots=True)
class Pattern:
    """How the gaps between arrivals spread around 1/rate. Burstiness grows as `shape` falls: 1 is Poisson."""

    shape: float = 1.0  # of a gamma distribution; its coefficient of variation is 1/√shape; ∞: equal gaps
    ramp_from: float | None = None  # requests/s at the start, when the rate rises to the one asked for

    def gap(self, draws: random.Random) -> float:
        """With a mean of 1."""
        return 1.0 if math.isinf(self.shape) else draws.gammavariate(self.shape, 1 / self.shape)


def parse_pattern(text: str) -> Pattern:
    """`poisson`, `constant`, `gamma:SHAPE` or `ramp:FROM`. Raises `UsageError`."""
    name, _, value = text.partition(":")
    try:
        if text == "poisson":
            return Pattern()
        if text == "constant":
            return Pattern(shape=math.inf)
        number = float(value)
        if math.isfinite(number) and number > 0 and name in ("gamma", "ramp"):
            return Pattern(shape=number) if name == "gamma" else Pattern(ramp_from=number)
    except ValueError:
        pass
    raise UsageError(
        f"cannot read --arrivals {text!r}: give poisson, constant, gamma:0.25 (bursts) or ramp:1 (from 1/s to --rate)"
    )


def offsets(pattern: Pattern, rate: float, seed: int, ramp_s: float = 0.0) -> Iterator[float]:
    """Seconds since the start of each arrival, without end; the first is at 0. A ramp takes `ramp_s`, then stays."""
    draws = random.Random(seed)
    load = 0.0  # arrivals expected so far: the integral of the rate
    while True:
        yield load / rate if pattern.ramp_from is None else _ramp_time(load, pattern.ramp_from, rate, ramp_s)
        load += pattern.gap(draws)


def _ramp_time(load: float, first: float, last: float, ramp_s: float) -> float:
    """When a rate that rises evenly from `first` to `last` over `ramp_s`, and stays there, has brought `load`.

    Solves first·t + (last − first)/(2·ramp_s)·t² = load, in the form that is stable for a slope of 0.
    """
    whole = (first + last) / 2 * ramp_s
    if load > whole:
        return ramp_s + (load - whole) / last
    slope = (last - first) / ramp_s
    return 2 * load / (first + math.sqrt(max(0.0, first * first + 2 * slope * load))) if load else 0.0


async def open_loop(send: Send, arrivals: Iterable[tuple[int, float]], start: float) -> None:
    """Start every request at its time (seconds after `start`), however many are still running.

    `intended_at` is the time on the schedule: when this machine wakes late, the delay is measured, not forgiven.
    """
    async with asyncio.TaskGroup() as requests:
        for index, offset_s in arrivals:
            intended_at = start + offset_s
            await asyncio.sleep(max(0.0, intended_at - perf_counter()))  # even when late: others must run too
            requests.create_task(send(index, intended_at))


async def closed_loop(send: Send, indices: Iterable[int], concurrency: int, until: float = math.inf) -> None:
    """Keep `concurrency` requests running, each intended for the moment it can be sent; none starts after `until`."""
    remaining = iter(indices)  # shared: every worker takes the next

    async def work() -> None:
        for index in remaining:
            now = perf_counter()
            if now >= until:
                return
            await send(index, now)

    async with asyncio.TaskGroup() as workers:
        for _ in range(concurrency):
            workers.create_task(work())
