"""Decode attention straight from pages: one query token a sequence, codes read into the dot product.

    scores = q @ K̂,   K̂ = scale · codes + zero + B Aᵀ + outliers   [D, S]
    out    = p @ V̂,   V̂ = scale · codes + zero + A Bᵀ + outliers   [S, D]

Both are one product of a few rows with a stored matrix (`multiply_part`), joined by an online softmax from page to
page. G query heads share a KV head; scores [G, S], out [G, D].
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from gear_compression.cpu.rows import FAST, dot, exp_in_place, from_bf16, read_factors, read_row, read_scales
from gear_compression.layout import Layout, PartLayout, RawLayout


class KernelLayout(NamedTuple):
    """What the compiled code needs to know of one layer: integers only. Raw pages have no record (record_bytes 0)."""

    keys: PartLayout
    values: PartLayout
    start: int  # of the layer's records in a page
    record_bytes: int
    slot_bytes: int
    page_size: int
    run_tokens: int
    element_bits: int  # of an open token's entries: 16 is bf16, 32 float32
    num_heads: int
    head_dim: int
    sink_tokens: int

    @classmethod
    def of(cls, layout: Layout, layer: int, slot_bytes: int) -> "KernelLayout":
        common = (slot_bytes, layout.page_size, layout.run_tokens)
        shape = (layout.num_kv_heads, layout.head_dim)
        if isinstance(layout, RawLayout):
            nothing = PartLayout(*[0] * len(PartLayout._fields))
            return cls(nothing, nothing, 0, 0, *common, 8 * layout.element_bytes, *shape, 0)
        return cls(*layout.layers[layer], *common, 16, *shape, layout.config.sink_tokens)


class Scratch(NamedTuple):
    """Buffers that one thread reuses from page to page, all float32."""

    scale: NDArray[np.float32]  # [num_groups · num_vectors]
    zero: NDArray[np.float32]
    weights: NDArray[np.float32]  # [G · num_vectors]
    matrix: NDArray[np.float32]  # the codes of a part, or its low-rank factors
    row: NDArray[np.float32]  # [D]


@numba.njit(**FAST)
def new_scratch(lay, G):  # type: ignore[no-untyped-def]
    S, D = lay.page_size, lay.head_dim
    n = max(lay.keys.num_groups * D, lay.values.num_groups * S)
    matrix = max(S * D, (S + D) * max(lay.keys.rank, lay.values.rank))
    f32 = np.float32
    return Scratch(
        np.empty(n, f32), np.empty(n, f32), np.empty(G * max(S, D), f32), np.empty(matrix, f32), np.empty(D, f32)
    )


@numba.njit(inline="always")
def record_at(lay, slot, head):  # type: ignore[no-untyped-def]
    """Byte offset of a sealed page's record."""
    return slot * lay.slot_bytes + lay.start + head * lay.record_bytes


@numba.njit(**FAST)
def run_row(lay, slot, layer, head, kind, token):  # type: ignore[no-untyped-def]
    """Byte offset of one open token's K (kind 0) or V (1) in a slot [L, H, 2, run_tokens, D]."""
    row = (((layer * lay.num_heads + head) * 2 + kind) * lay.run_tokens + token) * lay.head_dim
    return slot * lay.slot_bytes + row * (lay.element_bits // 8)


@numba.njit(**FAST)
def add_product(weights, matrix, first, last, out):  # type: ignore[no-untyped-def]
    """out [G, n] += weights [G, V] @ matrix [V, n] in the columns [first, last).

    Four rows of the matrix a pass, for a quarter of the traffic on out, and not more: the compiler must prove at
    run time that no row overlaps out, and gives up past eight proofs.
    """
    G, V = weights.shape
    whole = V // 4 * 4
    for i in range(0, whole, 4):
        r0, r1 = matrix[i, first:last], matrix[i + 1, first:last]
        r2, r3 = matrix[i + 2, first:last], matrix[i + 3, first:last]
        for g in range(G):
            w0, w1, w2, w3 = weights[g, i], weights[g, i + 1], weights[g, i + 2], weights[g, i + 3]
            target = out[g, first:last]
            for t in range(last - first):
                target[t] += w0 * r0[t] + w1 * r1[t] + w2 * r2[t] + w3 * r3[t]
    for i in range(whole, V):
        for g in range(G):
            weight, row, target = weights[g, i], matrix[i, first:last], out[g, first:last]
            for t in range(last - first):
                target[t] += weight * row[t]


@numba.njit(**FAST)
def multiply_part(slab, base, part, lay, is_keys, x, out, scratch):  # type: ignore[no-untyped-def]
    """out[g] += x[g] @ X̂, where X̂ [V, n] is the stored matrix of a part: codes, low rank and outliers.

    Keys are stored channel by channel: x = q [G, D] gives scores [G, S]. Values token by token: x = p [G, S] gives
    the output [G, D]. The scale folds into x, so what is unpacked are bare codes; the low rank costs R, not V.
    """
    G, V, n, J = x.shape[0], part.num_vectors, part.vector_len, part.num_groups
    read_scales(slab, base, part, scratch.scale, scratch.zero)
    read_row(slab, base + part.codes, V * n, part.bits, scratch.matrix)
    codes = scratch.matrix[: V * n].reshape(V, n)
    weights = scratch.weights[: G * V].reshape(G, V)
    for j in range(J):
        scale, zero = scratch.scale[j * V : (j + 1) * V], scratch.zero[j * V : (j + 1) * V]
        first, last = j * part.group_size, (j + 1) * part.group_size
        for g in range(G):
            query, row, target = x[g], weights[g], out[g, first:last]
            bias = dot(query, zero, V)
            for i in range(V):
                row[i] = query[i] * scale[i]
            for t in range(part.group_size):
                target[t] += bias
        add_product(weights, codes, first, last, out)
    if part.rank:
        tokens, channels = read_factors(slab, base, part, lay.page_size, lay.head_dim, scratch.matrix)
        along, across = (channels, tokens) if is_keys else (tokens, channels)
        coefficients = scratch.weights[: G * part.rank].reshape(G, part.rank)
        for g in range(G):
            for r in range(part.rank):
                coefficients[g, r] = dot(x[g], along[r], V)
        add_product(coefficients, across, 0, n, out)
    for i in range(V * part.outliers):
        t = slab.u8[base + part.outlier_index + i]
        value = from_bf16(slab.u16[(base + part.outlier_value) // 2 + i])
        for g in range(G):
            out[g, t] += x[g, i // part.outliers] * value


@numba.njit(**FAST)
def score_sealed(slab, base, lay, num_sinks, q, scores, scratch):  # type: ignore[no-untyped-def]
    """scores[g, t] = q[g] · k[t] of a sealed page; q [G, D], record at byte `base`."""
    D = lay.head_dim
    scores[:] = 0.0
    multiply_part(slab, base, lay.keys, lay, True, q, scores, scratch)
    for t in range(num_sinks):
        read_row(slab, base + lay.keys.sinks + 2 * t * D, D, 16, scratch.row)
        for g in range(q.shape[0]):
            scores[g, t] = dot(q[g], scratch.row, D)


@numba.njit(**FAST)
def add_sealed(slab, base, lay, num_sinks, p, out, scratch):  # type: ignore[no-untyped-def]
    """out[g] += Σ_t p[g, t] · v[t] of a sealed page; p [G, S] is spent, out [G, D]."""
    D = lay.head_dim
    for t in range(num_sinks):
        read_row(slab, base + lay.values.sinks + 2 * t * D, D, 16, scratch.row)
        for g in range(out.shape[0]):
            target, weight = out[g], p[g, t]
            for d in range(D):
                target[d] += weight * scratch.row[d]
            p[g, t] = 0.0  # exact above: what the codes hold there does not count
    multiply_part(slab, base, lay.values, lay, False, p, out, scratch)


@numba.njit(**FAST)
def softmax_step(scores, first, last, softcap, running, out):  # type: ignore[no-untyped-def]
    """Turn scores[:, first:last] into weights under the running maximum; rescale what was summed before.

    running [2, G]: each query's largest score so far, and the sum of its weights.
    """
    for g in range(out.shape[0]):
        row = scores[g, first:last]
        if softcap > 0:
            for t in range(last - first):
                row[t] = softcap * np.tanh(row[t] / softcap)
        peak = running[0, g]
        for t in range(last - first):
            peak = max(peak, row[t])
        for t in range(last - first):
            row[t] -= peak
        exp_in_place(row)
        shrink = np.exp(running[0, g] - peak)
        running[0, g] = peak
        added = np.float32(0)
        for t in range(last - first):
            added += row[t]
        running[1, g] = running[1, g] * shrink + added
        out[g] *= shrink


@numba.njit(**FAST)
def attend_runs(slab, lay, slots, layer, head, first, last, softcap, q, scores, scratch, running, out):  # type: ignore[no-untyped-def]
    """Attend to the exact tokens [first, last) of a page that lies in runs at `slots`."""
    G, D = q.shape
    if first >= last:
        return
    row = scratch.row
    for t in range(first, last):
        at = run_row(lay, slots[t // lay.run_tokens], layer, head, 0, t % lay.run_tokens)
        read_row(slab, at, D, lay.element_bits, row)
        for g in range(G):
            scores[g, t] = dot(q[g], row, D)
    softmax_step(scores, first, last, softcap, running, out)
    for t in range(first, last):
        at = run_row(lay, slots[t // lay.run_tokens], layer, head, 1, t % lay.run_tokens)
        read_row(slab, at, D, lay.element_bits, row)
        for g in range(G):
            target, weight = out[g], scores[g, t]
            for d in range(D):
                target[d] += weight * row[d]


@numba.njit(**FAST)
def attend_pages(slab, lay, page_table, first_token, num_pages, layer, head, softcap, q, scores, scratch, running, out):  # type: ignore[no-untyped-def]
    """Attend to tokens [first_token, num_pages · S) in sealed pages; first_token > 0 under a sliding window."""
    S = lay.page_size
    for page in range(first_token // S, num_pages):
        first, slot = max(first_token - page * S, 0), page_table[page : page + 1]
        if lay.record_bytes == 0:
            attend_runs(slab, lay, slot, layer, head, first, S, softcap, q, scores, scratch, running, out)
            continue
        base = record_at(lay, slot[0], head)
        num_sinks = lay.sink_tokens if page == 0 else 0
        score_sealed(slab, base, lay, num_sinks, q, scores, scratch)
        scores[:, :first] = 0.0
        softmax_step(scores, first, S, softcap, running, out)
        add_sealed(slab, base, lay, num_sinks, scores, out, scratch)


@numba.njit(**FAST)
def decode(items, slab, lay, layer, page_table, open_slots, context_len, rows, q, k, v, scaling, window, softcap, out):  # type: ignore[no-untyped-def]
    """out[row, query heads of `head`] for each (sequence, KV head) in items [M, 2]; window 0 and softcap 0: none.

    rows [N]: each sequence's row among the step's tokens. q, out [T, Q, D]; k, v [T, H, D], the step's own tokens.
    """
    S, D = lay.page_size, lay.head_dim
    G = q.shape[1] // lay.num_heads
    scratch = new_scratch(lay, G)
    scores, scaled = np.empty((G, S), np.float32), np.empty((G, D), np.float32)
    running = np.empty((2, G), np.float32)
    for m in range(items.shape[0]):
        n, head = items[m, 0], items[m, 1]
        context, at = context_len[n], rows[n]
        result = out[at, head * G : (head + 1) * G]
        # The token attends to itself first: its score starts the running maximum.
        for g in range(G):
            for d in range(D):
                scaled[g, d] = q[at, head * G + g, d] * scaling
            score = dot(scaled[g], k[at, head], D)
            running[0, g] = softcap * np.tanh(score / softcap) if softcap > 0 else score
            running[1, g] = 1.0
            result[g] = v[at, head]
        first = max(context + 1 - window, 0) if window > 0 else 0
        num_pages = context // S
        attend_pages(
            slab, lay, page_table[n], first, num_pages, layer, head, softcap, scaled, scores, scratch, running, result
        )
        own, end = max(first - num_pages * S, 0), context - num_pages * S
        attend_runs(slab, lay, open_slots[n], layer, head, own, end, softcap, scaled, scores, scratch, running, result)
        for g in range(G):
            result[g] /= running[1, g]
