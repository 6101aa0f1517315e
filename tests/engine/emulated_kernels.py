"""The GPU's operators on the CPU, from the definition: what stands around the kernels is tested without a GPU."""

import torch
from torch import Tensor

from gear_compression.cuda.append import append_tokens
from gear_compression.cuda.decode import decode_attention
from gear_compression.cuda.dequantize import dequantize_pages
from gear_compression.cuda.layouts import layout_of
from gear_compression.cuda.seal import seal_pages
from gear_compression.layout import Layout, PageLayout
from gear_compression.paged import open_runs
from gear_compression.reference.pages import compress_pages, decompress_pages
from gear_compression.reference.rotation import hadamard
from gear_compression.triton.prefill import prefill_attention, prefill_into


def emulate() -> None:
    """Harmless when repeated; tensors on a GPU still go to the real kernels."""
    for operator, kernel in (
        (append_tokens, _append),
        (seal_pages, _seal),
        (dequantize_pages, _dequantize),
        (decode_attention, _decode),
        (prefill_into, _prefill),
    ):
        operator.register_kernel("cpu")(kernel)


def _runs(slab: Tensor, layout: Layout) -> Tensor:
    return open_runs(slab, layout, torch.bfloat16)


def _append(
    slab: Tensor, keys: Tensor, values: Tensor, slots: Tensor, offsets: Tensor, layout: int, layer: int
) -> None:
    pages = layout_of(layout)
    for part, x in enumerate((keys, values)):
        if pages.rotates(layer)[part]:
            x.copy_(x.float() @ hadamard(pages.head_dim))
        for t in (slots >= 0).nonzero()[:, 0].tolist():
            _runs(slab, pages)[slots[t], layer, :, part, offsets[t]] = x[t]


def _seal(
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
    pages = layout_of(layout)
    assert isinstance(pages, PageLayout)
    S, run_tokens = pages.page_size, pages.run_tokens
    for p, slot in enumerate(slots.tolist()):
        for layer in range(first_layer, first_layer + num_layers):
            old = int(num_old[p])
            exact = [
                torch.cat(
                    [_runs(slab, pages)[run_slots[p, t // run_tokens], layer, :, part, t % run_tokens][None]
                     for t in range(old)] + [x[int(rows[p]) : int(rows[p]) + S - old]]
                )
                for part, x in enumerate((keys, values))
            ]  # fmt: skip
            records = compress_pages(exact[0][None], exact[1][None], pages, is_first[p : p + 1].bool(), layer)
            at = pages.layers[layer]
            slab[slot, at.start : at.start + records.numel()] = records.flatten()


def _pages(slab: Tensor, slots: Tensor, is_first: Tensor, pages: Layout, layer: int) -> tuple[Tensor, Tensor]:
    """K and V [P, S, H, D] of sealed pages."""
    if not isinstance(pages, PageLayout):
        raw = _runs(slab, pages)[slots.long(), layer]  # [P, H, 2, S, D]
        return raw[:, :, 0].transpose(1, 2).float(), raw[:, :, 1].transpose(1, 2).float()
    at = pages.layers[layer]
    size = pages.num_kv_heads * at.record_bytes
    records = slab[slots.long(), at.start : at.start + size].view(len(slots), pages.num_kv_heads, at.record_bytes)
    return decompress_pages(records, pages, is_first.bool(), layer)


def _dequantize(
    slab: Tensor,
    slots: Tensor,
    is_first: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: int,
    layer: int,
) -> None:
    pages = layout_of(layout)
    for p, row in enumerate(rows.tolist()):
        k, v = _pages(slab, slots[p : p + 1], is_first[p : p + 1], pages, layer)
        keys[:, row : row + pages.page_size] = k[0].transpose(0, 1)
        values[:, row : row + pages.page_size] = v[0].transpose(0, 1)


def _decode(
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
    pages = layout_of(layout)
    S, run_tokens = pages.page_size, pages.run_tokens
    out = torch.zeros_like(q)
    for n, length in enumerate(lengths.tolist()):
        if not length:
            continue
        num_pages = (length - 1) // S
        slots = page_table[n, :num_pages]
        sealed = _pages(slab, slots, torch.arange(num_pages) == 0, pages, layer)
        runs = _runs(slab, pages)
        parts = []
        for part in range(2):
            own = [
                runs[open_slots[n, t // run_tokens], layer, :, part, t % run_tokens]
                for t in range(length - num_pages * S)
            ]
            parts.append(torch.cat([sealed[part].flatten(0, 1).float(), torch.stack(own).float()]))
        first = max(0, length - window) if window else 0
        group = q.shape[1] // pages.num_kv_heads
        k, v = (x[first:].repeat_interleave(group, 1) for x in parts)
        scores = torch.einsum("qd,nqd->qn", q[n].float(), k) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        result = torch.einsum("qn,nqd->qd", scores.softmax(-1), v)
        out[n] = result @ hadamard(pages.head_dim) if pages.rotates(layer)[1] else result
    return out


def _prefill(
    out: Tensor,
    q: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    tiles: Tensor,
    page_size: int,
    scaling: float,
    window: int,
    softcap: float,
    rotation: Tensor | None,
) -> None:
    """The real kernel, in Triton's interpreter, which knows no bf16."""
    exact = [x.float() for x in (q, past_k, past_v, own_k, own_v)]
    result = prefill_attention(*exact, tiles, page_size, scaling, window, softcap, rotation, out.float())
    for row, num_rows, *_ in tiles.tolist():
        out[row : row + num_rows] = result[row : row + num_rows].to(out.dtype)
