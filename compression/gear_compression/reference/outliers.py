"""Sparse outliers: each vector's largest and smallest entries, kept aside exactly (GEAR, section 3)."""

import torch
from torch import Tensor


def select(x: Tensor, num_outliers: int, num_skipped: int) -> Tensor:
    """x [V, n] → positions [V, o] int64: o/2 smallest, then o/2 largest, never the same twice, in a fixed order.

    The first `num_skipped` entries of each vector are not candidates (exact sink tokens). Of equal entries the
    earlier counts as the smaller one.
    """
    order = x[:, num_skipped:].argsort(dim=1, stable=True) + num_skipped
    half = num_outliers // 2
    return torch.cat([order[:, :half], order[:, order.shape[1] - half :].flip(1)], dim=1)


def mask(positions: Tensor, vector_len: int) -> Tensor:
    """positions [V, o] → [V, n] bool, True at them."""
    out = torch.zeros(positions.shape[0], vector_len, dtype=torch.bool, device=positions.device)
    return out.scatter_(1, positions, True)
