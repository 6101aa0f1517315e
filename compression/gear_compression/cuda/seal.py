"""Sealing full pages as a PyTorch operator: `gear::seal_pages`, exact tokens to records for one layer or for many."""

import ctypes
import functools

import torch
from torch import Tensor

from gear_compression.cuda.compiler import CudaKernel, cuda_kernel, header
from gear_compression.cuda.layouts import layout_of
from gear_compression.layout import PageLayout
from gear_compression.reference.low_rank import NUM_ROUNDS, orthonormalize, start_matrix

THREADS = 256
OPTIONS = {"rounds": NUM_ROUNDS}  # of the subspace iteration


class PageListArgs(ctypes.Structure):
    """`PageList` of pages.cuh."""

    _fields_ = [
        ("slots", ctypes.c_void_p),
        ("is_first", ctypes.c_void_p),
        ("run_slots", ctypes.c_void_p),
        ("num_old", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("max_runs", ctypes.c_int),
    ]


class _Args(ctypes.Structure):
    _fields_ = [
        ("pool", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("records_start", ctypes.c_int64),
        ("records_stride", ctypes.c_int64),
        ("runs_start", ctypes.c_int64),
        ("runs_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_start", ctypes.c_void_p),
        ("value_start", ctypes.c_void_p),
        ("pages", PageListArgs),
    ]


def _shared_bytes(layout: PageLayout, layer: int) -> int:
    S, D = layout.page_size, layout.head_dim
    sizes = []
    for part in (layout.layers[layer].keys, layout.layers[layer].values):
        target_apart = part.rank > 0 and (not part.low_rank_first or part.outliers > 0)
        floats = part.rank * (S + D) + 3 * part.num_groups * part.num_vectors + target_apart * S * (D + 1)
        floats += 4 * THREADS * part.num_groups + 32
        sizes.append(4 * floats + 2 * S * (D + 2) + part.num_vectors * part.outliers)
    return -(-max(sizes) // 16) * 16


@functools.cache
def _kernel(layout: PageLayout, layer: int) -> CudaKernel:
    return cuda_kernel("seal.cu", "seal", header(layout, layer, OPTIONS), _shared_bytes(layout, layer))


@functools.cache
def _start(page_size: int, rank: int, device: torch.device) -> Tensor:
    """[S, R] float32 on the device, orthonormal."""
    start = start_matrix(page_size, rank)
    return (orthonormalize(start) if rank else start).to(device)


def _runs_of_equal_layers(layout: PageLayout, first: int, count: int) -> list[tuple[int, int]]:
    """(first layer, number of layers) of neighbours in the same format: one launch each."""
    groups: list[tuple[int, int]] = []
    for layer in range(first, first + count):
        if groups and layout.layers[layer]._replace(start=0) == layout.layers[groups[-1][0]]._replace(start=0):
            groups[-1] = (groups[-1][0], groups[-1][1] + 1)
        else:
            groups.append((layer, 1))
    return groups


@torch.library.custom_op("gear::seal_pages", mutates_args=("slab",))
def seal_pages(
    slab: Tensor,
    slots: Tensor,
    is_first: Tensor,
    run_slots: Tensor,
    num_old: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: int,
    first_layer: int,
    num_layers: int,
) -> None:
    """Write the records of P pages into slab [num_slots, page_bytes] uint8; all tables int32 on the device.

    slots [P]: where to, negative for none; is_first [P]: 1 where a page begins its sequence. A page's first num_old [P]
    tokens lie in the runs run_slots [P, R]; the others are rows[p], rows[p] + 1 … of keys and values [T, H, D] bf16, in
    the stored basis. Many layers at once only from runs (num_old is the page size).
    """
    pages = layout_of(layout)
    assert isinstance(pages, PageLayout), "raw pages are sealed where they lie"
    assert all(tensor.is_contiguous() for tensor in (slab, keys, values, run_slots))
    runs_stride = pages.num_kv_heads * 2 * pages.run_tokens * pages.head_dim * 2
    stream = torch.cuda.current_stream(slab.device).cuda_stream
    for first, count in _runs_of_equal_layers(pages, first_layer, num_layers):
        at = pages.layers[first]
        starts = [_start(pages.page_size, part.rank, slab.device) for part in (at.keys, at.values)]
        args = _Args(
            pool=slab.data_ptr(),
            slot_bytes=slab.shape[1],
            records_start=at.start,
            records_stride=pages.num_kv_heads * at.record_bytes,
            runs_start=first * runs_stride,
            runs_stride=runs_stride,
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            key_start=starts[0].data_ptr(),
            value_start=starts[1].data_ptr(),
            pages=PageListArgs(
                slots.data_ptr(),
                is_first.data_ptr(),
                run_slots.data_ptr(),
                num_old.data_ptr(),
                rows.data_ptr(),
                run_slots.shape[1],
            ),
        )
        _kernel(pages, first).launch((slots.shape[0], count, 2 * pages.num_kv_heads), THREADS, stream, args)


@seal_pages.register_fake
def _(
    slab: Tensor,
    slots: Tensor,
    is_first: Tensor,
    run_slots: Tensor,
    num_old: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: int,
    first_layer: int,
    num_layers: int,
) -> None:
    return None
