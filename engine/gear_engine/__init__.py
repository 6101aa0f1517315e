"""GearServe's engine: token ids in, token ids out, with the KV cache held as GEAR pages."""

from typing import TYPE_CHECKING

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
