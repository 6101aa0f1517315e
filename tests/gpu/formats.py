"""Page formats that the kernels are held to: the presets, and odd ones for every knob."""

import dataclasses

from gear_compression import PRESETS, GearConfig, PartConfig

FORMATS: dict[str, GearConfig] = {name: c for name, c in PRESETS.items() if isinstance(c, GearConfig)}
V4 = PRESETS["near-lossless"].values  # type: ignore[union-attr]
FORMATS |= {
    "keys 2 bits": GearConfig(PartConfig(bits=2), V4),
    "keys 5 bits, values 5": GearConfig(PartConfig(bits=5, scale_bits=8), dataclasses.replace(V4, bits=5)),
    "keys 8 bits, values 8": GearConfig(PartConfig(bits=8), PartConfig(bits=8), page_size=64),
    "symmetric keys, rotated": GearConfig(PartConfig(bits=4, symmetric=True, rotate=True), V4, page_size=256),
    "groups of 16": GearConfig(PartConfig(bits=3, group_size=16), V4, page_size=64, sink_tokens=4),
    "groups of 64": GearConfig(PartConfig(bits=2, group_size=64), PartConfig(bits=2, scale_bits=8), page_size=128),
    "five bits and all parts": GearConfig(
        PartConfig(bits=5, rank=4, outliers=4), PartConfig(bits=5, rank=8, outliers=2), page_size=64, sink_tokens=2
    ),
    "three bits and all parts": GearConfig(
        PartConfig(bits=3, rank=8, factor_bits=4, low_rank_first=True, outliers=2),
        PartConfig(bits=3, rank=4, outliers=2),
    ),
}
