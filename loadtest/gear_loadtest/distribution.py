"""Any number of measurements in bounded memory: a histogram of buckets half a percent wide, and six numbers from it.

Knows nothing of what was measured.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

_LOG_WIDTH = math.log(1.005)  # a bucket's middle is within 0.25 % of every value in it
_SMALLEST = 1e-7  # what is shorter, chunks that came in one piece, counts as this
_QUANTILES = (0.5, 0.9, 0.95, 0.99)


def bucket_middle(index: int) -> float:
    return math.exp((index + 0.5) * _LOG_WIDTH)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles interpolate linearly between the two nearest measurements; all but mean and max to 0.25 %."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(slots=True)
class Histogram:
    """Of values of 0 or more. Bucket i counts those in [1.005^i, 1.005^(i+1)): a second to an hour is 1642 buckets."""

    num: int = 0
    total: float = 0.0
    min: float = math.inf
    max: float = 0.0
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, value: float) -> None:
        index = math.floor(math.log(max(value, _SMALLEST)) / _LOG_WIDTH)
        self.buckets[index] = self.buckets.get(index, 0) + 1
        self._cover(1, value, value, value)

    def add_many(self, values: ArrayLike) -> None:
        array = np.asarray(values, dtype=np.float64)
        if not array.size:
            return
        indices = np.floor(np.log(np.maximum(array, _SMALLEST)) / _LOG_WIDTH).astype(np.int64)
        for index, count in zip(*(found.tolist() for found in np.unique(indices, return_counts=True)), strict=True):
            self.buckets[index] = self.buckets.get(index, 0) + count
        self._cover(array.size, float(array.sum()), float(array.min()), float(array.max()))

    def merge(self, other: "Histogram") -> None:
        for index, count in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + count
        self._cover(other.num, other.total, other.min, other.max)

    def _cover(self, num: int, total: float, smallest: float, largest: float) -> None:
        self.num += num
        self.total += total
        self.min = min(self.min, smallest)
        self.max = max(self.max, largest)

    def quantiles(self, wanted: tuple[float, ...]) -> list[float]:
        """Of at least one measurement."""
        indices = np.array(sorted(self.buckets), dtype=np.int64)
        last_ranks = np.cumsum([self.buckets[index] for index in indices.tolist()]) - 1
        middles = np.clip(np.exp((indices + 0.5) * _LOG_WIDTH), self.min, self.max)
        ranks = np.asarray(wanted) * (self.num - 1)
        below, above = (middles[np.searchsorted(last_ranks, part)] for part in (np.floor(ranks), np.ceil(ranks)))
        below, above = (
            np.where(np.floor(ranks) == 0, self.min, below),
            np.where(np.ceil(ranks) == self.num - 1, self.max, above),
        )
        values: list[float] = (below + (above - below) * (ranks - np.floor(ranks))).tolist()
        return values

    def cumulative(self) -> tuple[list[float], list[float]]:
        """Values and the share of measurements at or below each: the points of a plot."""
        indices = sorted(self.buckets)
        shares = np.cumsum([self.buckets[index] for index in indices]) / max(1, self.num)
        return [min(self.max, math.exp((index + 1) * _LOG_WIDTH)) for index in indices], shares.tolist()

    def distribution(self) -> Distribution | None:
        """`None` when nothing was measured."""
        if not self.num:
            return None
        p50, p90, p95, p99 = self.quantiles(_QUANTILES)
        return Distribution(self.total / self.num, p50, p90, p95, p99, self.max)

    def encode(self) -> dict[str, float | str] | None:
        """For JSON: the buckets in one line, `index*count`."""
        if not self.num:
            return None
        buckets = " ".join(f"{index}*{count}" for index, count in sorted(self.buckets.items()))
        return {"num": self.num, "total": self.total, "min": self.min, "max": self.max, "buckets": buckets}

    @classmethod
    def decode(cls, encoded: dict[str, float | str] | None) -> "Histogram":
        """Raises `KeyError` or `ValueError` for what `encode` did not write."""
        if encoded is None:
            return cls()
        pairs = (pair.split("*") for pair in str(encoded["buckets"]).split())
        return cls(
            int(encoded["num"]), float(encoded["total"]), float(encoded["min"]), float(encoded["max"]),
            {int(index): int(count) for index, count in pairs},
        )  # fmt: skip
