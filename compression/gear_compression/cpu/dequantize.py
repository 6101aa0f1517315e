"""Dequantising sealed pages into float32 scratch for a prompt chunk, where many queries share the work."""

import numba
import numpy as np

from gear_compression.cpu.decode import add_product, new_scratch, record_at, run_row
from gear_compression.cpu.rows import FAST, from_bf16, read_factors, read_row, read_scales


@numba.njit(**FAST)
def dequantize_part(slab, base, part, lay, out, is_keys, num_sinks, scratch):  # type: ignore[no-untyped-def]
    """out = one part of a record: keys [D, S] (channel by channel, as they are stored), values [S, D]."""
    V, n = part.num_vectors, part.vector_len
    read_scales(slab, base, part, scratch.scale, scratch.zero)
    read_row(slab, base + part.codes, V * n, part.bits, scratch.matrix)
    codes = scratch.matrix[: V * n].reshape(V, n)
    for i in range(V):
        for j in range(part.num_groups):
            scale, zero = scratch.scale[j * V + i], scratch.zero[j * V + i]
            first, last = j * part.group_size, (j + 1) * part.group_size
            row, target = codes[i, first:last], out[i, first:last]
            for t in range(last - first):
                target[t] = row[t] * scale + zero
    if part.rank:
        tokens, channels = read_factors(slab, base, part, lay.page_size, lay.head_dim, scratch.matrix)
        along, across = (channels, tokens) if is_keys else (tokens, channels)
        add_product(np.ascontiguousarray(along.T), across, 0, n, out)
    row = scratch.row
    for i in range(part.num_vectors * part.outliers):
        at = slab.u8[base + part.outlier_index + i]
        value = from_bf16(slab.u16[(base + part.outlier_value) // 2 + i])
        out[i // part.outliers, at] += value
    for t in range(num_sinks):
        read_row(slab, base + part.sinks + 2 * t * lay.head_dim, lay.head_dim, 16, row)
        for d in range(lay.head_dim):
            if is_keys:
                out[d, t] = row[d]
            else:
                out[t, d] = row[d]


@numba.njit(**FAST)
def transpose(tile, out):  # type: ignore[no-untyped-def]
    """out [S, D] = tile [D, S] turned, 16 rows at a time, so that a line of the cache is read once."""
    D, S = tile.shape
    for first in range(0, D, 16):
        block = tile[first : first + 16]
        for t in range(S):
            row = out[t, first : first + 16]
            for d in range(row.shape[0]):
                row[d] = block[d, t]


@numba.njit(**FAST)
def dequantize(items, slab, lay, layer, slots, first_page, keys, values):  # type: ignore[no-untyped-def]
    """Fill keys and values [H, n, D] with the (page, head) pairs of items [M, 2].

    slots [P]: sealed pages in order, from page `first_page` of a sequence on. The p-th fills the tokens
    [p·S, (p + 1)·S) of keys and values.
    """
    S, D = lay.page_size, lay.head_dim
    scratch = new_scratch(lay, 1)
    tile = np.empty((D, S), np.float32)  # near: rows of the result lie so far apart that they drive each other out
    for m in range(items.shape[0]):
        p, head = items[m, 0], items[m, 1]
        k, v = keys[head, p * S : (p + 1) * S], values[head, p * S : (p + 1) * S]
        if lay.record_bytes == 0:
            for t in range(S):
                read_row(slab, run_row(lay, slots[p], layer, head, 0, t), D, lay.element_bits, k[t])
                read_row(slab, run_row(lay, slots[p], layer, head, 1, t), D, lay.element_bits, v[t])
            continue
        base = record_at(lay, slots[p], head)
        num_sinks = lay.sink_tokens if first_page + p == 0 else 0
        dequantize_part(slab, base, lay.keys, lay, tile, True, num_sinks, scratch)
        transpose(tile, k)
        dequantize_part(slab, base, lay.values, lay, v, False, num_sinks, scratch)
