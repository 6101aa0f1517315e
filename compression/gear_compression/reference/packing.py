"""The bytes of one part of a record: what `layout.py` describes, written and read in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.layout import PageLayout, PartLayout
from gear_compression.reference.codes import Codes
from gear_compression.reference.low_rank import LowRank, factor_zero

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}  # bit widths, least significant first


@dataclass(slots=True)
class CompressedPart:
    """Keys or values of one page and head."""

    codes: Codes
    factors: LowRank | None
    outlier_index: Tensor  # [V, o] int64, position in the vector
    outlier_value: Tensor  # [V, o] float32, bf16 values: what is missing there, to be added
    sinks: Tensor  # [sink_tokens, D] float32, bf16 values; zeros unless the page begins a sequence


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """codes [m] integers → [m · bits / 8] uint8, plane after plane."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        per_byte = 8 // width
        digits = ((codes.int() >> shift) & ((1 << width) - 1)).view(per_byte, -1)
        weights = torch.tensor([1 << (width * i) for i in range(per_byte)], dtype=torch.int32)[:, None]
        planes.append((digits * weights).sum(0).to(torch.uint8))
        shift += width
    return torch.cat(planes)


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """[m · bits / 8] uint8 → codes [m] uint8."""
    m = packed.shape[0] * 8 // bits
    codes = torch.zeros(m, dtype=torch.int32)
    at, shift = 0, 0
    for width in PLANES[bits]:
        plane = packed[at : at + m * width // 8].int()
        digits = [(plane >> (width * i)) & ((1 << width) - 1) for i in range(8 // width)]
        codes += torch.cat(digits) << shift
        at, shift = at + len(plane), shift + width
    return codes.to(torch.uint8)


def _put(record: Tensor, at: int, x: Tensor) -> None:
    raw = x.contiguous().view(torch.uint8).flatten()
    record[at : at + raw.numel()] = raw


def _get(record: Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return record[at : at + num_bytes].clone().view(dtype).view(shape)


def pack_part(record: Tensor, at: PartLayout, part: CompressedPart) -> None:
    """Write `part` into record [record_bytes] uint8."""
    codes = part.codes
    _put(record, at.codes, pack_codes(codes.codes.flatten(), at.bits))
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
        zero = 0 if at.factor_bits == 16 else factor_zero(at.factor_bits)
        for offset, factor in ((at.tokens_factor, part.factors.tokens), (at.channels_factor, part.factors.channels)):
            stored = (
                factor.bfloat16() if at.factor_bits == 16 else pack_codes((factor + zero).flatten(), at.factor_bits)
            )
            _put(record, offset, stored)
        if at.factor_bits < 16:
            _put(record, at.factor_scale, part.factors.scale.bfloat16())
    _put(record, at.outlier_value, part.outlier_value.bfloat16())
    _put(record, at.outlier_index, part.outlier_index.to(torch.uint8))
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
    return CompressedPart(
        codes=Codes(unpack_codes(packed, at.bits).view(V, n), scale.T, zero.T, scale_unit, zero_unit),
        factors=_unpack_factors(record, at, layout) if at.rank else None,
        outlier_index=_get(record, at.outlier_index, (V, at.outliers), torch.uint8).long(),
        outlier_value=_get(record, at.outlier_value, (V, at.outliers), torch.bfloat16).float(),
        sinks=_get(record, at.sinks, (layout.config.sink_tokens, layout.head_dim), torch.bfloat16).float(),
    )


def _unpack_factors(record: Tensor, at: PartLayout, layout: PageLayout) -> LowRank:
    def factor(offset: int, n: int) -> Tensor:
        if at.factor_bits == 16:
            return _get(record, offset, (at.rank, n), torch.bfloat16).float()
        packed = _get(record, offset, (at.rank * n * at.factor_bits // 8,), torch.uint8)
        return unpack_codes(packed, at.factor_bits).view(at.rank, n).float() - factor_zero(at.factor_bits)

    scale = torch.ones(at.rank)
    if at.factor_bits < 16:
        scale = _get(record, at.factor_scale, (at.rank,), torch.bfloat16).float()
    return LowRank(factor(at.tokens_factor, layout.page_size), factor(at.channels_factor, layout.head_dim), scale)
