"""Decode attention as a PyTorch operator: `gear::decode_attention`, one token a sequence, pages read as they are."""

import ctypes
import functools
import math

import torch
from torch import Tensor

from gear_compression.cuda.compiler import CudaKernel, cuda_kernel, header
from gear_compression.cuda.layouts import layout_of
from gear_compression.layout import Layout, PageLayout

WARPS, QUERIES, ROWS = 2, 8, 64  # as decode.cu has them
MAX_SPLITS = 64


class _Args(ctypes.Structure):
    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("records_start", ctypes.c_int64),
        ("runs_start", ctypes.c_int64),
        ("page_table", ctypes.c_void_p),
        ("open_slots", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("max_pages", ctypes.c_int),
        ("max_runs", ctypes.c_int),
        ("num_heads", ctypes.c_int),
        ("group", ctypes.c_int),
        ("num_splits", ctypes.c_int),
        ("pages_per_split", ctypes.c_int),
        ("window", ctypes.c_int),
        ("scaling", ctypes.c_float),
        ("softcap", ctypes.c_float),
    ]


def shared_bytes(layout: Layout, layer: int, capability: tuple[int, int]) -> int:
    """Dynamic shared memory of a CTA: the ring of records, and in the same place later the warps' results."""
    merge = WARPS * QUERIES * (layout.head_dim + 4) * 4
    if not isinstance(layout, PageLayout):
        return merge
    records = 2
    if layout.page_size < WARPS * ROWS:
        records = 3 if capability >= (9, 0) else 2 * WARPS * ROWS // layout.page_size
    return max(records * layout.layers[layer].record_bytes, merge)


def min_ctas(layout: Layout, layer: int) -> int:
    """How many CTAs must find registers on a multiprocessor: five where a format's kernel is no slower for it."""
    if not isinstance(layout, PageLayout) or layout.head_dim > 128:
        return 4
    keys, values = layout.layers[layer].keys, layout.layers[layer].values
    return 4 if keys.outliers or values.outliers or keys.num_groups > 1 else 5


@functools.cache
def ctas_per_sm(layout: Layout, layer: int, device: torch.device) -> int:
    """How many CTAs share a multiprocessor, by registers and by shared memory."""
    card = torch.cuda.get_device_properties(device)
    capability = (card.major, card.minor)
    room = card.shared_memory_per_multiprocessor // (shared_bytes(layout, layer, capability) + 1280)
    return max(1, min(min_ctas(layout, layer), room))


def choose_splits(num_tiles: int, num_pages: int, num_slots: int) -> tuple[int, int]:
    """(splits, pages a split) for num_tiles (sequence, KV head, query tile) triples of up to num_pages pages.

    A CTA costs about a page and a half beside its pages, and merging a split an eighth of a page; the card takes
    num_slots CTAs at a time, and a last wave that is not full costs as much as a full one.
    """
    best, chosen = math.inf, (1, max(num_pages, 1))
    for pages in range(max(num_pages, 1), 0, -1):
        splits = max(1, -(-num_pages // pages))
        if splits > MAX_SPLITS:
            break
        waves = -(-num_tiles * splits // num_slots)
        cost = waves * (pages + 1.5) + (splits / 8 if splits > 1 else 0)
        if cost < best * 0.98:
            best, chosen = cost, (splits, pages)
    return chosen


@functools.cache
def _kernel(layout: Layout, layer: int, window: bool, softcap: bool, float_out: bool) -> CudaKernel:
    ctas = min_ctas(layout, layer)
    options = {"window": window, "softcap": softcap, "float_out": float_out, "min_ctas": ctas}
    dynamic = shared_bytes(layout, layer, torch.cuda.get_device_capability())
    return cuda_kernel("decode.cu", "decode", header(layout, layer, options), dynamic)


@functools.cache
def _arrived(device: torch.device, size: int) -> Tensor:
    """Counters that every launch leaves at zero."""
    return torch.zeros(size, dtype=torch.int32, device=device)


@torch.library.custom_op("gear::decode_attention", mutates_args=())
def decode_attention(
    slab: Tensor,
    page_table: Tensor,
    open_slots: Tensor,
    lengths: Tensor,
    q: Tensor,
    layout: int,
    layer: int,
    num_splits: int,
    pages_per_split: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q [N, Q, D] bf16 → [N, Q, D] bf16; the new token's K and V are in its open page already.

    slab [num_slots, page_bytes] uint8. int32 on the device: page_table [N, P] slots of sealed pages, open_slots [N, R]
    runs of the page that the new token belongs to, lengths [N] tokens with the new one (0 is padding). window and
    softcap 0: none. num_splits and pages_per_split as `choose_splits` gives them for the longest sequence.
    """
    return decode_into(
        torch.empty_like(q), slab, page_table, open_slots, lengths, q, layout, layer, num_splits, pages_per_split,
        scaling, window, softcap,
    )  # fmt: skip


@decode_attention.register_fake
def _(
    slab: Tensor,
    page_table: Tensor,
    open_slots: Tensor,
    lengths: Tensor,
    q: Tensor,
    layout: int,
    layer: int,
    num_splits: int,
    pages_per_split: int,
    scaling: float,
    window: int,
    softcap: float,
) -> Tensor:
    return torch.empty_like(q)


def decode_into(
    out: Tensor,
    slab: Tensor,
    page_table: Tensor,
    open_slots: Tensor,
    lengths: Tensor,
    q: Tensor,
    layout: int,
    layer: int,
    num_splits: int,
    pages_per_split: int,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """As the operator, into `out`, which may be float32."""
    pages = layout_of(layout)
    N, Q, D = q.shape
    group = Q // pages.num_kv_heads
    assert q.dtype == torch.bfloat16
    assert all(tensor.is_contiguous() for tensor in (q, out, slab))
    kernel = _kernel(pages, layer, window > 0, softcap > 0, out.dtype == torch.float32)
    tiles = pages.num_kv_heads * -(-group // QUERIES)
    partial = torch.empty(N * Q * num_splits * (D + 1) if num_splits > 1 else 0, dtype=torch.float32, device=q.device)
    arrived = _arrived(q.device, 1 << max(10, (N * tiles - 1).bit_length()))
    args = _Args(
        pool=slab.data_ptr(),
        slot_bytes=slab.shape[1],
        records_start=pages.layers[layer].start if isinstance(pages, PageLayout) else 0,
        runs_start=layer * pages.num_kv_heads * 2 * pages.run_tokens * D * 2,
        page_table=page_table.data_ptr(),
        open_slots=open_slots.data_ptr(),
        lengths=lengths.data_ptr(),
        q=q.data_ptr(),
        out=out.data_ptr(),
        partial=partial.data_ptr(),
        arrived=arrived.data_ptr(),
        max_pages=page_table.shape[1],
        max_runs=open_slots.shape[1],
        num_heads=pages.num_kv_heads,
        group=group,
        num_splits=num_splits,
        pages_per_split=pages_per_split,
        window=window,
        scaling=scaling,
        softcap=softcap,
    )
    stream = torch.cuda.current_stream(q.device).cuda_stream
    kernel.launch((tiles, num_splits, N), 32 * WARPS, stream, args)
    return out
