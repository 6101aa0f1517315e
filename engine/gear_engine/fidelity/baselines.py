"""Other KV caches in the same harness: each is what its pages read back as, and its honest bits an element.

The page being written stays exact for them too, as it does for GEAR, so that only the stored form is compared. KIVI
is a format of ours without low rank and outliers, so it runs as real pages; the others round raw pages in place.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.config import GearConfig, PartConfig, RawConfig
from gear_compression.cpu.backend import CpuBackend
from gear_compression.reference.rotation import hadamard

PAGE_SIZE = 128
RoundTrip = Callable[[Tensor], Tensor]  # [..., S, D] → the same, as it reads back
_E4M3_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Baseline:
    """A cache that is not ours. `bits` of a head_dim: bits an element, metadata included."""

    config: GearConfig | RawConfig
    round_trip: RoundTrip | None
    bits: Callable[[int], float] | None  # None: as the config's layout says


def _fp8(x: Tensor) -> Tensor:
    """e4m3 with one scale for the keys or values of a page."""
    scale = (x.abs().amax() / _E4M3_MAX).clamp(min=1e-30)
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _per_token(bits: int) -> RoundTrip:
    """Integers over the channels of each token and head, with a bf16 scale and zero."""

    def round_trip(x: Tensor) -> Tensor:
        levels = (1 << bits) - 1
        low = x.amin(-1, keepdim=True).bfloat16().float()
        scale = ((x.amax(-1, keepdim=True) - low) / levels).clamp(min=1e-30).bfloat16().float()
        return ((x - low) / scale).round().clamp(0, levels) * scale + low

    return round_trip


def _rotated(round_trip: RoundTrip) -> RoundTrip:
    def rotate(x: Tensor) -> Tensor:
        rotation = hadamard(x.shape[-1])
        return round_trip(x @ rotation) @ rotation

    return rotate


_RAW = RawConfig(page_size=PAGE_SIZE)


def _kivi(bits: int) -> GearConfig:
    part = PartConfig(bits=bits, group_size=32)
    return GearConfig(keys=part, values=part, page_size=PAGE_SIZE)


BASELINES: dict[str, Baseline] = {
    "bf16": Baseline(_RAW, lambda x: x.bfloat16().float(), lambda head_dim: 16.0),
    "fp8": Baseline(_RAW, _fp8, lambda head_dim: 8.0),
    "int8": Baseline(_RAW, _per_token(8), lambda head_dim: 8 + 32 / head_dim),
    "int4": Baseline(_RAW, _per_token(4), lambda head_dim: 4 + 32 / head_dim),
    "hadamard-4": Baseline(_RAW, _rotated(_per_token(4)), lambda head_dim: 4 + 32 / head_dim),
    "kivi-4": Baseline(_kivi(4), None, None),
    "kivi-2": Baseline(_kivi(2), None, None),
}


def backend_of(baseline: Baseline) -> type[CpuBackend]:
    """The CPU backend whose full raw pages read back as the baseline's."""
    round_trip = baseline.round_trip
    if round_trip is None:
        return CpuBackend

    class RoundTripBackend(CpuBackend):
        def stored(self, page: Tensor) -> Tensor:
            assert round_trip is not None
            return torch.stack([round_trip(page[:, 0]), round_trip(page[:, 1])], dim=1)

    return RoundTripBackend
