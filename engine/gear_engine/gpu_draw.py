"""The draw of a token on a GPU: one program a row, which bisects where the cuts are instead of sorting the vocabulary.
It knows what `sampler._draw` defines, to the bit but for the device's exp and division; it refuses to know requests.

A logit's depth, how far it is below the best in units of the temperature, is a number from 0 up, whose bits as an
integer are in the order of the numbers: so bits are compared and bisected. Weights are the integers of the definition.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 16


@triton.jit
def _tokens(row, start, V, best, temperature, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Depths and weights of tokens from `start` on; beyond the vocabulary infinity and 0."""
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row + at, mask=at < V, other=float("-inf")).to(tl.float32)
    scaled = (logits - best) / temperature
    weights = tl.where(scaled > -28.0, tl.exp(scaled), 0.0) * 1099511627776.0  # WEIGHT_ONE; below 1 anyway, or NaN
    return (0.0 - scaled).to(tl.int32, bitcast=True), weights.to(tl.int64)


@triton.jit
def _total(row, V, best, temperature, limit, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of all tokens that are no deeper than `limit`."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        depths, weights = _tokens(row, start, V, best, temperature, BLOCK)
        sums += tl.where(depths <= limit, weights, 0)
    return tl.sum(sums, 0)


@triton.jit
def _edge(row, V, best, temperature, limit, goal, COUNTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest depth down to which weights, or with COUNTS tokens, add up to `goal`; infinity if none does."""
    low = tl.full([], -1, tl.int32)  # too few add up
    high = tl.full([], 0x7F800000, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        sums = tl.zeros([BLOCK], tl.int64)
        within = tl.full([BLOCK], -1, tl.int32)  # the deepest that are down to the middle
        beyond = tl.full([BLOCK], 0x7F800000, tl.int32)  # the least deep of the others
        for start in range(0, V, BLOCK):
            depths, weights = _tokens(row, start, V, best, temperature, BLOCK)
            if COUNTS:
                weights = tl.full([BLOCK], 1, tl.int64)
            sums += tl.where((depths <= middle) & (depths <= limit), weights, 0)
            within = tl.maximum(within, tl.where(depths <= middle, depths, -1))
            beyond = tl.minimum(beyond, tl.where(depths > middle, depths, 0x7F800000))
        if tl.sum(sums, 0) >= goal:
            high = tl.max(within, 0)
        else:
            low = tl.min(beyond, 0) - 1
    return high


@triton.jit(do_not_specialize=["M"])
def _draw(logits, best, tokens, columns, M, V, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    column = columns + tl.program_id(0)
    index = tl.load(column).to(tl.int64)
    temperature, min_p_depth = tl.load(column + M).to(tl.float32), tl.load(column + 2 * M).to(tl.float32)
    top_k, top_p, u = tl.load(column + 3 * M).to(tl.int64), tl.load(column + 4 * M), tl.load(column + 5 * M)
    row, top = logits + index * stride, tl.load(best + index).to(tl.float32)

    limit = min_p_depth.to(tl.int32, bitcast=True)
    if top_k < V:
        limit = tl.minimum(limit, _edge(row, V, top, temperature, 0x7FFFFFFF, top_k, True, BLOCK))
    total = _total(row, V, top, temperature, limit, BLOCK)
    if top_p < 1.0:
        share = top_p * total.to(tl.float64)
        goal = share.to(tl.int64)
        goal += (goal.to(tl.float64) < share).to(tl.int64)  # rounded up
        limit = tl.minimum(limit, _edge(row, V, top, temperature, limit, goal, False, BLOCK))
        total = _total(row, V, top, temperature, limit, BLOCK)

    target = tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)
    start = tl.full([], 0, tl.int32)
    before = tl.full([], 0, tl.int64)  # the weight of all blocks before `start`
    depths, weights = _tokens(row, start, V, top, temperature, BLOCK)
    kept = tl.where(depths <= limit, weights, 0)
    here = tl.sum(kept, 0)
    while (before + here <= target) & (start + BLOCK < V):
        before += here
        start += BLOCK
        depths, weights = _tokens(row, start, V, top, temperature, BLOCK)
        kept = tl.where(depths <= limit, weights, 0)
        here = tl.sum(kept, 0)
    passed = tl.sum((before + tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
    tl.store(tokens + index, tl.minimum(start + passed, V - 1).to(tl.int64))


def draw_rows(logits: Tensor, best: Tensor, tokens: Tensor, columns: Tensor) -> None:
    """Draws for some rows of logits [N, V] of any float type into tokens [N] int64; best [N] is each row's largest.

    columns [6, M] float64, of each row that is drawn for: its index, temperature, depth at which min_p cuts (infinity:
    nowhere), top_k (V: nowhere), top_p (1: nowhere), and the number in [0, 1) that picks the token.
    """
    V = logits.shape[1]
    assert logits.stride(1) == 1
    assert tokens.is_contiguous()
    assert best.is_contiguous()
    assert columns.is_contiguous()
    assert columns.shape[0] == 6
    M = columns.shape[1]
    _draw[(M,)](logits, best, tokens, columns, M, V, logits.stride(0), BLOCK=BLOCK, num_warps=WARPS)
