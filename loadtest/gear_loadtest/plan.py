"""What the user asked for, and whether it may be run: one kind of arrivals, and no flood on a stranger's server.

Knows nothing of how requests are sent.
"""

import math
from dataclasses import dataclass

from gear_loadtest.errors import UsageError
from gear_loadtest.target import Target

MAX_FOREIGN_RATE = 50.0  # requests/s
MAX_FOREIGN_CONCURRENCY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Exactly one of `rate` (open loop) and `concurrency` (closed loop) is set: `resolve_arrivals` sees to it."""

    model: str | None  # None: the first that the server lists
    rate: float | None  # requests/s
    concurrency: int | None
    num_requests: int
    input_len: int  # tokens
    output_len: int  # tokens
    seed: int
    timeout_s: float  # of one request, from send to end

    def __post_init__(self) -> None:
        for option, value in (("--rate", self.rate), ("--timeout-s", self.timeout_s)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{option} is {value:g}: give a number above 0")


def resolve_arrivals(rate: float | None, concurrency: int | None) -> tuple[float | None, int | None]:
    """Exactly one of the two, `concurrency=1` when neither is given. Raises `UsageError` for both."""
    if rate is None:
        return None, concurrency if concurrency is not None else 1
    if concurrency is not None:
        raise UsageError(
            "--rate and --concurrency exclude each other: give --rate to send on a schedule whatever the server does, "
            "or --concurrency to keep that many requests running"
        )
    return rate, None


def refuse_flood(plan: LoadPlan, target: Target, *, own_target: bool) -> None:
    """Raise `UsageError` if the plan would press hard on a server that may be somebody else's."""
    if own_target or target.is_loopback or target.is_encrypted:
        return
    if (plan.rate or 0) > MAX_FOREIGN_RATE or (plan.concurrency or 0) > MAX_FOREIGN_CONCURRENCY:
        raise UsageError(
            f"{target.base_url} is not this machine, and more than {MAX_FOREIGN_RATE:g} requests/s or "
            f"{MAX_FOREIGN_CONCURRENCY} at once is a flood: add --i-own-this-target if you may do that"
        )
