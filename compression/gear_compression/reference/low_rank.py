"""The low-rank part: X ≈ A Bᵀ by subspace iteration from a fixed start (GEAR, section 3 and appendix)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.config import PartConfig
from gear_compression.reference.rounding import TINY, bf16_up

NUM_ROUNDS = 3


@dataclass(slots=True)
class LowRank:
    """A Bᵀ = Σ over columns r of scale[r] · tokens[r] ⊗ channels[r]. Factors as stored: signed codes, or bf16."""

    tokens: Tensor  # [R, S] float32: A's columns
    channels: Tensor  # [R, D] float32: B's columns
    scale: Tensor  # [R] float32, bf16 values; 1 for bf16 factors

    def product(self) -> Tensor:
        """[S, D] float32."""
        return (self.tokens * self.scale[:, None]).T @ self.channels


def start_matrix(page_size: int, rank: int) -> Tensor:
    """[S, R] float32, fixed: the slow cosines over the tokens, in which rotary keys have most of their energy.

    A start drawn at random makes runs unrepeatable and needs more rounds.
    """
    t = torch.arange(page_size, dtype=torch.float64)[:, None] + 0.5
    r = torch.arange(1, rank + 1, dtype=torch.float64)[None]
    slow = torch.cos(math.pi * t * r / page_size)
    # Golden-ratio noise, so that no direction of X is orthogonal to the whole start.
    noise = torch.remainder((t * 0.6180339887498949 + r * 0.7548776662466927) * (r + 1), 1.0) - 0.5
    return (slow + noise).float()


def orthonormalize(a: Tensor) -> Tensor:
    """a [S, R] with each column made orthogonal to those before it and of length 1 (0 if nothing is left)."""
    columns: list[Tensor] = []
    for column in a.T:
        size = column.norm()
        for _ in range(2):  # a second pass removes what rounding left of a nearly dependent column
            for earlier in columns:
                column = column - (earlier @ column) * earlier
        left = column.norm()
        dependent = left <= 1e-5 * size
        columns.append(torch.where(dependent, torch.zeros_like(column), column / left.clamp(min=TINY)))
    return torch.stack(columns, dim=1)


def fit(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """x [S, D] float32 → a [S, R] orthonormal, b [D, R], with a @ b.T the projection of x on a's span."""
    largest = x.abs().amax().clamp(min=TINY)
    unit = x / largest  # its squares neither overflow nor vanish
    a = orthonormalize(start_matrix(x.shape[0], rank).to(x.device))
    for _ in range(NUM_ROUNDS):
        a = orthonormalize(unit @ (unit.T @ a))
    return a, (unit.T @ a) * largest


def store_factors(a: Tensor, b: Tensor, part: PartConfig) -> LowRank:
    """a [S, R], b [D, R] rounded to how they are stored: bf16, or signed codes with one scale a column.

    A code of 0 means 0. Key biases, turned by RoPE, make columns with a few huge channels; without a code for 0 every
    other channel would be off by half a step of those.
    """
    if part.factor_bits == 16:
        tokens, channels = (t.T.contiguous().bfloat16().float() for t in (a, b))
        return LowRank(tokens, channels, torch.ones(a.shape[1], device=a.device))
    tokens, token_scale = _signed_codes(a.T, part.factor_bits)
    channels, channel_scale = _signed_codes(b.T, part.factor_bits)
    return LowRank(tokens, channels, bf16_up((token_scale * channel_scale).clamp(min=TINY)))


def factor_zero(factor_bits: int) -> int:
    """The stored code that means 0: of 4 bits, 0 … 15 mean −7 … 8."""
    return (1 << (factor_bits - 1)) - 1


def _signed_codes(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """rows [R, n] → (whole numbers [R, n], scale [R]), so fine that the extremes are half a step off like the rest."""
    lowest, highest = -factor_zero(bits), (1 << bits) - 1 - factor_zero(bits)
    scale = torch.maximum(rows.amin(1) / (lowest - 0.5), rows.amax(1) / (highest + 0.5)).clamp(min=TINY)
    return (rows / scale[:, None]).round().clamp(lowest, highest), scale
