"""Uniform quantisation of vectors in groups (GEAR, section 3; KIVI for the axes): x ≈ zero + scale · codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.config import PartConfig
from gear_compression.reference.rounding import store_scale, store_zero

# Step of the uniform quantiser with the least mean square error for a Gaussian of variance 1 (J. Max, "Quantizing for
# minimum distortion", 1960, table II). From 4 bits on, the range of a vector is about as wide and measures no worse.
GAUSSIAN_STEP = {2: 0.9957, 3: 0.5860}


@dataclass(slots=True)
class Codes:
    """V vectors of n entries in G groups. `zero` is the value that code 0 decodes to."""

    codes: Tensor  # [V, n] uint8
    scale: Tensor  # [V, G] float32, already as stored
    zero: Tensor  # [V, G] float32, already as stored; symmetric: −scale · levels / 2, not stored
    scale_unit: Tensor  # [] float32: worth of one count of an 8-bit scale, 0 for bf16 scales
    zero_unit: Tensor  # []

    def dequantize(self) -> Tensor:
        """[V, n] float32."""
        V, n = self.codes.shape
        groups = self.codes.float().view(V, self.scale.shape[1], -1)
        return (groups * self.scale[..., None] + self.zero[..., None]).view(V, n)


def quantize(x: Tensor, kept: Tensor, part: PartConfig) -> Codes:
    """x [V, n] float32, coded over the range of its entries where `kept` [V, n]; the others are clamped into it.

    Scale and zero are rounded to their stored type before the codes are computed, so the error does not count twice.
    Symmetric codes serve rotated vectors, which are nearly Gaussian: with 2 and 3 bits the step is the best one for a
    Gaussian of the same power where that is narrower than the range, and the ends are clamped.
    """
    V, n = x.shape
    x_groups, kept_groups = (t.view(V, -1, part.group_size or n) for t in (x, kept))
    any_kept = kept_groups.any(-1)
    high = x_groups.masked_fill(~kept_groups, -torch.inf).amax(-1).masked_fill(~any_kept, 0.0)
    low = x_groups.masked_fill(~kept_groups, torch.inf).amin(-1).masked_fill(~any_kept, 0.0)
    if part.symmetric:
        whole_range = torch.maximum(high, -low) * (2 / part.levels)
        mean_square = x_groups.square().masked_fill(~kept_groups, 0.0).sum(-1) / kept_groups.sum(-1).clamp(min=1)
        best = mean_square.sqrt() * GAUSSIAN_STEP.get(part.bits, torch.inf)
        scale, scale_unit = store_scale(torch.fmin(whole_range, best), part.scale_bits)
        zero, zero_unit = scale * (-part.levels / 2), torch.zeros(())
    else:
        zero, zero_unit = store_zero(low, part.scale_bits)
        scale, scale_unit = store_scale((high - zero) / part.levels, part.scale_bits)
    codes = ((x_groups - zero[..., None]) / scale[..., None]).round().clamp(0, part.levels)
    return Codes(codes.to(torch.uint8).view(V, n), scale, zero, scale_unit, zero_unit)
