"""Sealed pages to bf16 scratch as a PyTorch operator: `gear::dequantize_pages`, for prompt chunks."""

import ctypes
import functools

import torch
from torch import Tensor

from gear_compression.cuda.compiler import CudaKernel, cuda_kernel, header
from gear_compression.cuda.layouts import layout_of
from gear_compression.layout import PageLayout

THREADS, TOKENS = 128, 64  # of a CTA


class _Args(ctypes.Structure):
    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("records_start", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("is_first", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
    ]


@functools.cache
def _kernel(layout: PageLayout, layer: int) -> CudaKernel:
    return cuda_kernel("dequantize.cu", "dequantize", header(layout, layer, {}), 0)


@torch.library.custom_op("gear::dequantize_pages", mutates_args=("keys", "values"))
def dequantize_pages(
    slab: Tensor,
    slots: Tensor,
    is_first: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: int,
    layer: int,
) -> None:
    """Page slots[p] fills rows [rows[p], rows[p] + S) of keys, values [H, n, D] bf16, in the stored basis.

    slots, is_first, rows [P] int32 on the device; negative slots are skipped.
    """
    pages = layout_of(layout)
    H, S, D = pages.num_kv_heads, pages.page_size, pages.head_dim
    assert keys.dtype == values.dtype == torch.bfloat16
    assert all(tensor.is_contiguous() for tensor in (slab, keys, values))
    if isinstance(pages, PageLayout):
        args = _Args(
            pool=slab.data_ptr(),
            slot_bytes=slab.shape[1],
            records_start=pages.layers[layer].start,
            slots=slots.data_ptr(),
            is_first=is_first.data_ptr(),
            rows=rows.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            head_stride=keys.shape[1] * D,
        )
        stream = torch.cuda.current_stream(slab.device).cuda_stream
        _kernel(pages, layer).launch((slots.shape[0] * (S // TOKENS), 2 * H, 1), THREADS, stream, args)
        return
    runs = slab.view(torch.bfloat16).unflatten(1, (pages.num_layers, H, 2, S, D))
    at = (rows[:, None] + torch.arange(S, device=rows.device)).flatten().long()
    raw = runs[slots.long(), layer].permute(2, 1, 0, 3, 4).flatten(2, 3)  # [2, H, P * S, D]
    keys[:, at], values[:, at] = raw[0], raw[1]


@dequantize_pages.register_fake
def _(
    slab: Tensor,
    slots: Tensor,
    is_first: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: int,
    layer: int,
) -> None:
    return None
