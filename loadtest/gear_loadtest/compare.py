"""Two reports, B over A: ratios of their figures with 95 % confidence intervals.

Requests of one run are not independent, since a queue remembers: so the bootstrap draws whole slices of time, not
requests. A slice must be longer than what a server remembers; a run in a few slices says too little and is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from gear_loadtest.distribution import Histogram, bucket_middle
from gear_loadtest.errors import UsageError
from gear_loadtest.timeline import Tally

_NUM_DRAWS = 400
_MIN_SLICES = 8
_SEED = 1

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ratio:
    name: str
    a: float
    b: float
    ratio: float
    low: float
    high: float
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        if self.low <= 1 <= self.high:
            return "undecided"
        return "better" if (self.ratio > 1) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class Run:
    name: str
    command: dict[str, Any]
    invalid: str | None
    width_s: float
    slices: list[Tally]


Figure = Callable[[Run, Array], Array]  # one value for each row of weights


def read_run(path: Path) -> Run:
    """Raises `UsageError`."""
    try:
        report = orjson.loads(path.read_bytes())
        slices = [Tally.decode(encoded) for encoded in report["slices"]]
        run = Run(path.name, report["command"], report["client"]["invalid"], report["slice_width_s"], slices)
    except OSError as error:
        raise UsageError(f"cannot read --compare {path} ({error.strerror}): name a file that --json wrote") from None
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UsageError(f"--compare {path} is not a report of one run: name a file that --json wrote") from None
    if len(slices) < _MIN_SLICES:
        raise UsageError(f"--compare {path} is too short a run for confidence intervals: measure for longer")
    return run


def compare(a: Run, b: Run) -> list[Ratio]:
    draws = np.random.default_rng(_SEED)
    weights = [_draw_weights(len(run.slices), draws) for run in (a, b)]
    ratios = []
    for name, figure, higher_is_better in _FIGURES:
        one, other = (figure(run, drawn) for run, drawn in zip((a, b), weights, strict=True))
        known = (one > 0) & (other > 0)
        if not known[0]:
            continue  # neither had a second token, say
        values = other[known] / one[known]
        low, high = np.percentile(values[1:], [2.5, 97.5]).tolist() if len(values) > 1 else (0.0, float("inf"))
        ratios.append(Ratio(name, float(one[0]), float(other[0]), float(values[0]), low, high, higher_is_better))
    return ratios


def _draw_weights(num_slices: int, draws: np.random.Generator) -> Array:
    """How often each slice is drawn: [1 + draws, slices], the first row once each. Neighbours go together in pairs."""
    num_pairs = (num_slices + 1) // 2
    pairs = draws.multinomial(num_pairs, [1 / num_pairs] * num_pairs, size=_NUM_DRAWS)
    return np.vstack([np.ones(num_slices), np.repeat(pairs, 2, axis=1)[:, :num_slices]])


def _per_second(read: Callable[[Tally], float]) -> Figure:
    def figure(run: Run, weights: Array) -> Array:
        rates: Array = weights @ np.array([read(tally) for tally in run.slices]) / (weights.sum(axis=1) * run.width_s)
        return rates

    return figure


def _quantile(read: Callable[[Tally], Histogram], share: float) -> Figure:
    """0 where nothing was drawn."""

    def figure(run: Run, weights: Array) -> Array:
        histograms = [read(tally) for tally in run.slices]
        indices = sorted({index for histogram in histograms for index in histogram.buckets})
        if not indices:
            return np.zeros(len(weights))
        counts = np.array([[histogram.buckets.get(index, 0) for index in indices] for histogram in histograms])
        cumulative = np.cumsum(weights @ counts, axis=1)
        places = (cumulative < np.maximum(1, share * cumulative[:, -1:])).sum(axis=1)
        middles = np.append([bucket_middle(index) for index in indices], 0.0)
        return np.asarray(middles[places])

    return figure


_FIGURES: tuple[tuple[str, Figure, bool], ...] = (
    ("requests/s", _per_second(lambda tally: tally.num_finished), True),
    ("output tokens/s", _per_second(lambda tally: tally.output_tokens), True),
    ("good requests/s", _per_second(lambda tally: tally.num_good), True),
    ("TTFT p50", _quantile(lambda tally: tally.ttft_s, 0.5), False),
    ("TTFT p99", _quantile(lambda tally: tally.ttft_s, 0.99), False),
    ("ITL p50", _quantile(lambda tally: tally.itl_s, 0.5), False),
    ("ITL p99", _quantile(lambda tally: tally.itl_s, 0.99), False),
    ("TPOT p50", _quantile(lambda tally: tally.tpot_s, 0.5), False),
    ("E2E p50", _quantile(lambda tally: tally.e2e_s, 0.5), False),
    ("E2E p99", _quantile(lambda tally: tally.e2e_s, 0.99), False),
)


def differences(a: Run, b: Run) -> list[str]:
    """What else differs between the runs, so that a ratio is not laid at the wrong door."""
    skip = {"seed", "model", "metrics_url"}
    changed = [
        f"{name}: {a.command.get(name)} and {b.command.get(name)}"
        for name in a.command
        if name not in skip and a.command.get(name) != b.command.get(name)
    ]
    return changed + [f"{run.name} is INVALID: {run.invalid}" for run in (a, b) if run.invalid]
