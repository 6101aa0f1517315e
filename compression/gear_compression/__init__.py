"""GEAR pages: the format of a compressed KV cache, what compresses it, and attention that reads it as it is.

Shapes, everywhere: N sequences, T tokens, P pages, S page_size, H KV heads, Q query heads, D head_dim, R rank,
L layers.
"""

from gear_compression.config import PRESETS, GearConfig, PartConfig, RawConfig, preset
from gear_compression.layout import PageLayout, RawLayout, layout_for

__all__ = ["PRESETS", "GearConfig", "PageLayout", "PartConfig", "RawConfig", "RawLayout", "layout_for", "preset"]
