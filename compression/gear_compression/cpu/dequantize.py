"""Dequantising sealed pages into float32 scratch for a prompt chunk, where many queries share the work."""

import numba
import numpy as np

from gear_compression.cpu.decode import run_row
from gear_compression.cpu.rows import FAST, read_factors, read_row, read_scale


@numba.njit(**FAST)
def dequantize_part(slab, base, part, lay, out, is_keys, num_sinks):  # type: ignore[no-untyped-def]
    """out = one part of a record: keys [D, S] (channel by channel, as they are stored), values [S, D]."""
    row, tokens, channels = np.empty(256, np.float32), np.empty(256, np.float32), np.empty(256, np.float32)
    n = part.vector_len
    for i in range(part.num_vectors):
        read_row(slab, base + part.codes + i * n * part.bits // 8, n, part.bits, row)
        target = out[i]
        for j in range(part.num_groups):
            scale, zero = read_scale(slab, base, part, i * part.num_groups + j)
            for t in range(j * part.group_size, (j + 1) * part.group_size):
                target[t] = row[t] * scale + zero
    for r in range(part.rank):
        read_factors(slab, base, part, lay.page_size, lay.head_dim, r, tokens, channels)
        along, across = (channels, tokens) if is_keys else (tokens, channels)
        for i in range(part.num_vectors):
            target, weight = out[i], along[i]
            for j in range(n):
                target[j] += weight * across[j]
    for i in range(part.num_vectors * part.outliers):
        at = slab.u8[base + part.outlier_index + i]
        value = np.uint32(np.uint32(slab.u16[(base + part.outlier_value) // 2 + i]) << 16).view(np.float32)
        out[i // part.outliers, at] += value
    for t in range(num_sinks):
        read_row(slab, base + part.sinks + 2 * t * lay.head_dim, lay.head_dim, 16, row)
        for d in range(lay.head_dim):
            if is_keys:
                out[d, t] = row[d]
            else:
                out[t, d] = row[d]


@numba.njit(**FAST)
def dequantize(items, slab, lay, layer, slots, keys, values):  # type: ignore[no-untyped-def]
    """Fill keys [H, D, n] and values [H, n, D] with the (page, head) pairs of items [M, 2].

    slots [P]: a sequence's sealed pages, in order. Page p fills the tokens [p·S, (p + 1)·S).
    """
    S, D = lay.page_size, lay.head_dim
    row = np.empty(256, np.float32)
    for m in range(items.shape[0]):
        p, head = items[m, 0], items[m, 1]
        k, v = keys[head, :, p * S : (p + 1) * S], values[head, p * S : (p + 1) * S]
        if lay.record_bytes == 0:
            for t in range(S):
                read_row(slab, run_row(lay, slots[p], layer, head, 0, t), D, lay.element_bits, row)
                k[:, t] = row[:D]
                read_row(slab, run_row(lay, slots[p], layer, head, 1, t), D, lay.element_bits, row)
                v[t] = row[:D]
            continue
        base = slots[p] * lay.slot_bytes + (layer * lay.num_heads + head) * lay.record_bytes
        num_sinks = lay.sink_tokens if p == 0 else 0
        dequantize_part(slab, base, lay.keys, lay, k, True, num_sinks)
        dequantize_part(slab, base, lay.values, lay, v, False, num_sinks)
