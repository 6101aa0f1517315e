"""Reading rows of a slab into float32: packed codes, bf16 and float32, whatever the layout says lies there.

The slab is seen as flat uint8, int8, uint16 and float32 arrays over the same bytes; offsets are in bytes.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

# Reductions may be reordered for the vector units; NaN and infinity keep their meaning.
FAST = {"fastmath": {"contract", "reassoc", "nsz", "arcp"}, "nogil": True, "cache": True, "error_model": "numpy"}


class Slab(NamedTuple):
    """One pool, four views of its bytes."""

    u8: NDArray[np.uint8]
    i8: NDArray[np.int8]
    u16: NDArray[np.uint16]
    f32: NDArray[np.float32]

    @classmethod
    def of(cls, u8: NDArray[np.uint8]) -> "Slab":
        return cls(u8, u8.view(np.int8), u8.view(np.uint16), u8.view(np.float32))


@numba.njit(inline="always")
def from_bf16(bits):  # type: ignore[no-untyped-def]
    return np.uint32(np.uint32(bits) << 16).view(np.float32)


@numba.njit(**FAST)
def read_plane(slab, at, n, width, weight, out):  # type: ignore[no-untyped-def]
    """out[i] += weight · digit i of a plane of n digits, `width` bits each: byte j holds j, j + n·width/8, …"""
    num_bytes = n * width // 8
    mask = np.uint8((1 << width) - 1)
    raw = slab.u8[at : at + num_bytes]
    for i in range(8 // width):
        shift = np.uint8(width * i)
        part = out[i * num_bytes : (i + 1) * num_bytes]
        for j in range(num_bytes):
            part[j] += weight * np.float32((raw[j] >> shift) & mask)


@numba.njit(**FAST)
def read_row(slab, at, n, bits, out):  # type: ignore[no-untyped-def]
    """out[:n] = the n entries at byte `at`: codes of 2, 3, 4, 5 or 8 bits, bf16 (16) or float32 (32)."""
    if bits == 4:
        half = n // 2
        raw = slab.u8[at : at + half]
        low, high = out[:half], out[half:n]
        for j in range(half):
            low[j] = np.float32(raw[j] & np.uint8(15))
            high[j] = np.float32(raw[j] >> np.uint8(4))
    elif bits == 8:
        raw = slab.u8[at : at + n]
        for j in range(n):
            out[j] = np.float32(raw[j])
    elif bits == 16:
        words = slab.u16[at // 2 : at // 2 + n]
        for j in range(n):
            out[j] = from_bf16(words[j])
    elif bits == 32:
        out[:n] = slab.f32[at // 4 : at // 4 + n]
    else:
        out[:n] = 0.0
        low_width = 2 if bits < 4 else 4
        read_plane(slab, at, n, low_width, np.float32(1), out)
        if bits > low_width:
            read_plane(slab, at + n * low_width // 8, n, 1, np.float32(1 << low_width), out)


@numba.njit(**FAST)
def read_scales(slab, base, part, scale, zero):  # type: ignore[no-untyped-def]
    """scale, zero [num_groups · num_vectors] of a part, group by group."""
    n = part.num_vectors * part.num_groups
    read_row(slab, base + part.scale, n, part.scale_bits, scale)
    if part.scale_bits == 8:
        unit = from_bf16(slab.u16[(base + part.unit) // 2])
        for i in range(n):
            scale[i] *= unit
    if part.symmetric:
        half = np.float32(0.5 * ((1 << part.bits) - 1))
        for i in range(n):
            zero[i] = -half * scale[i]
    elif part.scale_bits == 16:
        read_row(slab, base + part.zero, n, 16, zero)
    else:
        unit = from_bf16(slab.u16[(base + part.unit) // 2 + 1])
        counts = slab.i8[base + part.zero : base + part.zero + n]
        for i in range(n):
            zero[i] = np.float32(counts[i]) * unit


@numba.njit(**FAST)
def read_factors(slab, base, part, S, D, out):  # type: ignore[no-untyped-def]
    """The low-rank factors, as views of out: tokens [R, S] and channels [R, D], the stored scale in the channels."""
    R, bits = part.rank, part.factor_bits
    tokens, channels = out[: R * S].reshape(R, S), out[R * S : R * (S + D)].reshape(R, D)
    read_row(slab, base + part.tokens_factor, R * S, bits, out)
    read_row(slab, base + part.channels_factor, R * D, bits, out[R * S :])
    if bits < 16:
        zero = np.float32((1 << (bits - 1)) - 1)  # reference/low_rank.py: factor_zero
        for r in range(R):
            scale = from_bf16(slab.u16[(base + part.factor_scale) // 2 + r])
            for t in range(S):
                tokens[r, t] -= zero
            for d in range(D):
                channels[r, d] = (channels[r, d] - zero) * scale
    return tokens, channels


@numba.njit(**FAST)
def dot(a, b, n):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(n):
        total += a[i] * b[i]
    return total


@numba.njit(**FAST)
def exp_in_place(x):  # type: ignore[no-untyped-def]
    """x[i] = exp(x[i]) for x ≤ 0, to 2e-7 relative; a plain call of exp would not use the vector units.

    exp(x) = 2^n · 2^f with n whole and |f| ≤ 1/2; 2^f by its Taylor polynomial, 2^n by the exponent's bits.
    """
    for i in range(x.shape[0]):
        y = x[i] * np.float32(1.4426950408889634)
        n = np.floor(y + np.float32(0.5))
        f = (y - n) * np.float32(0.6931471805599453)
        p = np.float32(1 / 5040)
        p = p * f + np.float32(1 / 720)
        p = p * f + np.float32(1 / 120)
        p = p * f + np.float32(1 / 24)
        p = p * f + np.float32(1 / 6)
        p = p * f + np.float32(0.5)
        p = p * f + np.float32(1.0)
        p = p * f + np.float32(1.0)
        power = np.uint32(np.uint32(np.int32(n) + 127) << 23).view(np.float32)
        x[i] = np.float32(0.0) if x[i] <= np.float32(-87.0) else p * power  # NaN stays NaN
