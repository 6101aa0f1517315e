"""Scales and zeros rounded to how they are stored, in the direction that keeps every value inside the coded range."""

import torch
from torch import Tensor

TINY = 1e-30  # a constant group has zero range; 0/0 would poison the page


def bf16_up(x: Tensor) -> Tensor:
    """The smallest bf16 that is at least x, as float32."""
    bits = x.contiguous().view(torch.int32)
    down = bits & -65536  # towards zero
    step = ((bits & 65535) != 0) & (bits > 0)
    return torch.where(step, down + 65536, down).view(torch.float32)


def bf16_down(x: Tensor) -> Tensor:
    """The largest bf16 that is at most x, as float32."""
    return -bf16_up(-x)


def store_zero(low: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """low [V, G] → (zero at most low, as it will be read back; unit [] of an int8 count, 0 for bf16)."""
    if scale_bits == 16:
        return bf16_down(low), torch.zeros(())
    unit = bf16_up((low.abs().amax() / 127).clamp(min=TINY))
    return (low / unit).floor().clamp(-128, 127) * unit, unit


def store_scale(scale: Tensor, scale_bits: int) -> tuple[Tensor, Tensor]:
    """scale [V, G] → (scale at least as large, as it will be read back; unit [] of a uint8 count, 0 for bf16)."""
    if scale_bits == 16:
        return bf16_up(scale.clamp(min=TINY)), torch.zeros(())
    unit = bf16_up((scale.amax() / 255).clamp(min=TINY))
    return (scale / unit).ceil().clamp(1, 255) * unit, unit
