"""Decides which sequences compute which tokens in the next step, and in which slots. Integers only.

First come, first served within a priority. A sequence that finds no slot takes those of cached pages, and then those of
the youngest sequence of the lowest priority, which goes on later. Its open page is swapped out to host memory, and so
are its sealed pages when their slots are needed. Where host memory does not suffice, they are computed again from the
tokens, which are kept, so nothing is lost.
"""

import bisect
from collections.abc import Sequence as Many

from gear_compression.layout import Layout
from gear_engine.prefix_cache import Move, Page, PrefixCache
from gear_engine.protocol import EngineStats, FinishReason, RequestOutput
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
        prefix_cache: bool = True,
        num_host_slots: int = 0,
    ) -> None:
        """`prefix_cache` off: sequences share nothing. `num_host_slots`: of host memory, to swap pages out to."""
        assert max_batch_tokens >= max_running, "a step must have room for one token of every running sequence"
        self.allocator = allocator
        self.host = SlotAllocator(num_host_slots)
        self.cache = PrefixCache(allocator, self.host)
        self.prefix_cache = prefix_cache
        self.layout = layout
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0  # after which something is computed again
        self.num_swaps_out = 0
        self.num_swaps_in = 0
        self.num_prompt_tokens = 0  # of admitted requests, since the start
        self.num_cached_tokens = 0  # of these, found in the cache
        self.num_prefix_hits = 0
        self.num_generated = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def has(self, request_id: str) -> bool:
        return any(s.request_id == request_id for sequences in (self.waiting, self.running) for s in sequences)

    def add(self, sequence: Sequence) -> None:
        if not self.prefix_cache:
            sequence.cache_salt = f"{sequence.order}"  # no other sequence's
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
        num_waiting = len(self.waiting)
        for decoding in (True, False):
            for sequence in list(self.running):
                budget = self.max_batch_tokens - sum(item.num_new for item in scheduled)
                if (sequence.num_to_compute == 1) == decoding and budget and sequence in self.running:
                    item = self._take(sequence, self._num_next(sequence, budget), scheduled)
                    if item is not None:
                        scheduled.append(item)
        if len(self.waiting) == num_waiting:  # else a sequence lost its slots, and is not to take others' at once
            self._admit(scheduled)
        moves, self.cache.moves = self.cache.moves, []
        return Batch(scheduled, moves)

    def _admit(self, scheduled: list[Scheduled]) -> None:
        """Let waiting sequences in, oldest first, each with the pages of its prefix that are in the pool already.

        One that would find a further page soon is passed over until then; of those after it as many are looked at as
        keep a step short.
        """
        budget = self.max_batch_tokens - sum(item.num_new for item in scheduled)
        for sequence in self.waiting[: 2 * self.max_running]:
            if not budget or len(self.running) >= self.max_running:
                break
            found = self._find(sequence)
            if self._is_coming(sequence, found):
                continue
            item = self._start(sequence, found, budget) if self._has_room(sequence, found, scheduled) else None
            if item is None:
                break  # slots come free when running sequences end
            self.waiting.remove(sequence)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            scheduled.append(item)
            budget -= item.num_new

    def _find(self, sequence: Sequence) -> list[Page]:
        """The longest prefix of it in the pool, without tokens whose logits are wanted: the last, for one."""
        return self.cache.find(sequence.cache_salt, self._reusable(sequence))

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        page_size = self.layout.page_size
        last = len(sequence.prompt_logprobs) if sequence.num_unscored else len(sequence.token_ids) - 1
        return sequence.page_tokens(page_size)[: last // page_size]

    def _is_coming(self, sequence: Sequence, found: list[Page]) -> bool:
        """Whether a running sequence is computing the page after `found`: waiting for it computes it only once.

        Only for one that stands before it in the order. Nobody waits for a sequence that waits itself, and what is
        waited for goes on as if nobody did, so that the wait ends: the page is sealed, or its sequence ended or was
        preempted.
        """
        wanted = self._reusable(sequence)[len(found) : len(found) + 1]
        return bool(wanted) and any(
            len(other.pages) == len(found)
            and other.order < sequence.order
            and other.cache_salt == sequence.cache_salt
            and other.pages[-1:] == found[-1:]
            and other.page_tokens(self.layout.page_size)[len(found) : len(found) + 1] == wanted
            for other in self.running
        )

    def _has_room(self, sequence: Sequence, found: list[Page], scheduled: list[Scheduled]) -> bool:
        """Whether all its known tokens will find slots beside those of the running sequences.

        Admitted on the room for a first chunk alone, a long prompt would be thrown out again half-way, over and over.
        """
        if not self.running:
            return True
        resident = [page for page in found if not page.in_host]
        available = self.allocator.num_free + self.allocator.num_cached - sum(not p.num_holders for p in resident)
        granted = sum(len(item.taken_slots) for item in scheduled)
        promised = sum(self._slots_to_come(other) for other in [*self.running, sequence]) - len(resident)
        in_flight = num_slots_for_one(self.layout, 0)  # a page that is being sealed is held twice
        return available + granted >= promised + in_flight

    def _start(self, sequence: Sequence, found: list[Page], budget: int) -> Scheduled | None:
        """Its first chunk, after the pages `found` and its open page if it was swapped out; None: no slots for it."""
        num_found = len(found) * self.layout.page_size
        resumes = num_found <= sequence.num_swapped < num_found + self.layout.page_size
        if not self.cache.hold(found):
            return None
        runs = self.cache.take(len(sequence.host_slots) if resumes else 0)
        if runs is None:
            self.cache.release(found)
            return None
        sequence.pages, sequence.open_slots = found, runs
        sequence.num_computed = sequence.num_swapped if resumes else num_found
        item = self._try(sequence, self._num_next(sequence, budget))
        if item is None:
            self._let_go(sequence)
            return None
        if not sequence.was_scheduled:
            sequence.num_cached = num_found
        if sequence.num_swapped:
            self._end_swap(sequence)
        return item

    def _end_swap(self, sequence: Sequence) -> None:
        """It runs again: with the bytes that it had, or without them if pages of it were dropped meanwhile."""
        if sequence.num_computed >= sequence.num_swapped:
            self.num_swaps_in += 1
        else:
            self.num_preemptions += 1
        for slot, host_slot in zip(sequence.open_slots, sequence.host_slots, strict=False):  # none, if it starts over
            self.cache.moves.append(Move(slot, host_slot, out=False))
        self.host.give_back(sequence.host_slots)
        sequence.host_slots, sequence.num_swapped = [], 0

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
        slots = self.cache.take(num_sealed + num_runs(layout, end) - len(kept))
        if slots is None:
            return None
        return Scheduled(
            sequence=sequence,
            start=start,
            num_new=num_new,
            samples=num_new == sequence.num_to_compute,
            pages=[p.slot for p in sequence.pages] + (sequence.open_slots if in_place else []) + slots[:num_sealed],
            next_open_slots=kept + slots[num_sealed:],
            spent_slots=sequence.open_slots if num_filled and not in_place else [],
            taken_slots=slots,
        )

    def _num_next(self, sequence: Sequence, budget: int) -> int:
        """Tokens of its next chunk: fewer where each has a row of logits, for which as much memory is set aside as
        sampling `max_running` rows takes."""
        return min(sequence.num_to_compute, budget, 8 * self.max_running if sequence.num_unscored else budget)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting with all its tokens and none of its slots; its sealed pages it may find again."""
        self.running.remove(sequence)
        host_slots = self.cache.take_host(len(sequence.open_slots)) if self.host.num_slots else None
        if host_slots is None:
            self.num_preemptions += 1
        else:
            self.num_swaps_out += 1
            sequence.num_swapped, sequence.host_slots = sequence.num_computed, host_slots
            for slot, host_slot in zip(sequence.open_slots, host_slots, strict=True):
                self.cache.moves.append(Move(slot, host_slot, out=True))
        self._let_go(sequence)
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        """It has ended: its pages are for others now, if they may be shared."""
        self.host.give_back(sequence.host_slots)
        sequence.host_slots, sequence.num_swapped = [], 0
        self._let_go(sequence, keep=self.prefix_cache)

    def _let_go(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Of its slots in the pool."""
        self.allocator.give_back(sequence.open_slots)
        self.cache.release(sequence.pages, keep=keep)
        sequence.pages, sequence.open_slots, sequence.num_computed = [], [], 0

    def commit(self, batch: Batch, tokens: dict[str, int], failed: dict[str, str]) -> list[RequestOutput]:
        """Take note of what a step computed: `tokens` drawn and sentences of failure, both by request id."""
        outputs = []
        for item in batch.scheduled:
            sequence = item.sequence
            if not sequence.was_scheduled:
                self._count_start(sequence)
            output = None
            if error := failed.get(sequence.request_id):
                self.allocator.give_back(item.taken_slots)  # what is in them is no page that others may find
                output = RequestOutput(sequence.request_id, [], finish_reason="error", error=error)
            else:
                self._advance(item)
                if item.samples:
                    output = self._append(sequence, tokens[sequence.request_id])
            if output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    self.running.remove(sequence)
                    self._release(sequence)
        return outputs

    def _count_start(self, sequence: Sequence) -> None:
        sequence.was_scheduled = True
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_cached
        self.num_prefix_hits += sequence.num_cached > 0

    def _advance(self, item: Scheduled) -> None:
        """The step's tokens are in the pool; the pages that it sealed may be found from now on."""
        sequence = item.sequence
        page_tokens = sequence.page_tokens(self.layout.page_size)
        for slot in item.pages[len(sequence.pages) :]:
            parent = sequence.pages[-1] if sequence.pages else None
            tokens = page_tokens[len(sequence.pages)]
            sequence.pages.append(self.cache.add(parent, sequence.cache_salt, tokens, slot))
        sequence.open_slots = item.next_open_slots
        sequence.num_computed += item.num_new
        self.allocator.give_back(item.spent_slots)

    def _append(self, sequence: Sequence, token: int) -> RequestOutput:
        params, cached = sequence.params, sequence.num_cached
        sequence.token_ids.append(token)
        self.num_generated += 1
        is_end = token in self.eos_token_ids and not params.ignore_eos
        if (is_end or token in params.stop_token_ids) and sequence.num_output >= params.min_tokens:
            return RequestOutput(sequence.request_id, [token], "stop", stop_token_id=token, num_cached_tokens=cached)
        reason: FinishReason | None = "length" if sequence.num_output >= params.max_tokens else None
        return RequestOutput(sequence.request_id, [token], reason, num_cached_tokens=cached)

    def stats(self, peak_memory_bytes: int) -> EngineStats:
        """State now and totals since the start. What sequences share counts once, what is only cached not as KV."""
        page_bytes, page_size = self.layout.page_bytes, self.layout.page_size
        num_open = sum(len(s.open_slots) for s in self.running)
        num_sealed = self.allocator.num_active - num_open
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_swapped=sum(s.num_swapped > 0 for s in self.waiting),
            pages_free=self.allocator.num_free,
            pages_active=self.allocator.num_active,
            pages_cached=self.allocator.num_cached,
            kv_tokens=num_sealed * page_size + sum(s.num_computed % page_size for s in self.running),
            kv_sealed_bytes=num_sealed * page_bytes,
            kv_open_bytes=num_open * page_bytes,
            kv_swapped_bytes=self.host.num_active * page_bytes,
            kv_peak_bytes=self.allocator.peak_active * page_bytes,
            prompt_tokens_total=self.num_prompt_tokens,
            cached_tokens_total=self.num_cached_tokens,
            prefix_hits_total=self.num_prefix_hits,
            generation_tokens_total=self.num_generated,
            peak_memory_bytes=peak_memory_bytes,
            swaps_out_total=self.num_swaps_out,
            swaps_in_total=self.num_swaps_in,
            preemptions_total=self.num_preemptions,
        )

    def check_integrity(self) -> None:
        """Every active slot is a run of one open page, or a sealed page with as many holders as it says; for tests."""
        self.allocator.check_integrity()
        self.cache.check_integrity(page for s in self.running for page in s.pages)
        active = [slot for s in self.running for slot in s.open_slots]
        active += {page: page.slot for s in self.running for page in s.pages}.values()
        assert len(active) == len(set(active)) == self.allocator.num_active
        assert all(len(s.pages) == s.num_computed // self.layout.page_size for s in self.running)
        assert not any(s.pages or s.open_slots for s in self.waiting)
        swapped = [slot for s in self.waiting for slot in s.host_slots] + self.cache.host_slots()
        assert len(swapped) == len(set(swapped)) == self.host.num_active
        assert not any(s.host_slots or s.num_swapped for s in self.running)
