"""How many tokens a prompt or an answer has: one number, or drawn anew for every request.

Knows no tokenizer.
"""

import math
import random
import re
from dataclasses import dataclass

from gear_loadtest.errors import UsageError

_NUMBER = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Fixed (`low == high`), uniform between both, or log-normal around the median `low` if `sigma` is set."""

    low: int
    high: int
    sigma: float | None = None

    def draw(self, draws: random.Random) -> int:
        if self.sigma is not None:
            return max(1, round(self.low * math.exp(draws.gauss(0.0, self.sigma))))
        return draws.randint(self.low, self.high)

    @property
    def mean(self) -> float:
        return (self.low + self.high) / 2 if self.sigma is None else self.low * math.exp(self.sigma**2 / 2)


def parse_lengths(option: str, text: str) -> Lengths:
    """`512`, `uniform:100-900` or `lognormal:512,0.8` (median, sigma). Raises `UsageError`."""
    if match := re.fullmatch(r"(\d+)", text):
        found = Lengths(int(match[1]), int(match[1]))
    elif match := re.fullmatch(r"uniform:(\d+)-(\d+)", text):
        found = Lengths(int(match[1]), int(match[2]))
    elif match := re.fullmatch(rf"lognormal:(\d+),{_NUMBER}", text):
        found = Lengths(int(match[1]), int(match[1]), float(match[2]))
    else:
        found = Lengths(0, 0)
    if not 1 <= found.low <= found.high or (found.sigma or 0.0) > 3:
        raise UsageError(
            f"cannot read {option} {text!r}: give tokens as 512, uniform:100-900 or lognormal:512,0.8 (median, sigma)"
        )
    return found
