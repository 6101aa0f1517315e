"""Runs a batch on a GPU: one copy of integers there, one launch for a step of decodes, nothing waited for.

A step of decodes replays a CUDA graph that was captured for its number of rows; a short step with prompt chunks
replays what lies between attentions, a longer one runs layer by layer, compiled. Tokens that were just drawn stay on
the device: the next step reads them there.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gear_compression.cuda.backend import CudaBackend, RowTables, Staging, StepTables, arrays_to_send, padded
from gear_compression.cuda.tables import Ints, SealArrays, StepArrays, num_scratch_tokens, step_arrays
from gear_compression.layout import Layout
from gear_engine.fused import fuse_projections
from gear_engine.model_loader import LoadedModel
from gear_engine.pieces import Pieces
from gear_engine.plan import MAX_PIECES_TOKENS
from gear_engine.prefix_cache import Move, runs
from gear_engine.protocol import EngineStartError
from gear_engine.runner import RunResult, SampledErrors, copy_slots, paged_batch
from gear_engine.sampler import on_device
from gear_engine.sequence import Scheduled, Sequence

MOVES_A_RUN = 8  # of pages that go out before the first may come into their places
PEAK_S = 1.0  # between two looks at the allocator's peak
SMALLEST_GRAPH = 2  # a compiled layer would be compiled again for a single row


def graph_sizes(max_running: int) -> list[int]:
    """Rows that graphs are captured for: close together where a step is short, so that few rows are for nothing."""
    sizes = [2, 4, 8, *range(16, 257, 16), *range(288, 4096, 32)]
    return [size for size in sizes if size < max_running] + [max(max_running, SMALLEST_GRAPH)]


def piece_sizes(max_batch_tokens: int) -> list[int]:
    """Tokens that a step with prompt chunks is captured for, in pieces."""
    most = min(max_batch_tokens, MAX_PIECES_TOKENS)
    return [*(size for size in (64, *range(128, most, 128)) if size < most), max(most, SMALLEST_GRAPH)]


def context_classes(max_pages: int) -> list[int]:
    """Pages of the longest context that a graph divides over the card for: 8, 32, 128 … and the most there can be."""
    classes = [8 * 4**i for i in range(8) if 8 * 4**i < max_pages]
    return [*classes, max_pages]


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A captured step of decodes; it reads the tables where `Staging` puts those of its size."""

    graph: torch.cuda.CUDAGraph
    finite: Tensor  # [rows]


class CudaAttention:
    """What the model hands down to its layers: the operator, and which backend it is to ask."""

    def __init__(self, backend: int) -> None:
        self.backend = backend

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
        """See `AttentionTarget`. The layer is not asked for its number: all layers share one compiled code."""
        return torch.ops.gear.paged_attention(
            q.contiguous(), k.contiguous(), v.contiguous(), self.backend, scaling, sliding_window or 0, softcap or 0.0
        )


class CudaRunner:
    """The model and the pool, on one GPU."""

    overlaps = True

    def __init__(
        self,
        loaded: LoadedModel,
        layout: Layout,
        num_slots: int,
        *,
        max_running: int,
        max_batch_tokens: int,
        max_model_len: int,
        num_host_slots: int = 0,
        eager: bool = False,
    ) -> None:
        """`eager`: no graphs and nothing compiled."""
        self.loaded, self.layout, self.eager = loaded, layout, eager
        self.device = loaded.model.device
        self.slab = torch.empty(num_slots, layout.page_bytes, dtype=torch.uint8, device=self.device)
        pinned = self.device.type == "cuda"
        self.host_slab = torch.empty(num_host_slots, layout.page_bytes, dtype=torch.uint8, pin_memory=pinned)
        self.max_pages = max_model_len // layout.page_size + 1
        self.backend = CudaBackend(self.slab, layout, num_scratch_tokens(layout, max_model_len, max_batch_tokens))
        self._attention = CudaAttention(self.backend.number)
        self._group = loaded.num_query_heads // loaded.num_kv_heads
        self._staging = Staging(staging_ints(layout, max_running, max_batch_tokens, self.max_pages), self.device)
        self._drawn = torch.zeros(max_running, dtype=torch.int64, device=self.device)
        self._drawn_rows: dict[str, int] = {}
        self._launched: list[Scheduled] = []  # of the step that is being launched
        self._in_flight: list[Scheduled] = []  # of the step before, which may still run
        self._copies, self._copies_out = (torch.cuda.Stream() if pinned else None for _ in range(2))
        self._peak = (-PEAK_S, 0)  # when it was asked, and bytes
        self._logits = torch.empty(0)
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._pieces: dict[int, Pieces] = {}
        self._sizes = graph_sizes(max_running)
        self._piece_sizes = piece_sizes(max_batch_tokens)
        self._classes = context_classes(self.max_pages)
        if not eager:
            fuse_projections(loaded.model)
            compile_layers(loaded.model)

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Compile the layers and capture the graphs; returns the seconds that took."""
        start = time.monotonic()
        if self.eager:
            return 0.0
        rows = self._sizes[-1]
        self._logits = torch.empty(rows, self.loaded.vocab_size, dtype=self.loaded.model.dtype, device=self.device)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        for size in reversed(self._sizes):
            for pages in reversed(self._classes):
                self._graphs[size, pages] = self._capture(size, pages, pool, stream)
        for size in reversed(self._piece_sizes):
            self._pieces[size] = self._capture_pieces(size, pool, stream)
        torch.cuda.synchronize()
        return time.monotonic() - start

    def _capture(self, size: int, pages: int, pool: Any, stream: torch.cuda.Stream) -> DecodeGraph:
        """A step of `size` padding rows, which read nothing and write nothing."""
        arrays = no_decodes(self.layout, self.max_pages)
        ids, positions, tables = self._send_decodes(arrays, np.zeros((2, 0), np.int32), size, pages)

        def step() -> Tensor:
            self.backend.begin(tables)
            logits = self._model(ids, positions, torch.arange(size, device=self.device))
            self._logits[:size].copy_(logits)
            assert self.backend.finite is not None
            return self.backend.finite

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # lazy set-up of libraries must not happen while capturing
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            finite = step()
        return DecodeGraph(graph, finite)

    def _capture_pieces(self, size: int, pool: Any, stream: torch.cuda.Stream) -> Pieces:
        """A step of `size` tokens, at most `_num_asked(size)` of which are asked for logits."""
        num_asked = self._num_asked(size)
        inputs, asked = self._staging.send([np.zeros((2, size), np.int32), np.zeros(num_asked, np.int32)])

        def forward() -> None:
            self._logits[:num_asked].copy_(self._model(inputs[0], inputs[1], asked))

        return Pieces(self.backend, forward, pool, stream)

    def _num_asked(self, size: int) -> int:
        return min(size, self._sizes[-1])

    def _pieces_for(self, num_tokens: int, num_asked: int) -> int:
        """Their size; 0: the step is larger than all that were captured."""
        fits = (size for size in self._piece_sizes if num_tokens <= size and num_asked <= self._num_asked(size))
        return next(fits, 0) if self._pieces else 0

    def _model(self, ids: Tensor, positions: Tensor, asked: Tensor) -> Tensor:
        """[number asked, V]"""
        output = self.loaded.model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=asked,
            gear_batch=self._attention,
        )
        return output.logits[0]

    @torch.inference_mode()
    def run(self, scheduled: list[Scheduled]) -> RunResult:
        """Launch the scheduled tokens. Running the same again is harmless: it writes the same bytes."""
        self._launched += scheduled
        ordered = sorted(scheduled, key=lambda item: item.num_new > 1)  # a chunk of one token is as good as a decode
        arrays = step_arrays(paged_batch(ordered, self.layout), self.layout, self.backend.scratch_tokens)
        inputs = self._inputs(ordered)
        num_scored = sum(len(item.scored) for item in scheduled)
        if arrays.num_decodes == len(ordered) and not self.eager and not num_scored:
            logits, finite = self._replay(arrays, inputs)
            poisoned = ~finite
            if not all(item.samples for item in scheduled):
                sampling = [i for i, item in enumerate(scheduled) if item.samples]
                logits = logits[on_device(sampling, logits)]
        else:
            logits, poisoned = self._run_layers(scheduled, ordered, arrays, inputs)
        sampled = self.backend.seal_decoded()
        num_sampled = len(logits) - num_scored
        return RunResult(
            logits[:num_sampled],
            [SampledErrors(*sampled)] if sampled else [],
            poisoned,
            logits[num_sampled:] if num_scored else None,
        )

    def _inputs(self, ordered: list[Scheduled]) -> Ints:
        """[2, T] token ids and positions; −1 − r for a token that was drawn in row r and is not known here."""
        ids: list[int] = []
        for item in ordered:
            end, tokens = item.start + item.num_new, item.sequence.token_ids
            ids += tokens[item.start : end]
            if end > len(tokens):
                ids.append(-1 - self._drawn_rows[item.sequence.request_id])
        starts, counts = np.array([(item.start, item.num_new) for item in ordered]).T
        before = np.cumsum(counts) - counts  # rows of the sequences before it
        return np.array([ids, np.arange(len(ids)) + np.repeat(starts - before, counts)], np.int32)

    def _ids(self, ids: Tensor) -> Tensor:
        """Tokens that were drawn in the last step put in their places."""
        return torch.where(ids < 0, self._drawn[(-1 - ids).clamp(min=0)].int(), ids)

    def _send_decodes(
        self, arrays: StepArrays, inputs: Ints, size: int, pages: int
    ) -> tuple[Tensor, Tensor, StepTables]:
        """Padded to `size` rows: (ids, positions, tables), and what it fills behind them, where no graph looks."""
        rows = size - arrays.num_decodes
        fixed = padded(arrays, size, self.max_pages)
        filled = arrays.filled_by_decodes
        sent = self._staging.send([np.pad(inputs, ((0, 0), (0, rows))), *fixed, *filled.arrays()])
        splits = self.backend.splits(size, self._group, pages)
        tables = StepTables(
            size, splits, RowTables(*sent[1:6]), filled_by_decodes=self.backend.seal_tables(filled, sent[6:])
        )
        return sent[0][0], sent[0][1], tables

    def _replay(self, arrays: StepArrays, inputs: Ints) -> tuple[Tensor, Tensor]:
        n = arrays.num_decodes
        longest = -(-int(arrays.lengths.max()) // self.layout.page_size)
        size = next(size for size in self._sizes if size >= n)
        pages = next(pages for pages in self._classes if pages >= longest)
        ids, _, tables = self._send_decodes(arrays, inputs, size, pages)
        ids.copy_(self._ids(ids))
        graph = self._graphs[size, pages]
        graph.graph.replay()
        self.backend.begin(tables)  # for what is sealed after it
        return self._logits[:n], graph.finite[:n]

    def _run_layers(
        self,
        scheduled: list[Scheduled],
        ordered: list[Scheduled],
        arrays: StepArrays,
        inputs: Ints,
    ) -> tuple[Tensor, Tensor]:
        """(logits [those that sample, then those that are scored, V], poisoned [scheduled])"""
        ends = dict(zip(map(id, ordered), np.cumsum([item.num_new for item in ordered]).tolist(), strict=True))
        bounds = np.array([[ends[id(item)] - item.num_new, ends[id(item)]] for item in scheduled], np.int32)
        sampled = [ends[id(item)] - 1 for item in scheduled if item.samples]
        scored = [ends[id(item)] - item.num_new + at - item.start for item in scheduled for at in item.scored]
        asked = np.array(sampled + scored, np.int32)
        num_tokens, num_asked = inputs.shape[1], len(asked)
        if size := self._pieces_for(num_tokens, num_asked):
            inputs = np.pad(inputs, ((0, 0), (0, size - num_tokens)))
            asked = np.pad(asked, (0, self._num_asked(size) - num_asked))
        sent = self._staging.send([inputs, asked, bounds, *arrays_to_send(arrays)])
        longest = -(-int(arrays.lengths.max(initial=0)) // self.layout.page_size)
        splits = self.backend.splits(arrays.num_decodes, self._group, longest)
        self.backend.begin(self.backend.tables(arrays, sent[3:], splits))
        ids, positions = sent[0]
        if size:
            ids.copy_(self._ids(ids))
            self._pieces[size].replay(num_tokens, to_the_end=num_asked > 0)
            logits = self._logits[:num_asked]
        else:
            some = sent[1] if num_asked else sent[2][:1, 0]  # a model is not asked for no row at all
            logits = self._model(self._ids(ids), positions, some)[:num_asked]
        assert self.backend.finite is not None
        bad = nn.functional.pad((~self.backend.finite).int().cumsum(0), (1, 0))
        return logits, bad[sent[2][:, 1]] > bad[sent[2][:, 0]]

    def keep_drawn(self, sequences: list[Sequence], tokens: list[Tensor]) -> None:
        """The next step's last tokens, which only the device knows yet."""
        self._in_flight, self._launched = self._launched, []
        self._drawn_rows = {sequence.request_id: row for row, sequence in enumerate(sequences)}
        if sequences:
            drawn = torch.cat(tokens)
            self._drawn[: len(drawn)] = drawn.clamp(min=0)  # where nothing could be drawn, the sequence ends anyway

    def move(self, moves: list[Move]) -> None:
        """Copy slots to host memory and back, bit for bit, as if in the order given: before the next step runs."""
        if not moves:
            return
        with self._beside_the_step({m.slot for m in moves if m.out}, {m.slot for m in moves if not m.out}):
            if self._copies is None or self._copies_out is None:
                copy_slots(moves, self.slab, self.host_slab)
                return
            streams = {False: self._copies, True: self._copies_out}
            self._copies_out.wait_stream(self._copies)
            over: dict[bool, list[torch.cuda.Event]] = {False: [], True: []}
            for run in runs(moves, MOVES_A_RUN):
                with torch.cuda.stream(streams[run.out]):
                    if run.after:
                        streams[run.out].wait_event(over[not run.out][run.after - 1])
                    copy_slots(run.moves, self.slab, self.host_slab)
                    over[run.out].append(streams[run.out].record_event())
            self._copies.wait_stream(self._copies_out)

    @contextlib.contextmanager
    def _beside_the_step(self, read: set[int], written: set[int]) -> Iterator[None]:
        """Copies that read and write these slots, while the step that was launched last may still be running.

        They wait for its end only if it writes a slot that they read, or touches one that they write. Steps before it
        have ended: their tokens are known. The next step waits for the copies.
        """
        if self._copies is None:
            yield
            return
        compute = torch.cuda.current_stream()
        if any(_clash(item, read, written) for item in self._in_flight):
            self._copies.wait_stream(compute)
        with torch.cuda.stream(self._copies):
            yield
        compute.wait_stream(self._copies)

    def close(self) -> None:
        """Give the pool and the graphs back, for a program that makes another runner."""
        self._graphs.clear()
        self._pieces.clear()
        self.backend.close()
        self.slab = self._logits = torch.empty(0)

    def read_page(self, slot: int, *, in_host: bool) -> bytes:
        """The bytes of a slot, of the pool or of host memory, after all moves so far."""
        torch.cuda.current_stream().synchronize()
        return (self.host_slab if in_host else self.slab)[slot].cpu().numpy().tobytes()

    def write_page(self, slot: int, data: bytes) -> None:
        with self._beside_the_step(set(), {slot}):
            self.slab[slot].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def peak_memory_bytes(self) -> int:
        """The allocator's peak, which is asked now and then: it counts long."""
        now_s = time.monotonic()
        if now_s > self._peak[0] + PEAK_S:
            self._peak = now_s, torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        return self._peak[1]


def _clash(item: Scheduled, read: set[int], written: set[int]) -> bool:
    """Whether a step with that item writes one of the slots `read`, or touches one of `written`."""
    own = {*item.open_slots, *item.next_open_slots, *item.taken_slots}
    return not (own.isdisjoint(read) and own.isdisjoint(written) and written.isdisjoint(item.pages))


def compile_layers(model: nn.Module) -> None:
    """Let every decoder layer run compiled, all of them by the same code."""
    for layer in decoder_layers(model):
        if "forward" in vars(layer):
            continue  # compiled already
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The list whose i-th module holds the attention of layer i: experts, which may be more, hold none.

    Raises EngineStartError for a model that keeps its layers elsewhere.
    """
    for modules in model.modules():  # a layer comes before what is in it
        if isinstance(modules, nn.ModuleList) and len(modules) and all(map(_attends_as, modules, count())):
            return list(modules)
    raise EngineStartError("the layers of this model are in no list, as compiling them needs: use --eager")


def _attends_as(module: nn.Module, layer: int) -> bool:
    return any(getattr(part, "layer_idx", None) == layer for part in module.modules())


def no_decodes(layout: Layout, max_pages: int) -> StepArrays:
    """A step of nothing."""
    nothing = np.zeros(0, np.int32)
    runs = np.zeros((0, layout.max_runs), np.int32)
    sealed = SealArrays(nothing, nothing, runs, nothing, nothing)
    table = np.zeros((0, max_pages), np.int32)
    return StepArrays(0, nothing, nothing, table, runs, nothing, sealed, sealed, [], nothing, nothing, nothing)


def staging_ints(layout: Layout, max_running: int, max_batch_tokens: int, max_pages: int) -> int:
    """Integers of the largest step: rows, and per sequence its pages twice, its runs and a page that was begun."""
    rows = max(max_batch_tokens, max_running)
    per_sequence = 4 * max_pages + 4 * layout.max_runs + 3 * layout.page_size + 64
    return 16 * rows + 4 * MAX_PIECES_TOKENS + max_running * per_sequence + 4096
