"""Turns a batch of integers into logits: builds the tensors, runs the model, and lets its attention read the pool.

Owns the pool and the model; knows nothing of requests, of what comes next, or of why a token is computed.
"""

import functools
import itertools
import resource
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gear_compression.layout import Layout
from gear_compression.paged import PagedBatch
from gear_compression.reference.attention import ReferenceBackend
from gear_engine.fused import plain_linears
from gear_engine.model_loader import LoadedModel
from gear_engine.prefix_cache import Move
from gear_engine.sequence import Scheduled, Sequence

if TYPE_CHECKING:
    from gear_compression.cpu.backend import CpuBackend

BACKENDS = ("cpu", "reference")


def backend_class(name: str) -> "type[CpuBackend] | type[ReferenceBackend]":
    """Numba is not imported before it is needed."""
    if name == "reference":
        return ReferenceBackend
    from gear_compression.cpu.backend import CpuBackend

    return CpuBackend


@dataclass(frozen=True, slots=True)
class SampledErrors:
    """Relative errors of one layer of a page that was just sealed, over all its heads."""

    layer: int
    ratios: Tensor  # [2] of its keys and of its values


@dataclass(slots=True)
class RunResult:
    """What a step computed. Rows follow the scheduled sequences that sample, in order."""

    logits: Tensor  # [number of sequences that sample, V]
    page_errors: list[SampledErrors]  # of some of the pages that were sealed
    poisoned: Tensor  # bool, of every scheduled sequence: NaN or infinity in what the model made of its tokens
    prompt_logits: Tensor | None = None  # [positions that are `scored`, V], in order; None: nobody asked


class Runner(Protocol):
    """What the engine needs of a model; tests put a scripted one in its place."""

    overlaps: bool  # whether `run` returns before the device has computed, so that the next batch can be scheduled

    def run(self, scheduled: list[Scheduled]) -> RunResult: ...

    def keep_drawn(self, sequences: list[Sequence], tokens: list[Tensor]) -> None:
        """What was drawn for these sequences: the pending tokens of the next `run`. Nothing to do without overlap."""

    def move(self, moves: list[Move]) -> None: ...

    def read_page(self, slot: int, *, in_host: bool) -> bytes: ...

    def write_page(self, slot: int, data: bytes) -> None: ...

    def peak_memory_bytes(self) -> int: ...


class PooledAttention:
    """One step's attention: handed down through the model to every layer, with the step's plan."""

    def __init__(self, backend: "CpuBackend | ReferenceBackend", batch: PagedBatch, last_layer: int) -> None:
        self._backend = backend
        self._plan = backend.plan(batch)
        self._last_layer = last_layer
        self.finite = torch.empty(0, dtype=torch.bool)  # [T], after the last layer

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """See `AttentionTarget`."""
        layer = module.layer_idx
        assert isinstance(layer, int)
        out = self._backend.attend(
            self._plan,  # type: ignore[arg-type]
            layer,
            q,
            k,
            v,
            scaling=scaling,
            sliding_window=sliding_window,
            softcap=softcap,
        )
        if layer == self._last_layer:
            # A token attends to itself, so what is wrong with it in any layer before shows here.
            self.finite = out.isfinite().all(dim=(1, 2))
        return out.to(q.dtype)


class ModelRunner:
    """The model and the pool, on the CPU."""

    overlaps = False

    def __init__(
        self,
        loaded: LoadedModel,
        layout: Layout,
        num_slots: int,
        backend: "str | type[CpuBackend]" = "cpu",
        num_host_slots: int = 0,
    ) -> None:
        """`backend`: a name, or a class of another CPU backend that is to be compared."""
        self.loaded = loaded
        self.layout = layout
        self.slab = torch.empty(num_slots, layout.page_bytes, dtype=torch.uint8)  # touched when first written
        self.host_slab = torch.empty(num_host_slots, layout.page_bytes, dtype=torch.uint8)
        kind = backend_class(backend) if isinstance(backend, str) else backend
        self.backend = kind(self.slab, layout, loaded.model.dtype)
        if backend == "reference":
            compute_rows_alone(loaded.model)

    @torch.inference_mode()
    def all_logits(self, scheduled: list[Scheduled]) -> Tensor:
        """[T, V]: the logits of every scheduled token, for whoever compares models instead of serving one."""
        return self._forward(scheduled, all_rows=True)[0]

    @torch.inference_mode()
    def run(self, scheduled: list[Scheduled]) -> RunResult:
        """Compute the scheduled tokens. Running the same again is harmless: it writes the same bytes."""
        logits, finite = self._forward(scheduled)
        poisoned = [not bool(rows.all()) for rows in finite.split([item.num_new for item in scheduled])]
        num_sampled = sum(item.samples for item in scheduled)
        prompt_logits = logits[num_sampled:] if len(logits) > num_sampled else None
        return RunResult(logits[:num_sampled], self._page_errors(), torch.tensor(poisoned), prompt_logits)

    def keep_drawn(self, sequences: list[Sequence], tokens: list[Tensor]) -> None:
        """They are known before the next batch is run."""

    def move(self, moves: list[Move]) -> None:
        copy_slots(moves, self.slab, self.host_slab)

    def read_page(self, slot: int, *, in_host: bool) -> bytes:
        """The bytes of a slot, of the pool or of host memory, after all moves so far."""
        return (self.host_slab if in_host else self.slab)[slot].cpu().numpy().tobytes()

    def write_page(self, slot: int, data: bytes) -> None:
        self.slab[slot].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def peak_memory_bytes(self) -> int:
        """The peak resident set of this process."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB

    def _page_errors(self) -> list[SampledErrors]:
        if isinstance(self.backend, ReferenceBackend):
            return []
        sampled, self.backend.page_errors = self.backend.page_errors, []
        return [SampledErrors(s.layer, torch.tensor([s.keys, s.values])) for s in sampled]

    def _forward(self, scheduled: list[Scheduled], all_rows: bool = False) -> tuple[Tensor, Tensor]:
        """(logits [sampling sequences, then `scored` positions, V], or [T, V] of all rows; finite [T])"""
        tokens: list[int] = []
        positions: list[int] = []
        asked: list[int] = []
        scored: list[int] = []
        row = 0
        for item in scheduled:
            end = item.start + item.num_new
            tokens += item.sequence.token_ids[item.start : end]
            positions += range(item.start, end)
            row += item.num_new
            if all_rows:
                asked += range(row - item.num_new, row)
                continue
            scored += [row - end + position for position in item.scored]
            if item.samples:
                asked.append(row - 1)
        asked += scored
        attention = PooledAttention(self.backend, paged_batch(scheduled, self.layout), self.loaded.num_layers - 1)
        output = self.loaded.model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.tensor(asked or [row - 1]),
            gear_batch=attention,
        )
        return output.logits[0, : len(asked)], attention.finite


def copy_slots(moves: list[Move], slab: Tensor, host_slab: Tensor) -> None:
    """Between the pool and host memory, bit for bit, in the order given; a GPU is not waited for."""
    for move in moves:
        if move.out:
            host_slab[move.host_slot].copy_(slab[move.slot], non_blocking=True)
        else:
            slab[move.slot].copy_(host_slab[move.host_slot], non_blocking=True)


def paged_batch(scheduled: list[Scheduled], layout: Layout) -> PagedBatch:
    """The tables of a step: which slots hold what each sequence has, and what it is about to write."""
    new = torch.tensor([0] + [item.num_new for item in scheduled])
    return PagedBatch(
        query_start=new.cumsum(0),
        context_len=torch.tensor([item.start for item in scheduled]),
        page_table=_table([item.pages for item in scheduled], 1),
        open_slots=_table([item.open_slots for item in scheduled], layout.max_runs),
        next_open_slots=_table([item.next_open_slots for item in scheduled], layout.max_runs),
    )


def _table(rows: list[list[int]], min_width: int) -> Tensor:
    """Rows of unequal length as one [N, width] int64, −1 where a row has ended."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    table = np.full((len(rows), max(min_width, int(lengths.max()))), -1)
    table[np.arange(table.shape[1]) < lengths[:, None]] = np.fromiter(
        itertools.chain.from_iterable(rows), np.int64, int(lengths.sum())
    )
    return torch.from_numpy(table)


def compute_rows_alone(model: nn.Module) -> None:
    """Make every plain linear layer multiply one token at a time, so that no sum depends on what else is in the batch.

    Slow, and exact: with the reference backend a prompt gives the same bits however it is cut into chunks. Layers of
    quantised checkpoints, which do more than multiply, stay as they are.
    """
    for linear in list(plain_linears(model)):
        linear.forward = functools.partial(_row_by_row, linear)  # type: ignore[method-assign]


def _row_by_row(linear: nn.Linear, x: Tensor) -> Tensor:
    rows = [functional.linear(row, linear.weight, linear.bias) for row in x.flatten(0, -2)]
    return torch.stack(rows).unflatten(0, x.shape[:-1])
