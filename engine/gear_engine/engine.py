"""The engine: token ids in, token ids out, one synchronous and deterministic step at a time.

`step` reads schedule → move → run → sample → commit; speed goes around it, not into it.
"""

import heapq
import logging
import random
import resource
import sys
import time
from dataclasses import dataclass

import torch

from gear_engine.prefix_cache import Load, Move, Save
from gear_engine.protocol import AddRequest, EngineStats, PageError, RequestError, RequestOutput, StepReport, validate
from gear_engine.runner import Runner, RunResult
from gear_engine.sampler import Sampler, SamplingRow
from gear_engine.scheduler import Scheduler, service_order
from gear_engine.sequence import Scheduled, Sequence

logger = logging.getLogger(__name__)
SAVE_S = 10.0  # for pages that are to be there after a restart


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    vocab_size: int


class Engine:
    """Owns the scheduler, the runner and the sampler; a request is known to it by its id."""

    def __init__(self, scheduler: Scheduler, runner: Runner, sampler: Sampler, limits: Limits) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.limits = limits
        self._num_arrivals = 0
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; those that have ended stay until their time
        self._seeds = random.Random()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises `RequestError` for what cannot run as asked."""
        validate(
            request.token_ids,
            request.params,
            request.timeout_s,
            max_model_len=self.limits.max_model_len,
            vocab_size=self.limits.vocab_size,
        )
        if self.scheduler.get(request.request_id) is not None:
            raise RequestError(f"request id {request.request_id!r} is in use: choose another", "request_id")
        self._num_arrivals += 1
        seed, now_s, timeout_s = request.params.seed, time.monotonic(), request.timeout_s
        sequence = Sequence(
            request_id=request.request_id,
            token_ids=list(request.token_ids),
            num_prompt=len(request.token_ids),
            params=request.params,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            order=service_order(request.priority, self._num_arrivals),
            arrival_s=now_s,
            deadline_s=None if timeout_s is None else now_s + timeout_s,
            cache_salt=request.cache_salt,
        )
        self.scheduler.add(sequence)
        if sequence.deadline_s is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_s, self._num_arrivals, sequence))

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request in any phase; None if there is none of that id (it may just have ended)."""
        if not self.scheduler.abort(request_id):
            return None
        return RequestOutput(request_id, [], finish_reason="abort")

    def _abort_overdue(self, now_s: float) -> list[RequestOutput]:
        """End what has run or waited for as long as it was given."""
        ended = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            sequence = heapq.heappop(self._deadlines)[2]
            if self.scheduler.get(sequence.request_id) is sequence:
                ended.append(self.abort(sequence.request_id))
        return [output for output in ended if output is not None]

    def step(self) -> StepReport:
        """Compute one batch. A request that fails ends with an error; the others go on."""
        start_s = time.monotonic()
        overdue = self._abort_overdue(start_s)
        batch = self.scheduler.schedule()
        queue_times_s = [
            start_s - item.sequence.arrival_s for item in batch.scheduled if not item.sequence.was_scheduled
        ]
        tokens: dict[str, int] = {}
        failed: dict[str, str] = {}
        page_errors: list[PageError] = []
        self._move(batch.moves)
        for part, result in self._run(batch.scheduled, failed):
            self._sample(part, result, tokens, failed)
            page_errors += result.page_errors
        outputs = self.scheduler.commit(batch, tokens, failed)
        return StepReport(
            overdue + outputs, self.stats(), time.monotonic() - start_s, batch.num_tokens, queue_times_s, page_errors
        )

    def _move(self, moves: list[Move | Save | Load]) -> None:
        """Copy pages between the pool, host memory and the page store, in order."""
        between: list[Move] = []  # pool and host memory: handed over together
        for move in moves:
            if isinstance(move, Move):
                between.append(move)
                continue
            self.runner.move(between)
            between = []
            if isinstance(move, Load):
                self.runner.write_page(move.slot, move.data)
            elif self.scheduler.cache.store is not None:
                self.scheduler.cache.store.save(move.page, self.runner.read_page(move.slot, in_host=move.in_host))
        self.runner.move(between)

    def close(self) -> None:
        """Keep the cached pages in the page store, if there is one, as many as `SAVE_S` seconds allow."""
        store, end_s = self.scheduler.cache.store, time.monotonic() + SAVE_S
        if store is None:
            return
        saves = self.scheduler.cache.to_save()
        saves = saves[: store.max_bytes // self.scheduler.layout.page_bytes]
        saved: list[bytes] = []
        for save in saves:
            if time.monotonic() > end_s:
                logger.warning(
                    "--cache-dir: %d of %d pages were not saved in time", len(saves) - len(saved), len(saves)
                )
                break
            store.save_now(save.page, self.runner.read_page(save.slot, in_host=save.in_host))
            saved.append(save.page.key)
        store.touch(reversed(saved))  # of a chain the end goes first
        store.close()

    def _run(self, scheduled: list[Scheduled], failed: dict[str, str]) -> list[tuple[list[Scheduled], RunResult]]:
        """Run a batch, in halves if memory does not suffice; a sequence that fails alone is given up."""
        if not scheduled:
            return []
        try:
            return [(scheduled, self.runner.run(scheduled))]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("out of memory in a step of %d sequences", len(scheduled))
            if len(scheduled) == 1:
                failed[scheduled[0].sequence.request_id] = (
                    "out of memory while computing this request: send a shorter prompt, or lower --max-batch-tokens"
                )
                return []
        half = len(scheduled) // 2
        return self._run(scheduled[:half], failed) + self._run(scheduled[half:], failed)

    def _sample(
        self, scheduled: list[Scheduled], result: RunResult, tokens: dict[str, int], failed: dict[str, str]
    ) -> None:
        for item, poisoned in zip(scheduled, result.poisoned, strict=True):
            if poisoned:
                failed[item.sequence.request_id] = "the model computed NaN or infinity for this request"
        sampling = [item.sequence for item in scheduled if item.samples]
        if not sampling:
            return
        rows = [
            SamplingRow(s.params, s.seed, s.num_output, s.token_ids[: s.num_prompt], s.token_ids[s.num_prompt :])
            for s in sampling
        ]
        for sequence, token in zip(sampling, self.sampler.sample(result.logits, rows), strict=True):
            if token is None:
                failed.setdefault(sequence.request_id, "the model gave no finite logits for this request")
            else:
                tokens[sequence.request_id] = token

    def stats(self) -> EngineStats:
        return self.scheduler.stats(peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The peak resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # what torch's CPU allocator says
