"""Compress and decompress whole pages: codes, low rank, outliers and sinks composed, packed as `layout.py` says.

K and V come and go in the stored basis: where the format says `rotate`, they are rotated already (`rotation.py`).
"""

import torch
from torch import Tensor

from gear_compression.config import PartConfig
from gear_compression.layout import PageLayout
from gear_compression.reference import low_rank, outliers
from gear_compression.reference.codes import quantize
from gear_compression.reference.packing import CompressedPart, pack_part, unpack_part


def compress_part(x: Tensor, part: PartConfig, is_keys: bool, sink_tokens: int, is_first: bool) -> CompressedPart:
    """x [S, D] float32. Outliers leave first; the codes then need not stretch to them (GEAR, section 3)."""
    num_sinks = sink_tokens if is_first else 0
    sinks = torch.zeros(sink_tokens, x.shape[1])
    sinks[:num_sinks] = x[:num_sinks].bfloat16().float()
    x = x.clone()
    x[:num_sinks] = 0.0  # exact elsewhere: they must not weigh in the statistics

    def turn(t: Tensor) -> Tensor:  # tokens × channels ↔ vectors × entries; its own inverse
        return t.T if is_keys else t

    index = outliers.select(turn(x), part.outliers, num_sinks if is_keys else 0)
    left_out = outliers.mask(index, turn(x).shape[1])
    kept = ~left_out
    (kept[:, :num_sinks] if is_keys else kept[:num_sinks]).fill_(False)

    factors = None
    rest = turn(x)
    if part.rank and part.low_rank_first:
        factors = low_rank.store_factors(*low_rank.fit(turn(rest.masked_fill(left_out, 0.0)), part.rank), part)
        rest = rest - turn(factors.product())
    codes = quantize(rest.contiguous(), kept, part)
    missing = rest - codes.dequantize()
    if part.rank and not part.low_rank_first:
        factors = low_rank.store_factors(*low_rank.fit(turn(missing.masked_fill(~kept, 0.0)), part.rank), part)
        missing = missing - turn(factors.product())
    return CompressedPart(codes, factors, index, missing.gather(1, index).bfloat16().float(), sinks)


def decompress_part(compressed: CompressedPart, is_keys: bool, num_sinks: int) -> Tensor:
    """[S, D] float32."""
    vectors = compressed.codes.dequantize()
    if compressed.factors is not None:
        product = compressed.factors.product()
        vectors = vectors + (product.T if is_keys else product)
    vectors = vectors.scatter_add(1, compressed.outlier_index, compressed.outlier_value)
    x = vectors.T.clone() if is_keys else vectors
    x[:num_sinks] = compressed.sinks[:num_sinks]
    return x


def compress_pages(k: Tensor, v: Tensor, layout: PageLayout, is_first: Tensor, layer: int = 0) -> Tensor:
    """k, v [P, S, H, D] of `layer` → records [P, H, record_bytes] uint8. `is_first` [P] bool: begins a sequence.

    Each page and head is compressed alone, so a page's bytes never depend on its neighbours.
    """
    P, _, H, _ = k.shape
    at = layout.layers[layer]
    key_config, value_config = layout.config.parts(layer)
    records = torch.zeros(P, H, at.record_bytes, dtype=torch.uint8)
    for p in range(P):
        for h in range(H):
            for x, config, part, is_keys in ((k, key_config, at.keys, True), (v, value_config, at.values, False)):
                compressed = compress_part(
                    x[p, :, h].float(), config, is_keys, layout.config.sink_tokens, bool(is_first[p])
                )
                pack_part(records[p, h], part, compressed)
    return records


def decompress_pages(records: Tensor, layout: PageLayout, is_first: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    """records [P, H, record_bytes] of `layer` → k, v [P, S, H, D] float32."""
    P, H, _ = records.shape
    at = layout.layers[layer]
    k = torch.empty(P, layout.page_size, H, layout.head_dim)
    v = torch.empty_like(k)
    for p in range(P):
        num_sinks = layout.config.sink_tokens if is_first[p] else 0
        for h in range(H):
            k[p, :, h] = decompress_part(unpack_part(records[p, h], at.keys, layout), True, num_sinks)
            v[p, :, h] = decompress_part(unpack_part(records[p, h], at.values, layout), False, num_sinks)
    return k, v
