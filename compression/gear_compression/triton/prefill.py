"""Prefill attention, page-faithful: a query tile sees earlier pages dequantised and its own page exactly.

One program takes a tile of queries that lie in one page, and one or more query heads of one KV head; it walks over the
sequence's earlier pages in bf16 scratch, then over its own page under the causal mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gear_compression.triton.tiles import heads_of_a_tile, tokens_of_a_tile


@triton.jit
def _add_tile(acc, peak, total, q, k, v, hidden, scaling, softcap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """One step of online softmax over a tile of keys k [N, D]; hidden [M, N] or None; acc [M, D] in float32."""
    scores = tl.dot(q, tl.trans(k)) * scaling
    if HAS_CAP:
        bounded = scores / softcap
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * bounded)) - 1.0)
    scores *= 1.4426950408889634
    if hidden is not None:
        scores = tl.where(hidden, float("-inf"), scores)
    raised = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - raised[:, None])
    shrink = tl.exp2(peak - raised)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, raised, total


@triton.jit
def _prefill(  # type: ignore[no-untyped-def]
    q, past_k, past_v, own_k, own_v, out, tiles, rotation, scaling, softcap,
    q_stride, own_stride, past_stride,
    D: tl.constexpr, D_POW2: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 6
    q_row, num_q, q_offset = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    own_row, past_row, num_past = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    first_head = tl.program_id(1) * HEADS
    kv_head = first_head // GROUP

    m, d, n = tl.arange(0, HEADS * TOKENS), tl.arange(0, D_POW2), tl.arange(0, BLOCK_N)
    token, head = m % TOKENS, first_head + m // TOKENS
    is_channel = d < D
    q_at = (q_row + token).to(tl.int64)[:, None] * q_stride + head[:, None] * D + d[None, :]
    is_query = (token < num_q)[:, None] & is_channel[None, :]
    queries = tl.load(q + q_at, mask=is_query, other=0.0)
    position = num_past + q_offset + token  # in the sequence

    acc = tl.zeros([HEADS * TOKENS, D_POW2], tl.float32)
    peak = tl.full([HEADS * TOKENS], -1.0e30, tl.float32)
    total = tl.zeros([HEADS * TOKENS], tl.float32)
    past = (kv_head * past_stride).to(tl.int64) + past_row.to(tl.int64) * D
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(0, num_past + q_offset - WINDOW + 1) // BLOCK_N * BLOCK_N
    for start in range(begin, num_past, BLOCK_N):
        at = past + (start + n)[:, None] * D + d[None, :]
        k = tl.load(past_k + at, mask=is_channel[None, :], other=0.0)
        v = tl.load(past_v + at, mask=is_channel[None, :], other=0.0)
        hidden = None
        if WINDOW > 0:
            hidden = (start + n)[None, :] <= position[:, None] - WINDOW
        acc, peak, total = _add_tile(acc, peak, total, queries, k, v, hidden, scaling, softcap, HAS_CAP)
    for start in range(0, q_offset + num_q, BLOCK_N):
        is_key = ((start + n) < q_offset + num_q)[:, None] & is_channel[None, :]
        at = (own_row + start + n).to(tl.int64)[:, None] * own_stride + kv_head * D + d[None, :]
        k = tl.load(own_k + at, mask=is_key, other=0.0)
        v = tl.load(own_v + at, mask=is_key, other=0.0)
        key_position = num_past + start + n
        hidden = key_position[None, :] > position[:, None]
        if WINDOW > 0:
            hidden = hidden | (key_position[None, :] <= position[:, None] - WINDOW)
        acc, peak, total = _add_tile(acc, peak, total, queries, k, v, hidden, scaling, softcap, HAS_CAP)

    acc = acc / total[:, None]
    if ROTATE:  # back from the Hadamard basis: a matrix of ±1, then its scale
        signs = tl.load(
            rotation + d[:, None] * D + d[None, :], mask=is_channel[:, None] & is_channel[None, :], other=0.0
        )
        block: tl.constexpr = D & -D
        acc = tl.dot((acc * (1.0 / tl.sqrt(block * 1.0))).to(tl.float16), signs)  # scaled first: no larger than values
    tl.store(out + q_at, acc.to(out.dtype.element_ty), mask=is_query)


def prefill_attention(
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    tiles: Tensor,
    page_size: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    rotation: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, Q, D] → [T, Q, D], in `out` if it is given; rows that no tile names are left as they are there.

    past_k, past_v [H, n, D]: earlier pages of all sequences, dequantised. own_k, own_v [T', H, D]: exact tokens of the
    queries' own pages. tiles [M, 6] int32, one page and at most `tokens_of_a_tile` queries each: first row of q,
    number of queries, the first one's offset in its page, the row of the page's first token in own_k, the row of the
    sequence's first token in past_k, tokens in earlier pages. rotation [D, D] of ±1 in fp16: turns the output back,
    which is rounded to fp16 for it.
    """
    _, Q, D = q.shape
    H = past_k.shape[0]
    tokens, heads = tokens_of_a_tile(page_size), heads_of_a_tile(page_size, Q // H)
    out = torch.empty_like(q) if out is None else out
    fused = rotation is not None and D <= 128  # a larger matrix of signs would not fit beside the tiles
    block_n = 128 if page_size % 128 == 0 and D <= 128 else 64
    _prefill[(tiles.shape[0], Q // heads)](
        q, past_k, past_v, own_k, own_v, out, tiles, rotation if fused else q, scaling, softcap,
        q.stride(0), own_k.stride(0), past_k.stride(0),
        D=D, D_POW2=triton.next_power_of_2(D), GROUP=Q // H, HEADS=heads, TOKENS=tokens,
        BLOCK_N=block_n, WINDOW=window, HAS_CAP=softcap > 0, ROTATE=fused,
        num_warps=8, num_stages=3 if D <= 128 else 2,
    )  # fmt: skip
    if rotation is not None and not fused:
        out = (out.float() @ rotation.float() * (D & -D) ** -0.5).to(q.dtype)
    return out


@torch.library.custom_op("gear::prefill_attention", mutates_args=("out",))
def prefill_into(
    out: Tensor,
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    tiles: Tensor,
    page_size: int,
    scaling: float,
    window: int,
    softcap: float,
    rotation: Tensor | None,
) -> None:
    """`prefill_attention` as an operator: writes the rows of `out` [T, Q, D] that tiles name."""
    prefill_attention(
        q, past_k, past_v, own_k, own_v, tiles, page_size, scaling, window, softcap, rotation, out
    )  # fmt: skip


@prefill_into.register_fake
def _(
    out: Tensor,
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    tiles: Tensor,
    page_size: int,
    scaling: float,
    window: int,
    softcap: float,
    rotation: Tensor | None,
) -> None:
    return None
