"""Several runs at different rates: a sweep and its knee, or the highest rate that meets the objective.

Knows runs only by their reports.
"""

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from gear_loadtest.report import Report

RunAt = Callable[[float], Awaitable[Report]]
Tell = Callable[[Report], None]

_PRECISION = 1.05  # the search ends when the lowest rate that failed is within 5 % of the highest that did not
_MAX_RUNS = 20


@dataclass(frozen=True, slots=True)
class Sweep:
    runs: list[Report]  # by rising rate
    knee_rate: float | None  # where throughput over latency is greatest (Kleinrock's power); None: not within these
    max_rate: float | None  # the highest that met the objective, of a search
    interrupted: bool


async def sweep(run_at: RunAt, rates: Sequence[float], tell: Tell) -> Sweep:
    runs: list[Report] = []
    for rate in rates:
        runs.append(await run_at(rate))
        tell(runs[-1])
        if runs[-1].interrupted:
            break
    return _ended(runs, None)


async def find_max_rate(run_at: RunAt, first: float, tell: Tell) -> Sweep:
    """Double (or halve) the rate until one run meets the objective and another does not, then close in between.

    A run that the client itself held back says nothing of the server, so it counts as one that did not.
    """
    runs: list[Report] = []
    met, failed, rate = 0.0, math.inf, first
    while len(runs) < _MAX_RUNS and failed > met * _PRECISION:
        report = await run_at(rate)
        runs.append(report)
        tell(report)
        if report.interrupted:
            break
        if report.objective_met and report.client.invalid is None:
            met = max(met, rate)
        else:
            failed = min(failed, rate)
        rate = _next_rate(met, failed)
    return _ended(runs, met or None)


def _next_rate(met: float, failed: float) -> float:
    if math.isinf(failed):
        return met * 2
    return math.sqrt(met * failed) if met else failed / 2


def _ended(runs: list[Report], max_rate: float | None) -> Sweep:
    runs = sorted(runs, key=lambda run: run.command.rate or 0.0)
    return Sweep(runs, _knee(runs), max_rate, any(run.interrupted for run in runs))


def _knee(runs: list[Report]) -> float | None:
    power = {
        run.command.rate: run.request_throughput / run.e2e_s.mean
        for run in runs
        if run.e2e_s is not None and run.command.rate is not None and not run.interrupted
    }
    if len(power) < 3:
        return None
    best = max(power, key=lambda rate: power[rate])
    return best if best < max(power) else None  # still rising at the highest rate: the knee lies beyond
