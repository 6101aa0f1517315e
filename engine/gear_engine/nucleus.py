"""Where top_p cuts, on a GPU: found without sorting, and without the host waiting for an answer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _search(scaled, weights, lowest, wanted, edge, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One row a program. The bits of numbers from 0 up are in the order of the numbers, so bits are bisected."""
    row = tl.program_id(0).to(tl.int64)
    floor, goal = tl.load(lowest + row), tl.load(wanted + row)
    low = tl.full([], -1, tl.int64)  # too few reach the goal
    high = tl.full([], 0x7F800000, tl.int64)  # as far as infinity all do
    while high - low > 1:
        middle = (low + high) // 2
        deepest = -(middle.to(tl.int32).to(tl.float32, bitcast=True))
        reached = tl.zeros([BLOCK], tl.int64)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(scaled + row * V + at, mask=at < V, other=float("-inf"))
            weight = tl.load(weights + row * V + at, mask=at < V, other=0)
            reached += tl.where((value >= deepest) & (value >= floor), weight, 0)
        enough = tl.sum(reached, 0) >= goal
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    tl.store(edge + row, -(high.to(tl.int32).to(tl.float32, bitcast=True)))


def nucleus_edge(scaled: Tensor, weights: Tensor, lowest: Tensor, wanted: Tensor) -> Tensor:
    """[N, 1]: the largest value v for which the weights of all scaled values ≥ v, and ≥ lowest, sum up to `wanted`.

    scaled [N, V] float32, at most 0; weights [N, V] int64; lowest [N, 1] float32; wanted [N, 1] int64. −inf where all
    together do not suffice.
    """
    N, V = scaled.shape
    edge = torch.empty(N, 1, dtype=torch.float32, device=scaled.device)
    _search[(N,)](
        scaled.contiguous(), weights.contiguous(), lowest.contiguous(), wanted.contiguous(), edge, V, BLOCK=BLOCK
    )
    return edge
