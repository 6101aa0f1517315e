"""Sealing: one page and head to its record, the same steps as `reference/pages.py` in compiled loops.

Sums run in another order than in the definition, so where a value lies on the edge between two codes the byte may
differ; a page never depends on what else is sealed beside it.
"""

import numba
import numpy as np

from gear_compression.cpu.decode import add_product, record_at
from gear_compression.cpu.rows import dot, from_bf16
from gear_compression.reference.codes import GAUSSIAN_STEP
from gear_compression.reference.low_rank import NUM_ROUNDS
from gear_compression.reference.rounding import TINY as _TINY

TINY = np.float32(_TINY)
GAUSSIAN_STEPS = np.array([GAUSSIAN_STEP.get(bits, np.inf) for bits in range(9)], np.float32)
EXACT = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}


@numba.njit(inline="always")
def bf16_nearest(x):  # type: ignore[no-untyped-def]
    """Bits of the nearest bf16, ties to even."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(32767) + ((bits >> 16) & 1)) >> 16)


@numba.njit(inline="always")
def bf16_up(x):  # type: ignore[no-untyped-def]
    """Bits of the smallest bf16 that is at least x."""
    bits = np.float32(x).view(np.uint32)
    high = np.uint16(bits >> 16)
    if (bits & np.uint32(65535)) != 0 and bits < np.uint32(0x80000000):
        high += np.uint16(1)
    return high


@numba.njit(inline="always")
def bf16_down(x):  # type: ignore[no-untyped-def]
    return bf16_up(-x) ^ np.uint16(0x8000)


@numba.njit(**EXACT)
def write_row(slab, at, n, bits, values):  # type: ignore[no-untyped-def]
    """Pack values[:n], whole numbers, as codes of `bits` at byte `at` (bf16 when bits is 16)."""
    if bits == 16:
        for i in range(n):
            slab.u16[at // 2 + i] = bf16_nearest(values[i])
        return
    low_width = bits if bits in (2, 4, 8) else bits - 1
    write_plane(slab, at, n, low_width, 0, values)
    if bits > low_width:
        write_plane(slab, at + n * low_width // 8, n, 1, low_width, values)


@numba.njit(**EXACT)
def write_plane(slab, at, n, width, shift, values):  # type: ignore[no-untyped-def]
    num_bytes = n * width // 8
    mask = np.uint8((1 << width) - 1)
    raw = slab.u8[at : at + num_bytes]
    raw[:] = 0
    for i in range(8 // width):
        part, place = values[i * num_bytes : (i + 1) * num_bytes], np.uint8(width * i)
        for j in range(num_bytes):
            raw[j] |= ((np.uint8(np.int32(part[j])) >> np.uint8(shift)) & mask) << place


@numba.njit(**EXACT)
def select_outliers(x, num_outliers, skip, index, kept):  # type: ignore[no-untyped-def]
    """index [o]: o/2 smallest then o/2 largest of x[skip:]; of equal entries the earlier counts as the smaller."""
    half = num_outliers // 2
    for i in range(num_outliers):
        best = -1
        for t in range(skip, x.shape[0]):
            if not kept[t]:
                continue
            if best < 0 or (x[t] < x[best] if i < half else x[t] >= x[best]):
                best = t
        index[i] = best
        kept[best] = False


@numba.njit(**EXACT)
def orthonormalize(a):  # type: ignore[no-untyped-def]
    """Rows of a [R, S] in place: each orthogonal to those before and of length 1, 0 if nothing is left."""
    R, S = a.shape
    for r in range(R):
        size = np.sqrt(dot(a[r], a[r], S))
        for _ in range(2):
            for earlier in range(r):
                overlap = dot(a[earlier], a[r], S)
                for t in range(S):
                    a[r, t] -= overlap * a[earlier, t]
        left = np.sqrt(dot(a[r], a[r], S))
        scale = np.float32(0.0) if left <= np.float32(1e-5) * size else np.float32(1.0) / max(left, TINY)
        for t in range(S):
            a[r, t] *= scale


@numba.njit(**EXACT)
def fit(x, start, a, b):  # type: ignore[no-untyped-def]
    """x [S, D] ≈ aᵀ b with a [R, S] orthonormal, by subspace iteration from `start` [R, S] (reference/low_rank.py)."""
    S, D = x.shape
    largest = TINY
    for s in range(S):
        for d in range(D):
            largest = max(largest, abs(x[s, d]))
    unit = x / largest
    a[:] = start
    orthonormalize(a)
    for _ in range(NUM_ROUNDS):
        b[:] = 0.0
        add_product(a, unit, 0, D, b)
        for r in range(a.shape[0]):
            for s in range(S):
                a[r, s] = dot(unit[s], b[r], D)
        orthonormalize(a)
    b[:] = 0.0
    add_product(a, unit, 0, D, b)
    b *= largest


@numba.njit(**EXACT)
def code_signed(rows, bits):  # type: ignore[no-untyped-def]
    """rows [R, n] → codes in place; returns scale [R] (reference/low_rank.py, _signed_codes)."""
    half, zero = np.float32(0.5), np.float32((1 << (bits - 1)) - 1)
    top = np.float32((1 << bits) - 1)
    scale = np.empty(rows.shape[0], np.float32)
    for r in range(rows.shape[0]):
        low, high = np.min(rows[r]) / (-zero - half), np.max(rows[r]) / (top - zero + half)
        scale[r] = max(max(low, high), TINY)
        for i in range(rows.shape[1]):
            rows[r, i] = min(max(np.rint(rows[r, i] / scale[r]) + zero, np.float32(0)), top)
    return scale


@numba.njit(**EXACT)
def store_factors(slab, base, part, a, b):  # type: ignore[no-untyped-def]
    """Write the factors; a [R, S] and b [R, D] become what will be read back, the scale folded into b."""
    bits = part.factor_bits
    S, D = a.shape[1], b.shape[1]
    token_scale, channel_scale = np.ones(part.rank, np.float32), np.ones(part.rank, np.float32)
    if bits < 16:
        token_scale, channel_scale = code_signed(a, bits), code_signed(b, bits)
    zero = np.float32((1 << (bits - 1)) - 1)
    write_row(slab, base + part.tokens_factor, part.rank * S, bits, a.reshape(-1))
    write_row(slab, base + part.channels_factor, part.rank * D, bits, b.reshape(-1))
    for r in range(part.rank):
        if bits < 16:
            stored = bf16_up(max(token_scale[r] * channel_scale[r], TINY))
            slab.u16[(base + part.factor_scale) // 2 + r] = stored
            a[r] -= zero
            b[r] = (b[r] - zero) * from_bf16(stored)
        else:
            for s in range(S):
                a[r, s] = from_bf16(bf16_nearest(a[r, s]))
            for d in range(D):
                b[r, d] = from_bf16(bf16_nearest(b[r, d]))


@numba.njit(**EXACT)
def subtract_product(x, a, b, is_keys):  # type: ignore[no-untyped-def]
    """x (keys [D, S], values [S, D]) −= the product of a [R, S] and b [R, D]."""
    for r in range(a.shape[0]):
        along, across = (b[r], a[r]) if is_keys else (a[r], b[r])
        for i in range(x.shape[0]):
            row, weight = x[i], along[i]
            for j in range(x.shape[1]):
                row[j] -= weight * across[j]


@numba.njit(**EXACT)
def store_scales(slab, base, part, low, high, mean_square, scale, zero):  # type: ignore[no-untyped-def]
    """Round low, high [G, V] to stored zeros and scales (zero down, scale up) and write both."""
    G, V = low.shape
    levels = np.float32((1 << part.bits) - 1)
    zero_unit, scale_unit = np.float32(0), np.float32(0)
    if part.symmetric:
        step = np.float32(GAUSSIAN_STEPS[part.bits])
        scale[:] = np.fmin(np.maximum(high, -low) * np.float32(2 / levels), np.sqrt(mean_square) * step)
    else:
        if part.scale_bits == 8:
            zero_unit = from_bf16(bf16_up(max(np.max(np.abs(low)) / np.float32(127), TINY)))
        for j in range(G):
            for i in range(V):
                if part.scale_bits == 16:
                    bits = bf16_down(low[j, i])
                    slab.u16[(base + part.zero) // 2 + j * V + i] = bits
                    zero[j, i] = from_bf16(bits)
                else:
                    count = min(max(np.floor(low[j, i] / zero_unit), np.float32(-128)), np.float32(127))
                    slab.i8[base + part.zero + j * V + i] = np.int8(count)
                    zero[j, i] = count * zero_unit
                scale[j, i] = (high[j, i] - zero[j, i]) / levels
    if part.scale_bits == 8:
        scale_unit = from_bf16(bf16_up(max(np.max(scale) / np.float32(255), TINY)))
    for j in range(G):
        for i in range(V):
            if part.scale_bits == 16:
                bits = bf16_up(max(scale[j, i], TINY))
                slab.u16[(base + part.scale) // 2 + j * V + i] = bits
                scale[j, i] = from_bf16(bits)
            else:
                count = min(max(np.ceil(scale[j, i] / scale_unit), np.float32(1)), np.float32(255))
                slab.u8[base + part.scale + j * V + i] = np.uint8(count)
                scale[j, i] = count * scale_unit
            if part.symmetric:
                zero[j, i] = scale[j, i] * (-levels * np.float32(0.5))
    if part.scale_bits == 8:
        slab.u16[(base + part.unit) // 2] = bf16_up(scale_unit)
        slab.u16[(base + part.unit) // 2 + 1] = bf16_up(zero_unit)


@numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nnan", "nsz"})
def spread_of(x, kept):  # type: ignore[no-untyped-def]
    """(smallest, largest, sum of squares, count) of what is kept of x, for the vector units: no branch, no NaN."""
    smallest, largest = np.float32(np.inf), np.float32(-np.inf)
    squares, count = np.float32(0), np.int32(0)
    for t in range(x.shape[0]):
        value = x[t]
        smallest = min(smallest, value if kept[t] else np.float32(np.inf))
        largest = max(largest, value if kept[t] else np.float32(-np.inf))
        squares += value * value if kept[t] else np.float32(0)
        count += np.int32(kept[t])
    return smallest, largest, squares, count


@numba.njit(**EXACT)
def quantize(slab, base, part, rest, kept):  # type: ignore[no-untyped-def]
    """Write codes, scales and zeros of rest [V, n]; rest becomes what the codes miss. The range is that of `kept`."""
    V, n = rest.shape
    G, size = part.num_groups, part.group_size
    low, high, mean_square = np.zeros((G, V), np.float32), np.zeros((G, V), np.float32), np.zeros((G, V), np.float32)
    for i in range(V):
        for j in range(G):
            row, keep = rest[i, j * size : (j + 1) * size], kept[i, j * size : (j + 1) * size]
            smallest, largest, squares, count = spread_of(row, keep)
            if count:
                low[j, i], high[j, i], mean_square[j, i] = smallest, largest, squares / np.float32(count)
    scale, zero = np.empty((G, V), np.float32), np.empty((G, V), np.float32)
    store_scales(slab, base, part, low, high, mean_square, scale, zero)
    levels = np.float32((1 << part.bits) - 1)
    codes = np.empty((V, n), np.float32)
    for i in range(V):
        for j in range(G):
            row, target = rest[i, j * size : (j + 1) * size], codes[i, j * size : (j + 1) * size]
            step, origin = scale[j, i], zero[j, i]
            for t in range(size):
                target[t] = min(max(np.rint((row[t] - origin) / step), np.float32(0)), levels)
            for t in range(size):
                row[t] -= target[t] * step + origin
    write_row(slab, base + part.codes, V * n, part.bits, codes.reshape(-1))


@numba.njit(**EXACT)
def seal_part(slab, base, part, x, is_keys, num_sinks, start):  # type: ignore[no-untyped-def]
    """Write one part of a record: x [S, D] float32, the keys or values of one page and head."""
    S, D = x.shape
    for t in range(num_sinks):
        write_row(slab, base + part.sinks + 2 * t * D, D, 16, x[t])
    rest = np.ascontiguousarray(x.T) if is_keys else x.copy()
    kept = np.ones(rest.shape, np.bool_)
    for t in range(num_sinks):
        if is_keys:
            rest[:, t], kept[:, t] = 0.0, False
        else:
            rest[t], kept[t] = 0.0, False
    V, n = rest.shape
    index = np.empty((V, part.outliers), np.int64)
    for i in range(V if part.outliers else 0):
        free = np.ones(n, np.bool_)
        select_outliers(rest[i], part.outliers, num_sinks if is_keys else 0, index[i], free)
        kept[i] &= free
    a, b = np.empty((part.rank, S), np.float32), np.empty((part.rank, D), np.float32)
    if part.rank and part.low_rank_first:
        fit_kept(rest, kept, is_keys, start, a, b)
        store_factors(slab, base, part, a, b)
        subtract_product(rest, a, b, is_keys)
    quantize(slab, base, part, rest, kept)
    if part.rank and not part.low_rank_first:
        fit_kept(rest, kept, is_keys, start, a, b)
        store_factors(slab, base, part, a, b)
        subtract_product(rest, a, b, is_keys)
    for i in range(V):
        for o in range(part.outliers):
            slab.u8[base + part.outlier_index + i * part.outliers + o] = index[i, o]
            slab.u16[(base + part.outlier_value) // 2 + i * part.outliers + o] = bf16_nearest(rest[i, index[i, o]])


@numba.njit(**EXACT)
def fit_kept(rest, kept, is_keys, start, a, b):  # type: ignore[no-untyped-def]
    """Fit the factors to `rest` (keys [D, S], values [S, D]) with zeros where not kept."""
    masked = np.where(kept, rest, np.float32(0))
    fit(np.ascontiguousarray(masked.T) if is_keys else masked, start, a, b)


@numba.njit(**EXACT)
def seal(items, slab, lay, slots, k, v, is_first, key_start, value_start):  # type: ignore[no-untyped-def]
    """Seal the (page, head) pairs of items [M, 2]: k, v [P, S, H, D] float32, page p into slots[p].

    key_start, value_start [R, S]: the fixed start of the subspace iteration.
    """
    for m in range(items.shape[0]):
        p, head = items[m, 0], items[m, 1]
        base = record_at(lay, slots[p], head)
        num_sinks = lay.sink_tokens if is_first[p] else 0
        seal_part(slab, base, lay.keys, np.ascontiguousarray(k[p, :, head]), True, num_sinks, key_start)
        seal_part(slab, base, lay.values, np.ascontiguousarray(v[p, :, head]), False, num_sinks, value_start)
