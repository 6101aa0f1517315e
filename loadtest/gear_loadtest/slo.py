"""A service level objective, such as `ttft=500ms,itl=50ms,p=99`: what a good request is, and how many must be good.

A request is good if it succeeded, kept every limit, and at least p % of its own gaps kept `itl`. The objective is met
if at least p % of all requests are good: errors and time-outs count against it.
"""

import math
import re
from dataclasses import dataclass

from gear_loadtest.errors import UsageError
from gear_loadtest.record import RequestRecord

_EXAMPLE = "write it like ttft=500ms,itl=50ms,p=99 (limits for ttft, itl, tpot and e2e, in ms or s)"
_UNITS_S = {"ms": 0.001, "s": 1.0}
_FIELDS = {"ttft": "ttft_s", "itl": "itl_s", "tpot": "tpot_s", "e2e": "e2e_s", "p": "percent"}


@dataclass(frozen=True, slots=True)
class Objective:
    text: str
    ttft_s: float = math.inf
    itl_s: float = math.inf
    tpot_s: float = math.inf
    e2e_s: float = math.inf
    percent: float = 99.0

    def is_good(self, record: RequestRecord) -> bool:
        """Of a request that succeeded. What it did not produce (no second token: no TPOT) breaks no limit."""
        return (
            (record.ttft_s or 0.0) <= self.ttft_s
            and (record.tpot_s or 0.0) <= self.tpot_s
            and record.e2e_s <= self.e2e_s
            and self._keeps_itl(record)
        )

    def _keeps_itl(self, record: RequestRecord) -> bool:
        if math.isinf(self.itl_s) or record.num_chunks < 2:
            return True
        num_slow = sum(gap > self.itl_s for gap in record.itls_s)
        return num_slow <= self.max_bad(record.num_chunks - 1)

    def max_bad(self, num: int) -> int:
        """So many of `num` may break a limit; the small term is for what floating point makes of 1 − 0.99."""
        return math.floor(num * (100 - self.percent) / 100 + 1e-9)

    def is_met(self, num_good: int, num_requests: int) -> bool:
        return num_requests > 0 and num_requests - num_good <= self.max_bad(num_requests)


def parse_objective(text: str) -> Objective:
    """Raises `UsageError`."""
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            values[_FIELDS[name]] = float(value) if name == "p" else _seconds(value)
        except (KeyError, ValueError):
            raise UsageError(f"cannot read {part!r} in --slo {text!r}: {_EXAMPLE}") from None
    if not values.keys() - {"percent"}:
        raise UsageError(f"--slo {text!r} limits nothing: {_EXAMPLE}")
    if not 0 < values.get("percent", 99) <= 100:
        raise UsageError(f"p in --slo {text!r} is not a percentage above 0: {_EXAMPLE}")
    return Objective(text, **values)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|s)", text)
    if match is None:
        raise ValueError(text)
    return float(match[1]) * _UNITS_S[match[2]]
