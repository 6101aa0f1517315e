"""New keys and values into the stored basis and into open pages, as a PyTorch operator: `gear::append_tokens`."""

import ctypes
import functools

import torch
from torch import Tensor

from gear_compression.cuda.compiler import CudaKernel, cuda_kernel, header
from gear_compression.cuda.layouts import layout_of
from gear_compression.layout import Layout

THREADS = 128


class _Args(ctypes.Structure):
    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("runs_start", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int),
    ]


@functools.cache
def _kernel(layout: Layout, layer: int) -> CudaKernel:
    rotate_keys, rotate_values = layout.rotates(layer)
    options = {"rotate_keys": rotate_keys, "rotate_values": rotate_values}
    return cuda_kernel("append.cu", "append", header(layout, layer, options), 0)


@torch.library.custom_op("gear::append_tokens", mutates_args=("slab", "keys", "values"))
def append_tokens(
    slab: Tensor, keys: Tensor, values: Tensor, slots: Tensor, offsets: Tensor, layout: int, layer: int
) -> None:
    """keys, values [T, H, D] bf16, turned into the stored basis in place; token t goes to offsets[t] of slots[t].

    slots, offsets [T] int32 on the device; a negative slot writes nothing (its page is sealed within the step).
    """
    pages = layout_of(layout)
    T, H, D = keys.shape
    assert keys.dtype == values.dtype == torch.bfloat16
    assert keys.stride()[1:] == values.stride()[1:] == (D, 1), "the heads of a token must lie side by side"
    args = _Args(
        pool=slab.data_ptr(),
        slot_bytes=slab.shape[1],
        runs_start=layer * H * 2 * pages.run_tokens * D * 2,
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        key_stride=keys.stride(0),
        value_stride=values.stride(0),
        slots=slots.data_ptr(),
        offsets=offsets.data_ptr(),
        num_tokens=T,
    )
    stream = torch.cuda.current_stream(slab.device).cuda_stream
    _kernel(pages, layer).launch((-(-T * H // (THREADS // 32)), 1, 1), THREADS, stream, args)


@append_tokens.register_fake
def _(slab: Tensor, keys: Tensor, values: Tensor, slots: Tensor, offsets: Tensor, layout: int, layer: int) -> None:
    return None
