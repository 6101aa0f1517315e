"""Any order of requests, steps, aborts, preemptions and evictions: slots add up, references are explained, and every
token attends to the very tokens that stand before it.

The runner has no model and a memory: it writes into slots what a real one would, the tokens, and reads them back.
"""

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_engine_steps import VOCAB, tiny_layout

from gear_compression.layout import Layout
from gear_engine.engine import Engine, Limits
from gear_engine.page_store import PageStore
from gear_engine.prefix_cache import Move
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.runner import RunResult
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Scheduled, Sequence
from gear_engine.slots import SlotAllocator, num_slots_for_one

MAX_LEN = 300


class RememberingRunner:
    """A slot holds tokens. The next token is drawn from all tokens before it, as they are found in the slots."""

    def __init__(self, layout: Layout, failing: set[str], overlaps: bool) -> None:
        self.layout = layout
        self.overlaps = overlaps
        self.drawn: dict[str, int] = {}  # in the last step
        self.failing = failing
        self.slab: dict[int, list[int]] = {}
        self.host_slab: dict[int, list[int]] = {}

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            if move.out:
                self.host_slab[move.host_slot] = self.slab[move.slot]
            else:
                self.slab[move.slot] = self.host_slab[move.host_slot]

    def read_page(self, slot: int, *, in_host: bool) -> bytes:
        return bytes((self.host_slab if in_host else self.slab)[slot])

    def write_page(self, slot: int, data: bytes) -> None:
        self.slab[slot] = list(data)

    def peak_memory_bytes(self) -> int:
        return 0

    def run(self, scheduled: list[Scheduled]) -> RunResult:
        writes: dict[int, list[int]] = {}
        texts = []
        for item in scheduled:
            sealed = item.pages[: item.start // self.layout.page_size]
            known = [t for slot in sealed + item.open_slots for t in self.slab[slot]]
            tokens = list(item.sequence.token_ids)
            if item.sequence.num_pending:
                tokens.append(self.drawn[item.sequence.request_id])
            assert known == tokens[: item.start] or item.sequence.request_id in self.failing
            texts.append(tokens[: item.start + item.num_new])
            written = self._written(item, texts[-1])
            if item.sequence.request_id in self.failing:
                written = {slot: [] for slot in written}
            assert not writes.keys() & written.keys()
            writes |= written
        held = {slot for item in scheduled for slot in item.pages[: item.start // self.layout.page_size]}
        assert not writes.keys() & held, "a sealed page is never written again"
        self.slab |= writes
        texts = [text for text, item in zip(texts, scheduled, strict=True) if item.samples]
        logits = torch.zeros(len(texts), VOCAB)
        for row, text in zip(logits, texts, strict=True):
            row[next_token(text)] = 5.0
        return RunResult(logits, [], torch.tensor([item.sequence.request_id in self.failing for item in scheduled]))

    def keep_drawn(self, sequences: list[Sequence], tokens: list[torch.Tensor]) -> None:
        drawn = [token for part in tokens for token in part.tolist()]
        self.drawn = {sequence.request_id: token for sequence, token in zip(sequences, drawn, strict=True)}

    def _written(self, item: Scheduled, text: list[int]) -> dict[int, list[int]]:
        """What each slot that the step writes holds after it."""
        page_size, run_tokens = self.layout.page_size, self.layout.run_tokens
        num_full = len(text) // page_size
        assert len(item.pages) == num_full
        written = {
            item.pages[i]: text[i * page_size : (i + 1) * page_size] for i in range(item.start // page_size, num_full)
        }
        rest = text[num_full * page_size :]
        assert len(item.next_open_slots) == -(-len(rest) // run_tokens)
        for i, slot in enumerate(item.next_open_slots):
            written[slot] = rest[i * run_tokens : (i + 1) * run_tokens]
        return written


class Disk(Executor):
    """Reads and writes before the next step, or once they are waited for: with threads no run would be like another."""

    def __init__(self) -> None:
        self.tasks: list[tuple[DiskTask, Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **_: Any) -> Future[Any]:
        task = DiskTask()
        task.disk = self
        self.tasks.append((task, fn, args))
        return task

    def run(self) -> None:
        while self.tasks:
            task, fn, args = self.tasks.pop(0)
            task.set_result(fn(*args))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.run()


class DiskTask(Future[Any]):
    disk: Disk

    def result(self, timeout: float | None = None) -> Any:
        self.disk.run()
        return super().result(timeout)


def next_token(text: list[int]) -> int:
    return hashlib.sha256(bytes(text)).digest()[0] % VOCAB


class Serving(RuleBasedStateMachine):
    @initialize(
        preset=st.sampled_from(["near-lossless", "gear-4bit", "none"]),
        spare=st.integers(0, 12),
        num_host_slots=st.sampled_from([0, 1, 3, 8, 50]),
        prefix_cache=st.booleans(),
        chunk=st.sampled_from([20, 70, 200]),
        num_files=st.sampled_from([0, 2, 50]),
        overlaps=st.booleans(),
    )
    def start(
        self,
        preset: str,
        spare: int,
        num_host_slots: int,
        prefix_cache: bool,
        chunk: int,
        num_files: int,
        overlaps: bool,
    ) -> None:
        layout = tiny_layout(preset)
        self.failing: set[str] = set()
        self.folder = tempfile.TemporaryDirectory()
        self.disk = Disk()
        store = None
        if num_files and prefix_cache:
            store = PageStore(Path(self.folder.name), num_files * 5 * layout.page_size, bytes(32), layout.page_size)
            for threads in (store._writer, store._reader):
                threads.shutdown()
            store._writer = store._reader = self.disk
        self.runner = RememberingRunner(layout, self.failing, overlaps)
        self.scheduler = Scheduler(
            SlotAllocator(num_slots_for_one(layout, MAX_LEN) + spare),
            layout,
            max_running=4,
            max_batch_tokens=chunk,
            eos_token_ids=[],
            prefix_cache=prefix_cache,
            num_host_slots=num_host_slots,
            store=store,
            chunk_tokens=chunk // 4,
            far_tokens=50,
        )
        self.engine = Engine(self.scheduler, self.runner, Sampler(VOCAB, []), Limits(MAX_LEN, VOCAB))
        self.wanted: dict[str, AddRequest] = {}
        self.answers: dict[str, list[int]] = {}
        self.num_requests = 0

    @rule(
        parts=st.lists(st.integers(1, 2), min_size=1, max_size=5),
        tail=st.integers(0, 40),
        num_same=st.integers(1, 3),
        max_tokens=st.integers(1, 90),
        salt=st.sampled_from(["", "", "x"]),
        priority=st.integers(0, 1),
    )
    def add(self, parts: list[int], tail: int, num_same: int, max_tokens: int, salt: str, priority: int) -> None:
        token_ids = [part for part in parts for _ in range(45)] + [9] * tail
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        for _ in range(num_same):
            self.num_requests += 1
            request = AddRequest(str(self.num_requests), token_ids[: MAX_LEN - max_tokens], params, priority, salt)
            self.engine.add(request)
            self.wanted[request.request_id] = request
            self.answers[request.request_id] = []

    @rule(num_steps=st.sampled_from([1, 3, 10, 40]))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step()
            self.scheduler.check_integrity()

    def _step(self) -> None:
        self.disk.run()
        for output in self.engine.step().outputs:
            self.answers[output.request_id] += output.token_ids
            if output.finish_reason == "length":
                self._check_whole(output.request_id)
            elif output.finish_reason is not None:
                assert output.request_id in self.failing
                del self.wanted[output.request_id]

    def _check_whole(self, request_id: str) -> None:
        request, text = self.wanted.pop(request_id), []
        for _ in range(request.params.max_tokens):
            text.append(next_token(request.token_ids + text))
        assert self.answers[request_id] == text

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.wanted)))
        assert self.engine.abort(request_id) is not None
        del self.wanted[request_id]

    @precondition(lambda self: self.wanted)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.failing.add(data.draw(st.sampled_from(sorted(self.wanted))))

    @precondition(lambda self: self.scheduler.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        self.scheduler._preempt(data.draw(st.sampled_from(self.scheduler.running)))

    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        allocator = self.scheduler.allocator
        num_pages = data.draw(st.integers(0, allocator.num_cached))
        num_left = allocator.num_cached - num_pages
        slots = self.scheduler.cache.take(allocator.num_free + num_pages)
        assert slots is not None
        assert allocator.num_cached == num_left
        allocator.give_back(slots)

    @invariant()
    def everything_is_explained(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self._step()
            self.scheduler.check_integrity()
        assert not self.wanted, "a request never ended"
        assert self.scheduler.allocator.num_active == 0
        stats = self.engine.stats()
        assert stats.num_swapped == 0
        assert stats.pages_free + stats.pages_cached == self.scheduler.allocator.num_slots
        self.engine.close()
        self.folder.cleanup()


Serving.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestServing = Serving.TestCase
