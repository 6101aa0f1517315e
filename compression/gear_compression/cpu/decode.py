"""Decode attention straight from pages: one query token a sequence, codes read into the dot product.

    score[t] = (q∘scale) · codes[t] + q·zero + (q B) · A[t] + Σ outliers of token t
    out      = Σ p[t]·scale[t]·codes[t] + Σ p[t]·zero[t] + (Σ p[t] A[t]) Bᵀ + Σ outliers

with an online softmax from page to page. Arrays: q, out [N, Q, D]; scores [G, S], G query heads of one KV head.
"""

from typing import NamedTuple

import numba
import numpy as np

from gear_compression.cpu.rows import FAST, exp_in_place, read_factors, read_row, read_scale
from gear_compression.layout import Layout, PartLayout, RawLayout


class KernelLayout(NamedTuple):
    """What the compiled code needs of a layout: integers only. Raw pages have no record (record_bytes 0)."""

    keys: PartLayout
    values: PartLayout
    record_bytes: int
    slot_bytes: int
    page_size: int
    run_tokens: int
    element_bits: int  # of an open token's entries: 16 is bf16, 32 float32
    num_heads: int
    head_dim: int
    sink_tokens: int

    @classmethod
    def of(cls, layout: Layout, slot_bytes: int) -> "KernelLayout":
        common = (slot_bytes, layout.page_size, layout.run_tokens)
        shape = (layout.num_kv_heads, layout.head_dim)
        if isinstance(layout, RawLayout):
            nothing = PartLayout(*[0] * len(PartLayout._fields))
            return cls(nothing, nothing, 0, *common, 8 * layout.element_bytes, *shape, 0)
        sinks = layout.config.sink_tokens
        return cls(layout.keys, layout.values, layout.record_bytes, *common, 16, *shape, sinks)


@numba.njit(**FAST)
def run_row(lay, slot, layer, head, kind, token):  # type: ignore[no-untyped-def]
    """Byte offset of one open token's K (kind 0) or V (1) in a slot [L, H, 2, run_tokens, D]."""
    row = (((layer * lay.num_heads + head) * 2 + kind) * lay.run_tokens + token) * lay.head_dim
    return slot * lay.slot_bytes + row * (lay.element_bits // 8)


@numba.njit(**FAST)
def score_sealed(slab, base, part, lay, is_first, q, scores, row, channels):  # type: ignore[no-untyped-def]
    """scores[g, t] = q[g] · k[t] of a sealed page; q [G, D], record at byte `base`."""
    G, S, D = q.shape[0], lay.page_size, lay.head_dim
    scores[:G, :S] = 0.0
    bias = np.zeros((G, part.num_groups), np.float32)
    for d in range(D):
        read_row(slab, base + part.codes + d * S * part.bits // 8, S, part.bits, row)
        for j in range(part.num_groups):
            scale, zero = read_scale(slab, base, part, d * part.num_groups + j)
            first, last = j * part.group_size, (j + 1) * part.group_size
            for g in range(G):
                weight = q[g, d] * scale
                bias[g, j] += q[g, d] * zero
                codes, out = row[first:last], scores[g, first:last]
                for t in range(part.group_size):
                    out[t] += weight * codes[t]
    for j in range(part.num_groups):
        for g in range(G):
            out = scores[g, j * part.group_size : (j + 1) * part.group_size]
            for t in range(part.group_size):
                out[t] += bias[g, j]
    for r in range(part.rank):
        read_factors(slab, base, part, S, D, r, row, channels)
        for g in range(G):
            weight = np.float32(0)
            for d in range(D):
                weight += q[g, d] * channels[d]
            out = scores[g]
            for t in range(S):
                out[t] += weight * row[t]
    for i in range(part.num_vectors * part.outliers):
        t = slab.u8[base + part.outlier_index + i]
        value = np.uint32(np.uint32(slab.u16[(base + part.outlier_value) // 2 + i]) << 16).view(np.float32)
        for g in range(G):
            scores[g, t] += q[g, i // part.outliers] * value
    if is_first:
        for t in range(lay.sink_tokens):
            read_row(slab, base + part.sinks + 2 * t * D, D, 16, channels)
            for g in range(G):
                scores[g, t] = dot(q[g], channels, D)


@numba.njit(**FAST)
def add_sealed(slab, base, part, lay, is_first, p, out, row, channels):  # type: ignore[no-untyped-def]
    """out[g] += Σ_t p[g, t] · v[t] of a sealed page; p [G, S], out [G, D]."""
    G, S, D = out.shape[0], lay.page_size, lay.head_dim
    sinks = lay.sink_tokens if is_first else 0
    bias = np.zeros((G, part.num_groups), np.float32)
    for t in range(sinks, S):
        read_row(slab, base + part.codes + t * D * part.bits // 8, D, part.bits, row)
        for j in range(part.num_groups):
            scale, zero = read_scale(slab, base, part, t * part.num_groups + j)
            first, last = j * part.group_size, (j + 1) * part.group_size
            for g in range(G):
                weight = p[g, t] * scale
                bias[g, j] += p[g, t] * zero
                codes, target = row[first:last], out[g, first:last]
                for d in range(part.group_size):
                    target[d] += weight * codes[d]
    for j in range(part.num_groups):
        for g in range(G):
            out[g, j * part.group_size : (j + 1) * part.group_size] += bias[g, j]
    for r in range(part.rank):
        read_factors(slab, base, part, S, D, r, row, channels)
        for g in range(G):
            weight = np.float32(0)
            for t in range(sinks, S):
                weight += p[g, t] * row[t]
            target = out[g]
            for d in range(D):
                target[d] += weight * channels[d]
    for i in range(sinks * part.outliers, part.num_vectors * part.outliers):
        d = slab.u8[base + part.outlier_index + i]
        value = np.uint32(np.uint32(slab.u16[(base + part.outlier_value) // 2 + i]) << 16).view(np.float32)
        for g in range(G):
            out[g, d] += p[g, i // part.outliers] * value
    for t in range(sinks):
        read_row(slab, base + part.sinks + 2 * t * D, D, 16, channels)
        for g in range(G):
            target = out[g]
            for d in range(D):
                target[d] += p[g, t] * channels[d]


@numba.njit(**FAST)
def dot(a, b, n):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(n):
        total += a[i] * b[i]
    return total


@numba.njit(**FAST)
def softmax_step(scores, first, last, softcap, largest, total, out):  # type: ignore[no-untyped-def]
    """Turn scores[:, first:last] into weights under the running maximum; rescale what was summed before."""
    for g in range(out.shape[0]):
        row = scores[g, first:last]
        if softcap > 0:
            for t in range(last - first):
                row[t] = softcap * np.tanh(row[t] / softcap)
        peak = largest[g]
        for t in range(last - first):
            peak = max(peak, row[t])
        for t in range(last - first):
            row[t] -= peak
        exp_in_place(row)
        shrink = np.exp(largest[g] - peak)
        largest[g] = peak
        added = np.float32(0)
        for t in range(last - first):
            added += row[t]
        total[g] = total[g] * shrink + added
        out[g] *= shrink


@numba.njit(**FAST)
def attend_runs(slab, lay, slots, layer, head, first, last, softcap, q, scores, row, largest, total, out):  # type: ignore[no-untyped-def]
    """Attend to the exact tokens [first, last) of a page that lies in runs at `slots`."""
    G, D = q.shape
    if first >= last:
        return
    for t in range(first, last):
        read_row(slab, run_row(lay, slots[t // lay.run_tokens], layer, head, 0, t % lay.run_tokens), D, lay.element_bits, row)
        for g in range(G):
            scores[g, t] = dot(q[g], row, D)
    softmax_step(scores, first, last, softcap, largest, total, out)
    for t in range(first, last):
        read_row(slab, run_row(lay, slots[t // lay.run_tokens], layer, head, 1, t % lay.run_tokens), D, lay.element_bits, row)
        for g in range(G):
            target = out[g]
            for d in range(D):
                target[d] += scores[g, t] * row[d]


@numba.njit(**FAST)
def attend_pages(slab, lay, page_table, first_token, num_pages, layer, head, softcap, q, scores, row, channels, largest, total, out):  # type: ignore[no-untyped-def]
    """Attend to tokens [first_token, num_pages · S) in sealed pages; first_token > 0 under a sliding window."""
    S = lay.page_size
    for page in range(first_token // S, num_pages):
        first = max(first_token - page * S, 0)
        if lay.record_bytes == 0:
            attend_runs(slab, lay, page_table[page : page + 1], layer, head, first, S, softcap, q, scores, row, largest, total, out)
            continue
        base = page_table[page] * lay.slot_bytes + (layer * lay.num_heads + head) * lay.record_bytes
        score_sealed(slab, base, lay.keys, lay, page == 0, q, scores, row, channels)
        scores[:, :first] = 0.0
        softmax_step(scores, first, S, softcap, largest, total, out)
        add_sealed(slab, base, lay.values, lay, page == 0, scores, out, row, channels)


@numba.njit(**FAST)
def decode(items, slab, lay, layer, page_table, open_slots, context_len, rows, q, k, v, scaling, window, softcap, out):  # type: ignore[no-untyped-def]
    """out[row, query heads of `head`] for each (sequence, KV head) in items [M, 2]; window 0 and softcap 0: none.

    rows [N]: each sequence's row among the step's tokens. q, out [T, Q, D]; k, v [T, H, D], the step's own tokens.
    """
    S, D = lay.page_size, lay.head_dim
    G = q.shape[1] // lay.num_heads
    scores = np.empty((G, S), np.float32)
    scaled = np.empty((G, D), np.float32)
    row, channels = np.empty(256, np.float32), np.empty(256, np.float32)
    for m in range(items.shape[0]):
        n, head = items[m, 0], items[m, 1]
        context, at = context_len[n], rows[n]
        result = out[at, head * G : (head + 1) * G]
        result[:] = 0.0
        # The token attends to itself first: its score starts the running maximum.
        largest, total = np.empty(G, np.float32), np.ones(G, np.float32)
        for g in range(G):
            for d in range(D):
                scaled[g, d] = q[at, head * G + g, d] * scaling
            score = dot(scaled[g], k[at, head], D)
            largest[g] = softcap * np.tanh(score / softcap) if softcap > 0 else score
            result[g] = v[at, head]
        first = max(context + 1 - window, 0) if window > 0 else 0
        num_pages = context // S
        attend_pages(slab, lay, page_table[n], first, num_pages, layer, head, softcap, scaled, scores, row, channels, largest, total, result)
        own = max(first - num_pages * S, 0)
        attend_runs(slab, lay, open_slots[n], layer, head, own, context - num_pages * S, softcap, scaled, scores, row, largest, total, result)
        for g in range(G):
            result[g] /= total[g]
