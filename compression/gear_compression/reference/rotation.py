"""The Hadamard rotation that spreads a spike in one channel over all of them (as in QuaRot and TurboQuant)."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def hadamard(head_dim: int) -> Tensor:
    """[D, D] float32, symmetric and orthonormal: Sylvester blocks of the largest power of two that divides D.

    Its own inverse, so `x @ hadamard(D)` rotates and rotates back.
    """
    block_size = head_dim & -head_dim
    block = torch.ones(1, 1)
    while block.shape[0] < block_size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)], 0)
    return torch.block_diag(*[block / block_size**0.5] * (head_dim // block_size))
