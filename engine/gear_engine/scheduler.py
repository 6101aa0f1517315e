"""Decides which sequences compute which tokens in the next step, and in which slots. Integers only.

First come, first served, with priorities that age (`service_order`). A sequence that finds no slot takes those of
cached pages, and then those of the sequence that stands last, which goes on later. Its open page is swapped out to host
memory, and so are its sealed pages when their slots are needed. Where host memory does not suffice, they are computed
again from the tokens, which are kept, so nothing is lost.
"""

import bisect
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass, field

from gear_compression.layout import Layout
from gear_engine.page_store import PageStore
from gear_engine.prefix_cache import Move, Page, PageKey, PrefixCache
from gear_engine.protocol import EngineStats, FinishReason, RequestOutput
from gear_engine.sequence import Batch, Scheduled, Sequence
from gear_engine.slots import SlotAllocator, num_slots_for_one

ARRIVALS_PER_PRIORITY = 1000


def service_order(priority: int, arrival: int) -> tuple[int, int]:
    """The smaller runs first and is preempted last: one priority up is worth having arrived 1000 requests earlier.

    So a request is overtaken by a bounded number of later ones, whatever theirs ask for: none starves. And what stands
    before it never changes, which is why lists stay sorted.
    """
    return (priority * ARRIVALS_PER_PRIORITY + arrival, arrival)


MAX_LOOKED_AT = 64  # waiting sequences in a step
MAX_READS = 4  # prefixes that are read from the page store at a time
MIN_CHUNK = 16  # what stands before is read once a chunk, whatever its size: ever smaller ones would end late


@dataclass(slots=True)
class _Step:
    """What a step has so far, in the order in which it runs."""

    budget: int  # tokens that it may still take
    far_tokens: int | None = None  # before a chunk, which make each of its tokens cost as much again
    num_slots: int = 0  # taken for it, beside those that its sequences hold
    items: dict[Sequence, Scheduled] = field(default_factory=dict)

    def room(self, start: int) -> int:
        """Tokens that a sequence may take after the `start` that it has."""
        if self.far_tokens is None:
            return self.budget
        return min(self.budget, max(self.budget * self.far_tokens // (self.far_tokens + start), MIN_CHUNK))

    def cost(self, item: Scheduled) -> int:
        """Of the budget: what `room` grants may overdraw it, but never in tokens."""
        if self.far_tokens is None or item.num_new == 1:
            return item.num_new
        return -(-item.num_new * (self.far_tokens + item.start) // self.far_tokens)

    def put(self, item: Scheduled) -> None:
        self.items[item.sequence] = item
        self.budget -= self.cost(item)
        self.num_slots += len(item.taken_slots)

    def drop(self, sequence: Sequence) -> Scheduled | None:
        """The sequence is not to run in this step."""
        item = self.items.pop(sequence, None)
        if item is not None:
            self.budget += self.cost(item)
            self.num_slots -= len(item.taken_slots)
        return item


class Scheduler:
    """Waiting and running sequences, each list in the order of `service_order`."""

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
        store: PageStore | None = None,
        chunk_tokens: int | None = None,
        far_tokens: int | None = None,
    ) -> None:
        """`prefix_cache` off: sequences share nothing. `num_host_slots`: of host memory, to swap pages out to.

        `chunk_tokens`: prompt tokens in a step beside decoding sequences, and one more for each of these, because a
        step of many takes longer anyway: it bounds what an arriving prompt adds to their latency. None: no bound.
        `far_tokens`: so many tokens of a prompt in the pool, which all further ones attend to, halve the bound for it.
        """
        assert max_batch_tokens >= max_running, "a step must have room for one token of every running sequence"
        self.allocator = allocator
        self.host = SlotAllocator(num_host_slots)
        self.cache = PrefixCache(allocator, self.host, store)
        self._reads: dict[bytes, Future[list[bytes]]] = {}  # of pages in the store, by the key of the first
        self.prefix_cache = prefix_cache
        self.layout = layout
        self._page_size, self._run_tokens = layout.page_size, layout.run_tokens
        self.max_running = max_running
        self.max_batch_tokens = max_batch_tokens
        self.chunk_tokens, self.far_tokens = chunk_tokens, far_tokens
        self.eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}  # waiting and running, by request id
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
        return bool(self._sequences)

    def get(self, request_id: str) -> Sequence | None:
        """The sequence of that id, waiting or running."""
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        if not self.prefix_cache:
            sequence.cache_salt = f"{sequence.order}"  # no other sequence's
        self._sequences[sequence.request_id] = sequence
        _insert(self.waiting, sequence)

    def abort(self, request_id: str) -> bool:
        """End a sequence in whatever phase it is. False if there is none of that id (it may just have ended)."""
        sequence = self.get(request_id)
        if sequence is None:
            return False
        _remove(self.running if sequence.is_running else self.waiting, sequence)
        self._release(sequence)
        return True

    def schedule(self) -> Batch:
        """Take slots for the next step: a token of every decoding sequence, then chunks of prompts, oldest first."""
        step = _Step(self.max_batch_tokens)
        num_waiting = len(self.waiting)
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            num_to_compute = sequence.num_to_compute
            if num_to_compute > 1:
                prompts.append(sequence)
            elif sequence.num_pending and sequence.num_output >= sequence.params.max_tokens:
                continue  # its last token is being drawn
            elif sequence.is_running:  # it may have been preempted for one before it
                self._take(sequence, 1, step)
        if step.items and self.chunk_tokens is not None:
            step.budget, step.far_tokens = min(step.budget, self.chunk_tokens + len(step.items)), self.far_tokens
        for sequence in prompts:
            if step.budget > 0 and sequence.is_running:
                self._take(sequence, self._num_next(sequence, step), step)
        if self.waiting and len(self.waiting) == num_waiting:
            self._admit(step)  # else a sequence lost its slots, and is not to take others' at once
        moves, self.cache.moves = self.cache.moves, []
        return Batch(list(step.items.values()), moves)

    def _admit(self, step: "_Step") -> None:
        """Let waiting sequences in, oldest first, each with the pages of its prefix that are in the pool already.

        One that would find a further page soon is passed over until then; of those after it as many are looked at as
        keep a step short.
        """
        if step.budget <= 0 or len(self.running) >= self.max_running:
            return
        coming = self._coming()
        promised: int | None = None  # slots that running sequences still need, once that is asked for
        for sequence in self.waiting[:MAX_LOOKED_AT]:
            found = self._find(sequence)
            if self._is_coming(sequence, found, coming):
                continue
            # All its known tokens are to find slots beside those of the running sequences. Admitted on the room for a
            # first chunk alone, a long prompt would be thrown out again half-way, over and over.
            if self.running:
                num_left = self._num_left(sequence, found, step)
                if promised is None and num_left >= 0:
                    promised = sum(map(self._slots_to_come, self.running))
                if promised is None or num_left < promised:
                    break  # slots come free when running sequences end
            data = self._read(sequence, found, wait=not step.items)
            if data is None:
                continue  # others need not wait for the disk
            item = self._start(sequence, found, data, step)
            if item is None:
                break
            _remove(self.waiting, sequence)
            _insert(self.running, sequence)
            sequence.is_running = True
            step.put(item)
            if promised is not None:
                promised += self._slots_to_come(sequence)
            if key := self._next_page(sequence):
                coming.setdefault(key, sequence)
            if step.budget <= 0 or len(self.running) >= self.max_running:
                break

    def _find(self, sequence: Sequence) -> list[Page]:
        """The longest prefix of it in the pool, without tokens whose logits are wanted: the last, for one."""
        return self.cache.find(sequence.cache_salt, self._reusable(sequence))

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        page_size = self.layout.page_size
        last = len(sequence.prompt_logprobs) if sequence.num_unscored else len(sequence.token_ids) - 1
        return sequence.page_tokens(page_size)[: last // page_size]

    def _read(self, sequence: Sequence, found: list[Page], *, wait: bool) -> list[bytes] | None:
        """The pages after `found` from the page store; None: they are being read, and `wait` is off."""
        wanted = self.cache.stored(found, sequence.cache_salt, self._reusable(sequence)[len(found) :])
        if self.cache.store is None or not wanted:
            return []
        key = wanted[0].key
        if key not in self._reads:
            if len(self._reads) >= MAX_READS:
                unused = [key for key, read in self._reads.items() if read.done()]  # whose request was aborted
                if not unused:
                    return None
                del self._reads[unused[0]]
            self._reads[key] = self.cache.store.read(wanted)
        if not (wait or self._reads[key].done()):
            return None
        return self._reads.pop(key).result()

    def _next_page(self, sequence: Sequence) -> PageKey | None:
        """What the page that a running sequence is computing will be known by, if all its tokens are known."""
        num_pages = len(sequence.pages)
        if (num_pages + 1) * self._page_size > len(sequence.token_ids):
            return None
        parent = sequence.pages[-1] if sequence.pages else None
        return parent, sequence.cache_salt, sequence.page_tokens(self._page_size)[num_pages]

    def _coming(self) -> dict[PageKey, Sequence]:
        """The pages that running sequences are computing, and who is the first to have each."""
        coming: dict[PageKey, Sequence] = {}
        page_size = self._page_size
        for sequence in self.running:
            num_known = len(sequence.token_ids) - len(sequence.pages) * page_size
            if num_known >= page_size and (key := self._next_page(sequence)):  # not so for those that decode
                coming.setdefault(key, sequence)
        return coming

    def _is_coming(self, sequence: Sequence, found: list[Page], coming: dict[PageKey, Sequence]) -> bool:
        """Whether a running sequence is computing the page after `found`: waiting for it computes it only once.

        Only for one that stands before it in the order. Nobody waits for a sequence that waits itself, and what is
        waited for goes on as if nobody did, so that the wait ends: the page is sealed, or its sequence ended or was
        preempted.
        """
        pages = self._reusable(sequence)
        if len(pages) == len(found):
            return False
        other = coming.get((found[-1] if found else None, sequence.cache_salt, pages[len(found)]))
        return other is not None and other.order < sequence.order

    def _num_left(self, sequence: Sequence, found: list[Page], step: "_Step") -> int:
        """Slots that are left for the running sequences if it has all that its known tokens need; negative: too few."""
        resident = [page for page in found if not page.in_host]
        available = self.allocator.num_free + self.allocator.num_cached - sum(not p.num_holders for p in resident)
        wanted = self._slots_to_come(sequence) - len(resident)
        in_flight = num_slots_for_one(self.layout, 0)  # a page that is being sealed is held twice
        return available + step.num_slots - wanted - in_flight

    def _start(self, sequence: Sequence, found: list[Page], data: list[bytes], step: "_Step") -> Scheduled | None:
        """Its first chunk, after the pages `found`, those in `data`, and its open page if it was swapped out.

        None: no slots for it.
        """
        num_found = (len(found) + len(data)) * self._page_size
        resumes = num_found <= sequence.num_swapped < num_found + self._page_size
        if not self.cache.hold(found):
            return None
        if data:
            pages = self.cache.load(found, sequence.cache_salt, self._reusable(sequence)[len(found) :], data)
            if pages is None:
                self.cache.release(found)
                return None
            found = pages
        runs = self.cache.take(len(sequence.host_slots) if resumes else 0)
        if runs is None:
            self.cache.release(found)
            return None
        sequence.pages, sequence.page_slots, sequence.open_slots = found, [page.slot for page in found], runs
        sequence.num_computed = sequence.num_swapped if resumes else num_found
        item = self._try(sequence, self._num_next(sequence, step))
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
        num_tokens, page_size = sequence.num_tokens + 1, self._page_size
        num_runs = -(-(num_tokens % page_size) // self._run_tokens)
        wanted = num_tokens // page_size + num_runs - len(sequence.page_slots) - len(sequence.open_slots)
        return wanted if wanted > 0 else 0

    def _take(self, sequence: Sequence, num_new: int, step: "_Step") -> None:
        """Slots for a running sequence, from those behind it in the order if need be; else it is preempted itself."""
        while (item := self._try(sequence, num_new)) is None:
            victim = self.running[-1]
            if (other := step.drop(victim)) is not None:  # it was to run in this step
                self.allocator.give_back(other.taken_slots)
            self._preempt(victim)
            if victim is sequence:
                return
        step.put(item)

    def _try(self, sequence: Sequence, num_new: int) -> Scheduled | None:
        """Take the slots that `num_new` more tokens need, or none at all."""
        start, page_size, run_tokens = sequence.num_computed, self._page_size, self._run_tokens
        end = start + num_new
        samples = end == sequence.num_tokens
        pages, open_slots = sequence.page_slots, sequence.open_slots
        in_page = start % page_size + num_new
        if in_page < page_size:  # as for most tokens
            if in_page <= len(open_slots) * run_tokens:
                return Scheduled(sequence, start, num_new, samples, pages, open_slots, open_slots)
            slots = self.cache.take(-(-in_page // run_tokens) - len(open_slots))
            if slots is None:
                return None
            return Scheduled(sequence, start, num_new, samples, pages, open_slots, open_slots + slots, (), slots)
        num_filled = in_page // page_size
        num_runs = -(-(end % page_size) // run_tokens)
        in_place = open_slots if self.layout.is_raw else []  # a raw page is sealed where it lies
        num_sealed = num_filled - len(in_place)
        slots = self.cache.take(num_sealed + num_runs)
        if slots is None:
            return None
        return Scheduled(
            sequence=sequence,
            start=start,
            num_new=num_new,
            samples=samples,
            pages=pages + in_place + slots[:num_sealed],
            open_slots=open_slots,
            next_open_slots=slots[num_sealed:],
            spent_slots=() if in_place else open_slots,
            taken_slots=slots,
        )

    def _num_next(self, sequence: Sequence, step: "_Step") -> int:
        """Tokens of its next chunk: fewer where each has a row of logits, for which as much memory is set aside as
        sampling `max_running` rows takes."""
        room = step.room(sequence.num_computed)
        return min(sequence.num_to_compute, room, 4 * self.max_running if sequence.num_unscored else room)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting with all its tokens and none of its slots; its sealed pages it may find again."""
        _remove(self.running, sequence)
        host_slots = self.cache.take_host(len(sequence.open_slots)) if self.host.num_slots else None
        if host_slots is None:
            self.num_preemptions += 1
        else:
            self.num_swaps_out += 1
            sequence.num_swapped, sequence.host_slots = sequence.num_computed, host_slots
            for slot, host_slot in zip(sequence.open_slots, host_slots, strict=True):
                self.cache.moves.append(Move(slot, host_slot, out=True))
        self._let_go(sequence)
        _insert(self.waiting, sequence)

    def _release(self, sequence: Sequence) -> None:
        """It has ended: its pages are for others now, if they may be shared."""
        sequence.has_ended = True
        del self._sequences[sequence.request_id]
        self.host.give_back(sequence.host_slots)
        sequence.host_slots, sequence.num_swapped = [], 0
        self._let_go(sequence, keep=self.prefix_cache)

    def _let_go(self, sequence: Sequence, *, keep: bool = True) -> None:
        """Of its slots in the pool."""
        self.allocator.give_back(sequence.open_slots + sequence.fresh_slots)
        self.cache.release(sequence.pages, keep=keep)
        sequence.pages, sequence.page_slots, sequence.open_slots = [], [], []
        sequence.num_computed, sequence.is_running = 0, False

    def advance(self, batch: Batch) -> None:
        """The step has been handed to the device: whatever is scheduled from now on comes after it.

        The tokens that it draws count as pending until `commit` brings them. Those that it computes with are known.
        """
        for item in batch.scheduled:
            sequence = item.sequence
            if not sequence.was_scheduled:
                self._count_start(sequence)
            if sequence.has_ended:  # when the step before it was committed
                self.allocator.give_back(item.taken_slots)
                continue
            if len(item.pages) > len(sequence.page_slots):
                sequence.page_slots = sequence.page_slots + item.pages[len(sequence.page_slots) :]
            sequence.open_slots = item.next_open_slots
            sequence.num_computed += item.num_new
            sequence.num_pending = 1 if item.samples else 0
            if item.spent_slots:
                self.allocator.give_back(item.spent_slots)

    def commit(self, batch: Batch, tokens: dict[str, int], failed: dict[str, str]) -> list[RequestOutput]:
        """Take note of what an advanced step drew: `tokens` and sentences of failure, both by request id."""
        outputs = []
        for item in batch.scheduled:
            sequence = item.sequence
            if sequence.has_ended:
                continue
            if failed and (error := failed.get(sequence.request_id)):
                output = RequestOutput(sequence.request_id, [], finish_reason="error", error=error)
            else:
                if len(sequence.page_slots) > len(sequence.pages):
                    self._share(sequence)
                if not item.samples:
                    continue
                output = self._append(sequence, tokens[sequence.request_id])
            outputs.append(output)
            if output.finish_reason is not None:
                _remove(self.running if sequence.is_running else self.waiting, sequence)
                self._release(sequence)
        return outputs

    def _count_start(self, sequence: Sequence) -> None:
        sequence.was_scheduled = True
        self.num_prompt_tokens += sequence.num_prompt
        self.num_cached_tokens += sequence.num_cached
        self.num_prefix_hits += sequence.num_cached > 0

    def _share(self, sequence: Sequence) -> None:
        """The pages that a step sealed are good: others may find them from now on."""
        pages, fresh = sequence.pages, sequence.fresh_slots
        page_tokens = sequence.page_tokens(self._page_size)
        for slot in fresh:
            parent = pages[-1] if pages else None
            pages.append(self.cache.add(parent, sequence.cache_salt, page_tokens[len(pages)], slot))
        if any(page.slot != slot for page, slot in zip(pages[-len(fresh) :], fresh, strict=True)):  # had been there
            sequence.page_slots = [page.slot for page in pages]

    def _append(self, sequence: Sequence, token: int) -> RequestOutput:
        params, cached = sequence.params, sequence.num_cached
        sequence.token_ids.append(token)
        sequence.num_pending = 0
        self.num_generated += 1
        num_output = len(sequence.token_ids) - sequence.num_prompt
        is_end = token in self.eos_token_ids and not params.ignore_eos
        if (is_end or token in params.stop_token_ids) and num_output >= params.min_tokens:
            return RequestOutput(sequence.request_id, [token], "stop", stop_token_id=token, num_cached_tokens=cached)
        reason: FinishReason | None = "length" if num_output >= params.max_tokens else None
        return RequestOutput(sequence.request_id, [token], reason, num_cached_tokens=cached)

    def stats(self, peak_memory_bytes: int) -> EngineStats:
        """State now and totals since the start. What sequences share counts once, what is only cached not as KV."""
        page_bytes, page_size, store = self.layout.page_bytes, self._page_size, self.cache.store
        num_open = sum(len(s.open_slots) for s in self.running)
        num_sealed = self.allocator.num_active - num_open
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_swapped=sum(1 for s in self.waiting if s.num_swapped),
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
            cache_dir_bytes=store.num_bytes if store else 0,
            cache_dir_saved_total=store.num_saved if store else 0,
            cache_dir_read_total=store.num_read if store else 0,
        )

    def check_integrity(self) -> None:
        """Sequences are in order, and every active slot is a run of one open page or a sealed page with as many holders
        as it says. For tests."""
        for sequences in (self.waiting, self.running):
            assert sequences == sorted(sequences, key=_order)
            assert all(s.is_running == (sequences is self.running) for s in sequences)
            assert all(s.page_slots[: len(s.pages)] == [page.slot for page in s.pages] for s in sequences)
        assert set(self._sequences.values()) == {*self.waiting, *self.running}
        self.allocator.check_integrity()
        self.cache.check_integrity(page for s in self.running for page in s.pages)
        active = [slot for s in self.running for slot in s.open_slots + s.fresh_slots]
        active += {page: page.slot for s in self.running for page in s.pages}.values()
        assert len(active) == len(set(active)) == self.allocator.num_active
        num_pages = (len(s.page_slots) - s.num_computed // self.layout.page_size for s in self.running)
        assert not any(num_pages)
        assert not any(s.pages or s.page_slots or s.open_slots for s in self.waiting)
        swapped = [slot for s in self.waiting for slot in s.host_slots] + self.cache.host_slots()
        assert len(swapped) == len(set(swapped)) == self.host.num_active
        assert not any(s.host_slots or s.num_swapped for s in self.running)


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    bisect.insort(sequences, sequence, key=_order)


def _remove(sequences: list[Sequence], sequence: Sequence) -> None:
    """Of a list in order; no two sequences have the same place."""
    at = bisect.bisect_left(sequences, sequence.order, key=_order)
    assert sequences[at] is sequence
    del sequences[at]
