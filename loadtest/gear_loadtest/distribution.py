"""Many measurements in six numbers.

Knows nothing of what was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Distribution:
    """Percentiles interpolate linearly between the two nearest measurements."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def distribution(measured: Sequence[float]) -> Distribution | None:
    """`None` when nothing was measured. Reads an `array('d')` without copying it."""
    if not measured:
        return None
    values = np.asarray(measured, dtype=np.float64)
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99]).tolist()
    return Distribution(float(values.mean()), p50, p90, p95, p99, float(values.max()))
