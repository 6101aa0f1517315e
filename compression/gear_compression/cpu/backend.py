"""The CPU backend's face: the same `attend` as the reference, with compiled kernels spread over the cores.

Decoding sequences read codes straight into the dot product; a prompt chunk dequantises the pages before it once and
multiplies with BLAS.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from gear_compression.cpu.decode import KernelLayout, decode
from gear_compression.cpu.dequantize import dequantize
from gear_compression.cpu.rows import Slab
from gear_compression.cpu.seal import seal
from gear_compression.layout import Layout
from gear_compression.paged import OpenRows, PagedBatch, Segment, exact_page, open_runs, segments
from gear_compression.reference.low_rank import start_matrix
from gear_compression.reference.rotation import hadamard

MIN_TOKENS_PER_THREAD = 2048  # of one head's context: below that, waking a thread costs more than it saves


@functools.cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="gear-cpu")


@functools.cache
def _start(page_size: int, rank: int) -> NDArray[np.float32]:
    """[R, S]: where the subspace iteration begins."""
    return start_matrix(page_size, rank).T.contiguous().numpy()


def spread(kernel: Callable[..., None], items: NDArray[np.int64], num_tokens: int, *args: object) -> None:
    """Run `kernel(items, *args)` over slices of items [M, 2], one a core; the kernels let go of the GIL."""
    num_slices = min(torch.get_num_threads(), len(items), max(1, num_tokens // MIN_TOKENS_PER_THREAD))
    if num_slices <= 1:
        kernel(items, *args)
        return
    slices = np.array_split(items, num_slices)
    futures = [_threads(num_slices).submit(kernel, part, *args) for part in slices[1:]]
    kernel(slices[0], *args)
    for future in futures:
        future.result()


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """What all layers of a step share."""

    batch: PagedBatch
    open_rows: OpenRows
    filled: list[Segment]  # pages that this step seals
    chunks: list[list[Segment]]  # of each sequence with more than one token
    decode_items: NDArray[np.int64]  # [M, 2] (sequence, KV head)
    decode_tokens: int  # of context, over all items
    page_table: NDArray[np.int64]
    open_slots: NDArray[np.int64]
    context_len: NDArray[np.int64]
    rows: NDArray[np.int64]  # [N] first row of each sequence
    seen: Tensor  # [2, H, n, D] scratch: K and V of the pages that one sequence's chunk sees, one layer at a time


@dataclass(frozen=True, slots=True)
class PageErrors:
    """Relative errors ‖X − X̂‖ / ‖X‖ of one layer of a page that was just sealed, over all its heads."""

    layer: int
    keys: float
    values: float


class CpuBackend:
    """Reads and writes the pool `slab` [num_slots, page_bytes] uint8 with compiled kernels."""

    name = "cpu"

    def __init__(self, slab: Tensor, layout: Layout, raw_dtype: torch.dtype) -> None:
        """`raw_dtype`: of raw pages; the open pages of a GEAR format are bf16."""
        self.layout = layout
        self.runs = open_runs(slab, layout, raw_dtype if layout.is_raw else torch.bfloat16)
        self._slab = Slab.of(slab.view(-1).numpy())
        self._kernel_layouts = [KernelLayout.of(layout, layer, slab.shape[1]) for layer in range(layout.num_layers)]
        self._rotation = hadamard(layout.head_dim)
        self.page_errors: list[PageErrors] = []  # sampled; whoever reads them empties the list
        self._sampled_layer = 0

    def plan(self, batch: PagedBatch) -> CpuPlan:
        """Everything that is decided once a step, so that a layer only computes."""
        num_new = batch.query_start.diff()
        (decoding,) = torch.nonzero(num_new == 1, as_tuple=True)
        heads = torch.arange(self.layout.num_kv_heads)
        chunks: dict[int, list[Segment]] = {}
        filled = []
        for segment in segments(batch, self.layout.page_size):
            if num_new[segment.sequence] > 1:
                chunks.setdefault(segment.sequence, []).append(segment)
            if segment.fills_page:
                filled.append(segment)
        num_seen = max((chunk[-1].end for chunk in chunks.values()), default=0)
        return CpuPlan(
            batch=batch,
            open_rows=OpenRows.of(batch, self.layout),
            filled=filled,
            chunks=list(chunks.values()),
            decode_items=torch.cartesian_prod(decoding, heads).numpy(),
            decode_tokens=int(batch.context_len[decoding].sum()) * len(heads),
            page_table=batch.page_table.numpy(),
            open_slots=batch.open_slots.numpy(),
            context_len=batch.context_len.numpy(),
            rows=batch.query_start[:-1].numpy(),
            seen=torch.empty(2, self.layout.num_kv_heads, num_seen, self.layout.head_dim),
        )

    def attend(
        self,
        plan: CpuPlan,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q [T, Q, D], k, v [T, H, D] → [T, Q, D] float32; seals the pages that fill, appends the rest."""
        q, k, v = q.float(), k.float(), v.float()
        rotates_keys, rotates_values = self.layout.rotates(layer)
        if rotates_keys:
            q, k = q @ self._rotation, k @ self._rotation
        if rotates_values:
            v = v @ self._rotation
        if self.runs.dtype != torch.float32:  # every path sees what the pool will hold
            k, v = k.to(self.runs.dtype).float(), v.to(self.runs.dtype).float()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        if plan.filled:
            self._seal(plan, layer, k, v)
        out = torch.empty_like(q)
        if len(plan.decode_items):
            spread(
                decode, plan.decode_items, plan.decode_tokens, self._slab, self._kernel_layouts[layer], layer,
                plan.page_table, plan.open_slots, plan.context_len, plan.rows, q.numpy(), k.numpy(), v.numpy(),
                np.float32(scaling), sliding_window or 0, np.float32(softcap or 0.0), out.numpy(),
            )  # fmt: skip
        for chunk in plan.chunks:
            self._attend_chunk(plan, chunk, layer, q, k, v, scaling, sliding_window, softcap, out)
        plan.open_rows.write(self.runs, layer, k, v)
        return out @ self._rotation if rotates_values else out

    def _seal(self, plan: CpuPlan, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the records of the pages that this step fills, before anything reads them."""
        slots = [int(plan.batch.page_table[s.sequence, s.page]) for s in plan.filled]
        pages = [torch.stack(exact_page(self.runs, plan.batch, s, layer, k, v), dim=1) for s in plan.filled]
        if self.layout.is_raw:
            for slot, page in zip(slots, pages, strict=True):
                self.runs[slot, layer] = self.stored(page).to(self.runs.dtype)
            return
        exact = torch.stack(pages).permute(2, 0, 3, 1, 4).contiguous()  # [2, P, S, H, D]
        items = torch.cartesian_prod(torch.arange(len(slots)), torch.arange(self.layout.num_kv_heads)).numpy()
        lay = self._kernel_layouts[layer]
        spread(
            seal, items, len(items) * MIN_TOKENS_PER_THREAD, self._slab, lay, np.array(slots),
            exact[0].numpy(), exact[1].numpy(), np.array([s.page == 0 for s in plan.filled]),
            _start(lay.page_size, lay.keys.rank), _start(lay.page_size, lay.values.rank),
        )  # fmt: skip
        if layer == self._sampled_layer:  # one layer of one page a sealing step: too little to be felt
            self.page_errors.append(self._measure(layer, slots[0], exact[:, 0], plan.filled[0].page))

    def stored(self, page: Tensor) -> Tensor:
        """What a raw page [H, 2, S, D] reads as once it is full: itself. Other caches that are compared differ here."""
        return page

    def _measure(self, layer: int, slot: int, exact: Tensor, page: int) -> PageErrors:
        """exact [2, S, H, D] as it was sealed into `slot`. Turns to the next layer for the next time."""
        layout = self.layout
        self._sampled_layer = (layer + 1) % layout.num_layers
        S, H, D = layout.page_size, layout.num_kv_heads, layout.head_dim
        stored = torch.empty(2, H, S, D)
        self._dequantize(np.array([slot]), layer, page, *stored)
        ratios = [
            float((back - x.transpose(0, 1)).norm() / x.norm().clamp(min=1e-30))
            for back, x in zip(stored, exact, strict=True)
        ]
        return PageErrors(layer, *ratios)

    def _attend_chunk(
        self,
        plan: CpuPlan,
        chunk: list[Segment],
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        """Attention of one sequence's prompt chunk, page by page: earlier pages as sealed, the own page exactly."""
        S = self.layout.page_size
        slots = plan.page_table[chunk[0].sequence]
        self._dequantize(slots[: chunk[0].page], layer, 0, *plan.seen)
        # What a segment sees, one after the other in the same place: pages before it as sealed, its own exactly.
        for segment in chunk:
            page, first = segment.page, segment.page * S
            if segment is not chunk[0]:
                self._dequantize(slots[page - 1 : page], layer, page - 1, *plan.seen[:, :, first - S : first])
            seen_k, seen_v = plan.seen[:, :, : segment.end]
            seen_k[:, first:], seen_v[:, first:] = exact_page(self.runs, plan.batch, segment, layer, k, v)
            rows = slice(segment.row, segment.row + segment.end - segment.start)
            out[rows] = attend_segment(q[rows], seen_k, seen_v, scaling, sliding_window, softcap)

    def _dequantize(self, slots: NDArray[np.int64], layer: int, first_page: int, keys: Tensor, values: Tensor) -> None:
        """Sealed pages, of which the first is page `first_page` of a sequence, into keys and values [H, n, D]."""
        H = self.layout.num_kv_heads
        items = np.stack(np.divmod(np.arange(len(slots) * H), H), axis=1)
        spread(
            dequantize, items, len(items) * self.layout.page_size, self._slab, self._kernel_layouts[layer], layer,
            slots, first_page, keys.numpy(), values.numpy(),
        )  # fmt: skip


def attend_segment(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """q [m, Q, D], the last m of the n tokens of k, v [H, n, D] → [m, Q, D]."""
    m, Q, D = q.shape
    H, n, _ = k.shape
    mask = hidden_tokens(m, n, sliding_window)
    if softcap is None:
        attended = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return attended[0].transpose(0, 1)
    q_heads = (q * scaling).view(m, H, Q // H, D).permute(1, 2, 0, 3).reshape(H, -1, D)  # [H, G·m, D]
    scores = softcap * torch.tanh(q_heads @ k.transpose(1, 2) / softcap)
    weights = (scores.view(H, -1, m, n) + mask).softmax(-1).view(H, -1, n)
    return (weights @ v).view(H, Q // H, m, D).permute(2, 0, 1, 3).reshape(m, Q, D)


@functools.lru_cache(maxsize=8)  # every layer of a step asks for the same few
def hidden_tokens(m: int, n: int, sliding_window: int | None) -> Tensor:
    """[m, n]: −inf where the last m of n tokens do not see a token, else 0."""
    query_at, key_at = torch.arange(n - m, n)[:, None], torch.arange(n)
    hidden = key_at > query_at
    if sliding_window is not None:
        hidden |= key_at <= query_at - sliding_window
    return torch.zeros(m, n).masked_fill_(hidden, -torch.inf)
