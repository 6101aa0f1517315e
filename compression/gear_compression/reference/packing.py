"""The bytes of one part of a record: what `layout.py` describes, written and read in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.layout import PageLayout, PartLayout
from gear_compression.reference.codes import Codes
from gear_compression.reference.low_rank import LowRank, factor_zero
from gear_compression.reference.planes import pack_codes, unpack_codes
from gear_compression.reference.tiles import pack_factors, pack_tiles, unpack_factors, unpack_tiles


@dataclass(slots=True)
class CompressedPart:
    """Keys or values of one page and head."""

    codes: Codes
    factors: LowRank | None
    outlier_index: Tensor  # [V, o] int64, position in the vector
    outlier_value: Tensor  # [V, o] float32, bf16 values: what is missing there, to be added
    sinks: Tensor  # [sink_tokens, D] float32, bf16 values; zeros unless the page begins a sequence


def _put(record: Tensor, at: int, x: Tensor) -> None:
    raw = x.contiguous().view(torch.uint8).flatten()
    record[at : at + raw.numel()] = raw


def _get(record: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return record[at : at + num_bytes].clone().view(dtype).view(shape)


def pack_part(record: Tensor, at: PartLayout, part: CompressedPart) -> None:
    """Write `part` into record [record_bytes] uint8."""
    codes = part.codes
    packed = pack_tiles(codes.codes, at) if at.tiled else pack_codes(codes.codes.flatten(), at.bits)
    _put(record, at.codes, packed)
    if at.scale_bits == 16:
        _put(record, at.scale, codes.scale.T.bfloat16())
        if not at.symmetric:
            _put(record, at.zero, codes.zero.T.bfloat16())
    else:
        _put(record, at.scale, (codes.scale.T / codes.scale_unit).round().to(torch.uint8))
        if not at.symmetric:
            _put(record, at.zero, (codes.zero.T / codes.zero_unit).round().to(torch.int8))
        _put(record, at.unit, torch.stack([codes.scale_unit, codes.zero_unit]).bfloat16())
    if part.factors is not None:
        tokens, channels = _pack_factors(part.factors, at)
        _put(record, at.tokens_factor, tokens)
        _put(record, at.channels_factor, channels)
        if at.factor_bits < 16:
            _put(record, at.factor_scale, part.factors.scale.bfloat16())
    by_vector = (part.outlier_value.bfloat16(), part.outlier_index.to(torch.uint8))
    value, index = (x.T if at.tiled else x for x in by_vector)
    _put(record, at.outlier_value, value)
    _put(record, at.outlier_index, index)
    _put(record, at.sinks, part.sinks.bfloat16())


def unpack_part(record: Tensor, at: PartLayout, layout: PageLayout) -> CompressedPart:
    """Read what `pack_part` wrote. record [record_bytes] uint8."""
    V, n = at.num_vectors, at.vector_len
    packed = _get(record, at.codes, (V * n * at.bits // 8,), torch.uint8)
    scale_shape = (at.num_groups, V)
    scale_unit = zero_unit = torch.zeros(())
    if at.scale_bits == 16:
        scale = _get(record, at.scale, scale_shape, torch.bfloat16).float()
        zero = scale if at.symmetric else _get(record, at.zero, scale_shape, torch.bfloat16).float()
    else:
        scale_unit, zero_unit = _get(record, at.unit, (2,), torch.bfloat16).float()
        scale = _get(record, at.scale, scale_shape, torch.uint8).float() * scale_unit
        zero = scale if at.symmetric else _get(record, at.zero, scale_shape, torch.int8).float() * zero_unit
    if at.symmetric:
        zero = scale * (-((1 << at.bits) - 1) / 2)
    codes = unpack_tiles(packed, at) if at.tiled else unpack_codes(packed, at.bits).view(V, n)
    outlier_shape = (at.outliers, V) if at.tiled else (V, at.outliers)
    index = _get(record, at.outlier_index, outlier_shape, torch.uint8)
    value = _get(record, at.outlier_value, outlier_shape, torch.bfloat16)
    return CompressedPart(
        codes=Codes(codes, scale.T, zero.T, scale_unit, zero_unit),
        factors=_unpack_factors(record, at, layout) if at.rank else None,
        outlier_index=(index.T if at.tiled else index).long(),
        outlier_value=(value.T if at.tiled else value).float(),
        sinks=_get(record, at.sinks, (layout.config.sink_tokens, layout.head_dim), torch.bfloat16).float(),
    )


def _pack_factors(factors: LowRank, at: PartLayout) -> tuple[Tensor, Tensor]:
    """Of tokens and of channels."""
    if at.factor_bits == 16:
        tokens, channels = factors.tokens.bfloat16(), factors.channels.bfloat16()
        return (tokens.T if at.tiled and at.is_keys else tokens), channels
    zero = factor_zero(at.factor_bits)
    codes = (factors.tokens + zero, factors.channels + zero)
    if at.tiled:
        return pack_factors(*codes)
    tokens, channels = (pack_codes(factor.flatten(), at.factor_bits) for factor in codes)
    return tokens, channels


def _unpack_factors(record: Tensor, at: PartLayout, layout: PageLayout) -> LowRank:
    R, S, D = at.rank, layout.page_size, layout.head_dim
    if at.factor_bits == 16:
        turned = at.tiled and at.is_keys
        tokens = _get(record, at.tokens_factor, (S, R) if turned else (R, S), torch.bfloat16).float()
        channels = _get(record, at.channels_factor, (R, D), torch.bfloat16).float()
        return LowRank(tokens.T if turned else tokens, channels, torch.ones(R))
    bits = at.factor_bits
    packed = tuple(
        _get(record, offset, (R * n * bits // 8,), torch.uint8)
        for offset, n in ((at.tokens_factor, S), (at.channels_factor, D))
    )
    if at.tiled:
        codes = unpack_factors(packed[0], packed[1], R)
    else:
        codes = tuple(unpack_codes(x, bits).view(R, -1) for x in packed)  # type: ignore[assignment]
    zero = factor_zero(bits)
    scale = _get(record, at.factor_scale, (R,), torch.bfloat16).float()
    return LowRank(codes[0].float() - zero, codes[1].float() - zero, scale)
