"""GearServe's engine: token ids in, token ids out, with the KV cache held as GEAR pages."""

import os
from typing import TYPE_CHECKING

# Must be said before torch loads OpenMP: threads that spin while they wait steal the cores from any other busy
# program. Two engines on two cores took 984 ms a decode step spinning, 67 ms sleeping; alone it costs nothing to see.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from gear_engine.llm import LLM, Completion
    from gear_engine.protocol import SamplingParams

__all__ = ["LLM", "Completion", "SamplingParams"]


def __getattr__(name: str) -> object:
    """`from gear_engine import LLM` without making the HTTP server, which needs only the protocol, import torch."""
    if name in ("LLM", "Completion"):
        from gear_engine import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from gear_engine.protocol import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
