"""The CUDA backend's face: a step's tables on the device, and the attention of one layer after another over them.

Attention is one PyTorch operator, `gear::paged_attention`, that finds the step's tables by the backend's number: so a
compiled model holds one node a layer, the same for all layers, and whatever else changes from step to step is data.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from gear_compression.cuda.append import append_tokens
from gear_compression.cuda.decode import QUERIES, choose_splits, ctas_per_sm, decode_attention
from gear_compression.cuda.dequantize import dequantize_pages
from gear_compression.cuda.layouts import register_layout
from gear_compression.cuda.seal import seal_pages
from gear_compression.cuda.tables import Ints, SealArrays, StepArrays
from gear_compression.layout import Layout
from gear_compression.paged import open_runs
from gear_compression.reference.rotation import hadamard
from gear_compression.triton.prefill import prefill_into

SEALINGS_A_SAMPLE = 16  # of decodes: of so many steps that fill pages one tells what the compression costs
_BACKENDS: list["CudaBackend"] = []


class Staging:
    """Brings many small integer arrays to the device in one copy, always to the same place.

    Two buffers on the host take turns: the copy of one step may not have begun when the next one is built. That of the
    step before has ended when its tokens were seen, unless memory did not suffice and a step was built in parts.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._host = [torch.empty(capacity, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._device = torch.empty(capacity, dtype=torch.int32, device=device)
        self._copied = [torch.cuda.Event() if pinned else None for _ in range(2)]  # of each host buffer

    def send(self, arrays: list[Ints]) -> list[Tensor]:
        """Views of the device's buffer; equal shapes have equal addresses. Valid until the next step's are sent."""
        self._host.reverse()
        self._copied.reverse()
        copied = self._copied[0]
        if copied and not copied.query():
            copied.synchronize()
        host = self._host[0].numpy()
        starts, end = [], 0
        for array in arrays:
            starts.append(end)
            end += -(-array.size // 4) * 4
        assert end <= len(host), f"{end} integers in a step, and {len(host)} were planned"
        for start, array in zip(starts, arrays, strict=True):
            host[start : start + array.size] = array.ravel()
        self._device[:end].copy_(self._host[0][:end], non_blocking=True)
        if copied:
            copied.record()
        return [
            self._device[start : start + array.size].view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class SealTables:
    """`SealArrays` on the device."""

    slots: Tensor
    is_first: Tensor
    run_slots: Tensor
    num_old: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class ChunkTables:
    """`ChunkArrays` on the device."""

    slots: Tensor
    is_first: Tensor
    rows: Tensor
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class RowTables:
    """Where the step's rows go, and what the first of them, the decodes, attend to."""

    slots: Tensor
    offsets: Tensor
    page_table: Tensor
    open_slots: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class OwnTables:
    """Where the chunks' own pages lie, if some of their tokens were computed before."""

    rows: Tensor
    old_slots: Tensor
    old_offsets: Tensor


@dataclass(frozen=True, slots=True)
class StepTables:
    """`StepArrays` on the device; what a step has none of is None or empty."""

    num_decodes: int
    splits: tuple[int, int]
    rows: RowTables
    filled_by_chunks: SealTables | None = None
    filled_by_decodes: SealTables | None = None
    chunks: list[ChunkTables] = field(default_factory=list)
    own: OwnTables | None = None


class CudaBackend:
    """Reads and writes the pool `slab` [num_slots, page_bytes] uint8 on a GPU."""

    name = "cuda"

    def __init__(self, slab: Tensor, layout: Layout, scratch_tokens: int) -> None:
        """`scratch_tokens`: of dequantised pages for prompt chunks, at least the longest sequence.

        Raises `ConfigError` for a layout that the kernels cannot read.
        """
        self.slab, self.layout, self.scratch_tokens = slab, layout, scratch_tokens
        self.layout_number = register_layout(layout)
        self.number = len(_BACKENDS)
        _BACKENDS.append(self)
        self._append, self._seal, self._dequantize, self._decode, self._prefill = (
            _kernel(operator, slab.device)
            for operator in (append_tokens, seal_pages, dequantize_pages, decode_attention, prefill_into)
        )
        H, D = layout.num_kv_heads, layout.head_dim
        self._runs = open_runs(slab, layout, torch.bfloat16)
        self._past_k, self._past_v = (
            torch.empty(H, scratch_tokens, D, dtype=torch.bfloat16, device=slab.device) for _ in range(2)
        )
        self._rotation = hadamard(D).to(slab.device)
        self._signs = self._rotation.sign().half()  # ±1, as `prefill_into` takes them
        self._no_rows = torch.empty(1, H, D, dtype=torch.bfloat16, device=slab.device)
        self._tables: StepTables | None = None
        self._layer = self._num_sealings = 0
        self.finite: Tensor | None = None  # [T] bool, once the last layer has attended
        self.attend: Callable[..., Tensor] = self.attend_layer  # what the operator calls, unless a pass is being cut

    def close(self) -> None:
        """The number stays taken; the memory does not."""
        self._tables = self.finite = None
        self.slab = self._runs = self._past_k = self._past_v = torch.empty(0)

    def begin(self, tables: StepTables) -> None:
        """The next calls of the operator are the layers of this step, in order."""
        self._tables, self._layer = tables, 0

    def splits(self, num_decodes: int, group: int, num_pages: int) -> tuple[int, int]:
        """How the contexts of decoding sequences of up to `num_pages` pages are divided over the card."""
        if self.slab.device.type != "cuda":
            return 1, max(num_pages, 1)
        num_tiles = num_decodes * self.layout.num_kv_heads * -(-group // QUERIES)
        num_sms = torch.cuda.get_device_properties(self.slab.device).multi_processor_count
        return choose_splits(num_tiles, num_pages, num_sms * ctas_per_sm(self.layout, 0, self.slab.device))

    def tables(self, arrays: StepArrays, sent: list[Tensor], splits: tuple[int, int]) -> StepTables:
        """`sent`: what `Staging.send` made of `arrays_to_send(arrays)`."""
        parts = iter(sent)

        def seal(host: SealArrays) -> SealTables | None:
            return self.seal_tables(host, [next(parts) for _ in host.arrays()])

        return StepTables(
            arrays.num_decodes,
            splits,
            rows=RowTables(*(next(parts) for _ in range(5))),
            filled_by_chunks=seal(arrays.filled_by_chunks),
            filled_by_decodes=seal(arrays.filled_by_decodes),
            chunks=[ChunkTables(*(next(parts) for _ in range(4))) for _ in arrays.chunks],
            own=OwnTables(*(next(parts) for _ in range(3))) if len(arrays.own_rows) else None,
        )

    @staticmethod
    def seal_tables(host: SealArrays, sent: list[Tensor]) -> SealTables | None:
        return SealTables(*sent) if len(host.slots) else None

    def attend_layer(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int,
        softcap: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """The next layer of the step, into `out` if it is given. k and v are turned into the stored basis in place."""
        tables, layer, number = self._tables, self._layer, self.layout_number
        assert tables is not None
        self._layer += 1
        rotates_keys, rotates_values = self.layout.rotates(layer)
        if rotates_keys:
            q = (q.float() @ self._rotation).to(q.dtype)
        self._append(self.slab, k, v, tables.rows.slots, tables.rows.offsets, number, layer)
        decoded = None
        if n := tables.num_decodes:
            decoded = self._decode(
                self.slab, tables.rows.page_table, tables.rows.open_slots, tables.rows.lengths, q[:n], number, layer,
                *tables.splits, scaling, window, softcap,
            )  # fmt: skip
        if decoded is not None and not tables.chunks and out is None:
            out = decoded
        else:
            out = torch.empty_like(q) if out is None else out
            self._attend_chunks(tables, layer, q, k, v, scaling, window, softcap, out, rotates_values)
            if decoded is not None:
                out[: len(decoded)] = decoded
        if self._layer == self.layout.num_layers:
            # A token attends to itself, so what is wrong with it in any layer before shows here.
            self.finite = out.isfinite().all(dim=2).all(dim=1)
        return out

    def _attend_chunks(
        self,
        tables: StepTables,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int,
        softcap: float,
        out: Tensor,
        rotates_back: bool,
    ) -> None:
        if filled := tables.filled_by_chunks:
            self._seal(
                self.slab, filled.slots, filled.is_first, filled.run_slots, filled.num_old, filled.rows, k, v,
                self.layout_number, layer, 1,
            )  # fmt: skip
        if own := tables.own:
            old = self._runs[own.old_slots, layer, :, :, own.old_offsets]  # [old, H, 2, D]
            k, v = (torch.cat([x, old[:, :, part].contiguous()])[own.rows] for part, x in enumerate((k, v)))
        fused = rotates_back and self.layout.head_dim <= 128
        for chunk in tables.chunks:
            if len(chunk.slots):
                self._dequantize(
                    self.slab, chunk.slots, chunk.is_first, chunk.rows, self._past_k, self._past_v,
                    self.layout_number, layer,
                )  # fmt: skip
            self._prefill(
                out, q, self._past_k, self._past_v, k, v, chunk.tiles, self.layout.page_size, scaling, window, softcap,
                self._signs if fused else None,
            )  # fmt: skip
        if rotates_back and not fused:
            rows = out[tables.num_decodes :]
            rows.copy_(rows.float() @ self._rotation)

    def seal_decoded(self) -> tuple[int, Tensor] | None:
        """After a step's last layer: the pages that its decodes filled, of all layers at once.

        Now and then (layer, [2]): relative errors of the first page's keys and values in that layer, over all heads.
        """
        assert self._tables is not None
        filled = self._tables.filled_by_decodes
        if filled is None:
            return None
        self._seal(
            self.slab, filled.slots, filled.is_first, filled.run_slots, filled.num_old, filled.rows,
            self._no_rows, self._no_rows, self.layout_number, 0, self.layout.num_layers,
        )  # fmt: skip
        self._num_sealings += 1
        if self._num_sealings % SEALINGS_A_SAMPLE:
            return None
        layer = self._num_sealings // SEALINGS_A_SAMPLE % self.layout.num_layers
        return layer, self._sealing_errors(filled, layer)

    def _sealing_errors(self, filled: SealTables, layer: int) -> Tensor:
        """[2]: ‖X − X̂‖ / ‖X‖ of keys and of values; the exact tokens are still in the page's runs."""
        S = self.layout.page_size
        self._dequantize(
            self.slab, filled.slots[:1], filled.is_first[:1], filled.rows[:1], self._past_k, self._past_v,
            self.layout_number, layer,
        )  # fmt: skip
        stored = torch.stack([self._past_k[:, :S], self._past_v[:, :S]]).float()  # [2, H, S, D]
        exact = self._runs[filled.run_slots[0].long(), layer].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :S].float()
        errors, norms = ((x.flatten(1).norm(dim=1)) for x in (exact - stored, exact))
        return errors / norms.clamp(min=1e-30)


def _kernel(operator: CustomOpDef, device: torch.device) -> Callable[..., Any]:
    """What the operator calls on a GPU: going through the operator costs the host 20 µs, five times a layer."""
    return operator._init_fn if device.type == "cuda" else operator


def arrays_to_send(arrays: StepArrays) -> list[Ints]:
    """In the order in which `CudaBackend.tables` takes them."""
    return [
        arrays.slots,
        arrays.offsets,
        arrays.page_table,
        arrays.open_slots,
        arrays.lengths,
        *arrays.filled_by_chunks.arrays(),
        *arrays.filled_by_decodes.arrays(),
        *(array for chunk in arrays.chunks for array in chunk.arrays()),
        arrays.own_rows,
        arrays.old_slots,
        arrays.old_offsets,
    ]


def padded(arrays: StepArrays, num_rows: int, num_pages: int) -> list[Ints]:
    """slots, offsets, page_table, open_slots, lengths of a step of decodes, for a graph of `num_rows` rows."""
    n = arrays.num_decodes
    rows = num_rows - n
    return [
        np.pad(arrays.slots, (0, rows), constant_values=-1),
        np.pad(arrays.offsets, (0, rows)),
        np.pad(arrays.page_table, ((0, rows), (0, num_pages - arrays.page_table.shape[1])), constant_values=-1),
        np.pad(arrays.open_slots, ((0, rows), (0, 0)), constant_values=-1),
        np.pad(arrays.lengths, (0, rows)),
    ]


@torch.library.custom_op("gear::paged_attention", mutates_args=("k", "v"))
def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, backend: int, scaling: float, window: int, softcap: float
) -> Tensor:
    """The next layer of a backend's step: q [T, Q, D] bf16, k, v [T, H, D] bf16 → [T, Q, D].

    k and v are turned into the stored basis in place. window and softcap 0: none.
    """
    return _BACKENDS[backend].attend(q, k, v, scaling, window, softcap)


@paged_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, backend: int, scaling: float, window: int, softcap: float) -> Tensor:
    return torch.empty_like(q)
