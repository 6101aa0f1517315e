"""Decides which sequences compute which tokens in the next step, and in which slots. Integers only.

First come, first served within a priority. A sequence that finds no slot takes those of the youngest one of the lowest
priority, which starts over later: its tokens are kept and its pages computed again, so nothing is lost.
"""

import bisect
from collections.abc import Sequence as Many

from gear_compression.layout import Layout
from gear_engine.protocol import EngineStats, RequestOutput
from gear_engine.sequence import Batch, Scheduled, Sequence
from gear_engine.slots import SlotAllocator, num_runs, num_slots_for_one, num_slots_held


class Scheduler:
    """Waiting and running sequences, each list in order of (priority, arrival)."""

    def __init__(
        self,
        allocator: SlotAllocator,
        layout: Layout,
        *,
        max_running: int,
        max_batch_tokens: int,
        eos_token_ids: Many[int],
    ) -> None:
        assert max_batch_tokens >= max_running, "a step must have room for one token of every running sequence"
        self.allocator = allocator
        self.layout = layout
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of admitted requests, since the start
        self.num_generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def has(self, request_id: str) -> bool:
        return any(s.request_id == request_id for sequences in (self.waiting, self.running) for s in sequences)

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def abort(self, request_id: str) -> bool:
        """End a sequence in whatever phase it is. False if there is none of that id (it may just have ended)."""
        for sequences in (self.waiting, self.running):
            for sequence in sequences:
                if sequence.request_id == request_id:
                    sequences.remove(sequence)
                    self._release(sequence)
                    return True
        return False

    def schedule(self) -> Batch:
        """Take slots for the next step: a token of every decoding sequence, then chunks of prompts, oldest first."""
        scheduled: list[Scheduled] = []
        num_preemptions = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self.running):
                budget = self.max_batch_tokens - sum(item.num_new for item in scheduled)
                if (sequence.num_to_compute == 1) == decoding and budget and sequence in self.running:
                    item = self._take(sequence, min(sequence.num_to_compute, budget), scheduled)
                    if item is not None:
                        scheduled.append(item)
        if self.num_preemptions == num_preemptions:  # else what came free is not there to be taken again at once
            self._admit(scheduled)
        return Batch(scheduled)

    def _admit(self, scheduled: list[Scheduled]) -> None:
        """Let waiting sequences in, oldest first, while all their known tokens will find room.

        Admitted on the room for a first chunk alone, a long prompt would be thrown out again half-way, over and over.
        """
        budget = self.max_batch_tokens - sum(item.num_new for item in scheduled)
        while self.waiting and budget and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if self.running:
                granted = sum(len(item.taken_slots) for item in scheduled)
                promised = sum(self._slots_to_come(other) for other in [*self.running, sequence])
                in_flight = num_slots_for_one(self.layout, 0)  # a page that is being sealed is held twice
                if self.allocator.num_free + granted < promised + in_flight:
                    break  # slots come free when running sequences end
            item = self._try(sequence, min(sequence.num_to_compute, budget))
            if item is None:
                break
            self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            scheduled.append(item)
            budget -= item.num_new

    def _slots_to_come(self, sequence: Sequence) -> int:
        """Slots that its known tokens and the next one still need."""
        held = len(sequence.pages) + len(sequence.open_slots)
        return max(0, num_slots_held(self.layout, len(sequence.token_ids) + 1) - held)

    def _take(self, sequence: Sequence, num_new: int, scheduled: list[Scheduled]) -> Scheduled | None:
        """Slots for a running sequence, from those behind it in the order if need be; None if it is the last itself."""
        while (item := self._try(sequence, num_new)) is None:
            victim = self.running[-1]
            for other in scheduled:
                if other.sequence is victim:  # it was to run in this step
                    scheduled.remove(other)
                    self.allocator.give_back(other.taken_slots)
                    break
            self._preempt(victim)
            if victim is sequence:
                return None
        return item

    def _try(self, sequence: Sequence, num_new: int) -> Scheduled | None:
        """Take the slots that `num_new` more tokens need, or none at all."""
        layout, start = self.layout, sequence.num_computed
        end = start + num_new
        num_filled = end // layout.page_size - start // layout.page_size
        in_place = layout.is_raw and num_filled > 0 and bool(sequence.open_slots)  # a raw page is sealed where it lies
        kept = [] if num_filled else sequence.open_slots
        num_sealed = num_filled - in_place
        slots = self.allocator.take(num_sealed + num_runs(layout, end) - len(kept))
        if slots is None:
            return None
        return Scheduled(
            sequence=sequence,
            start=start,
            num_new=num_new,
            samples=num_new == sequence.num_to_compute,
            pages=sequence.pages + (sequence.open_slots if in_place else []) + slots[:num_sealed],
            next_open_slots=kept + slots[num_sealed:],
            spent_slots=sequence.open_slots if num_filled and not in_place else [],
            taken_slots=slots,
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting with all its tokens and none of its slots."""
        self.running.remove(sequence)
        self._release(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.give_back(sequence.pages + sequence.open_slots)
        sequence.pages, sequence.open_slots, sequence.num_computed = [], [], 0

    def commit(self, batch: Batch, tokens: dict[str, int], failed: dict[str, str]) -> list[RequestOutput]:
        """Take note of what a step computed: `tokens` drawn and sentences of failure, both by request id."""
        outputs = []
        for item in batch.scheduled:
            sequence = item.sequence
            if not sequence.was_scheduled:
                sequence.was_scheduled = True
                self.num_prompt_tokens += sequence.num_prompt
            sequence.pages, sequence.open_slots = item.pages, item.next_open_slots
            sequence.num_computed += item.num_new
            self.allocator.give_back(item.spent_slots)
            output = None
            if error := failed.get(sequence.request_id):
                output = RequestOutput(sequence.request_id, [], finish_reason="error", error=error)
            elif item.samples:
                output = self._append(sequence, tokens[sequence.request_id])
            if output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    self.running.remove(sequence)
                    self._release(sequence)
        return outputs

    def _append(self, sequence: Sequence, token: int) -> RequestOutput:
        params = sequence.params
        sequence.token_ids.append(token)
        self.num_generated += 1
        is_end = token in self.eos_token_ids and not params.ignore_eos
        if (is_end or token in params.stop_token_ids) and sequence.num_output >= params.min_tokens:
            return RequestOutput(sequence.request_id, [token], finish_reason="stop", stop_token_id=token)
        is_last = sequence.num_output >= params.max_tokens
        return RequestOutput(sequence.request_id, [token], finish_reason="length" if is_last else None)

    def stats(self, peak_memory_bytes: int) -> EngineStats:
        """State now and totals since the start."""
        page_bytes = self.layout.page_bytes
        num_open = sum(len(s.open_slots) for s in self.running)
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            pages_free=self.allocator.num_free,
            pages_active=self.allocator.num_active,
            kv_tokens=sum(s.num_computed for s in self.running),
            kv_sealed_bytes=(self.allocator.num_active - num_open) * page_bytes,
            kv_open_bytes=num_open * page_bytes,
            kv_peak_bytes=self.allocator.peak_active * page_bytes,
            prompt_tokens_total=self.num_prompt_tokens,
            generation_tokens_total=self.num_generated,
            peak_memory_bytes=peak_memory_bytes,
            preemptions_total=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Every taken slot is explained by exactly one sequence at rest; for tests."""
        held = [slot for s in self.running for slot in s.pages + s.open_slots]
        assert len(held) == len(set(held)) == self.allocator.num_active
        assert not any(s.pages or s.open_slots for s in self.waiting)
