"""The engine: token ids in, token ids out, one synchronous and deterministic step at a time.

`step` reads schedule → move → run → draw → advance → commit; a runner may compute a batch while the next is scheduled.
"""

import heapq
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from llguidance import LLMatcher
from torch import Tensor

from gear_engine.grammar import Grammars
from gear_engine.logprobs import token_logprobs, unpack
from gear_engine.prefix_cache import Load, Move, Save
from gear_engine.protocol import (
    AddRequest,
    EngineStats,
    PageError,
    RequestError,
    RequestOutput,
    StepReport,
    TokenLogprobs,
    validate,
)
from gear_engine.runner import Runner, RunResult
from gear_engine.sampler import Sampler, SamplingRow, has_penalties, on_device
from gear_engine.scheduler import Scheduler, service_order
from gear_engine.sequence import Batch, Scheduled, Sequence

logger = logging.getLogger(__name__)
SAVE_S = 10.0  # for pages that are to be there after a restart


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    vocab_size: int


class Numbers:
    """Numbers of the device on their way to the host, in one copy: integers unless `dtype` says otherwise."""

    def __init__(self, *tensors: Tensor, dtype: torch.dtype = torch.long) -> None:
        self._sizes = [len(tensor) for tensor in tensors]
        packed = torch.cat([tensor.to(dtype) for tensor in tensors])
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._values = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._values.copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = packed

    def wait(self) -> list[list[Any]]:
        """Of each tensor, once they are there."""
        if self._arrived:
            self._arrived.synchronize()
        return [part.tolist() for part in self._values.split(self._sizes)]


@dataclass(frozen=True, slots=True)
class _Told:
    """Log-probabilities that were asked for: of drawn tokens, then of prompt tokens."""

    drawn: list[Sequence]
    scored: list[tuple[Sequence, int]]  # and the position whose logits they are of
    numbers: Numbers  # packed as `token_logprobs` does, row after row

    def wait(self) -> list[TokenLogprobs]:
        """One for each of `drawn` and of `scored`."""
        num_top = [s.params.logprobs or 0 for s in self.drawn] + [s.params.prompt_logprobs or 0 for s, _ in self.scored]
        values = [value for part in self.numbers.wait() for value in part]
        width = len(values) // len(num_top)
        return unpack([values[start : start + width] for start in range(0, len(values), width)], num_top)


@dataclass(frozen=True, slots=True)
class _Part:
    """What ran at once of a batch: all of it, unless memory did not suffice."""

    scheduled: list[Scheduled]
    result: RunResult
    numbers: Numbers  # poisoned, drawn
    told: "_Told | None"  # None: nobody asked for log-probabilities
    errors: Numbers | None  # of the pages in `result.page_errors`


@dataclass(frozen=True, slots=True)
class _Launched:
    """A batch that the device computes, or has computed."""

    batch: Batch
    failed: dict[str, str]
    parts: list[_Part]


def sampling_row(sequence: Sequence) -> SamplingRow:
    params = sequence.params
    if not has_penalties(params):
        return SamplingRow(params, sequence.seed, sequence.num_output)
    tokens, num_prompt = sequence.token_ids, sequence.num_prompt
    is_behind = sequence.num_pending > 0
    return SamplingRow(params, sequence.seed, sequence.num_output, tokens[:num_prompt], tokens[num_prompt:], is_behind)


class Engine:
    """Owns the scheduler, the runner and the sampler; a request is known to it by its id."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, sampler: Sampler, limits: Limits, grammars: Grammars | None = None
    ) -> None:
        """Without `grammars` a request may ask for none."""
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.limits = limits
        self.grammars = grammars
        self._in_flight: _Launched | None = None  # only between steps, and only if the runner overlaps
        self._last_drawn: tuple[list[Sequence], list[Tensor]] = [], []  # in the last batch: for whom, and the tokens
        self._num_arrivals = 0
        self._deadlines: list[tuple[float, int, Sequence]] = []  # a heap; those that have ended stay until their time
        self._seeds = random.Random()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._in_flight is not None

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
        matcher = self._matcher(request.params.grammar)
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
            matcher=matcher,
        )
        self.scheduler.add(sequence)
        if sequence.deadline_s is not None:
            heapq.heappush(self._deadlines, (sequence.deadline_s, self._num_arrivals, sequence))

    def _matcher(self, grammar: str) -> LLMatcher | None:
        if not grammar:
            return None
        if self.grammars is None:
            raise RequestError("this engine follows no grammars", "structured_outputs")
        return self.grammars.matcher(grammar)

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
        """Launch one batch and commit one. A request that fails ends with an error; the others go on.

        Where the runner overlaps, the batch that is committed is the one before: its tokens travel, and this one is
        scheduled, while the device computes. Else it is the same.
        """
        start_s = time.monotonic()
        overdue = self._abort_overdue(start_s)
        outputs: list[RequestOutput] = []
        page_errors: list[PageError] = []
        before, self._in_flight = self._in_flight, None
        if before and (before.failed or self._needs_tokens()):  # what failed has drawn nothing to go on with
            outputs += self._commit(before, page_errors)
            before = None
        batch = self.scheduler.schedule()
        queue_times_s = {
            item.sequence.request_id: start_s - item.sequence.arrival_s
            for item in batch.scheduled
            if not item.sequence.was_scheduled
        }
        launched = self._launch(batch)
        if before:
            outputs += self._commit(before, page_errors)
        self.scheduler.advance(batch)
        if not self.runner.overlaps:
            outputs += self._commit(launched, page_errors)
        elif batch.scheduled:
            self._in_flight = launched
        return StepReport(
            overdue + outputs, self.stats(), time.monotonic() - start_s, batch.num_tokens, queue_times_s, page_errors
        )

    def _needs_tokens(self) -> bool:
        """Whether the next batch cannot be sampled before the host knows the tokens of the last one."""
        return any(s.num_pending and s.matcher is not None for s in self.scheduler.running)

    def _launch(self, batch: Batch) -> "_Launched":
        """Hand a batch to the device: what it copies, computes and draws."""
        self._move(batch.moves)
        failed: dict[str, str] = {}
        parts = []
        drawn_by: list[Sequence] = []
        for scheduled, result in self._run(batch.scheduled, failed):
            sampling = [item.sequence for item in scheduled if item.samples]
            rows = [sampling_row(sequence) for sequence in sampling]
            self._restrict(sampling, rows)
            tokens = self.sampler.draw(result.logits, rows, self._pending(sampling, rows))
            drawn_by += sampling
            parts.append((scheduled, result, tokens, self._told(scheduled, result, tokens)))
        drawn = [tokens for _, _, tokens, _ in parts]
        self.runner.keep_drawn(drawn_by, drawn)
        self._last_drawn = drawn_by, drawn
        return _Launched(
            batch,
            failed,
            [
                _Part(scheduled, result, Numbers(result.poisoned, tokens), told, _ratios(result))
                for scheduled, result, tokens, told in parts
            ],
        )

    def _pending(self, sampling: list[Sequence], rows: list[SamplingRow]) -> Tensor | None:
        """What the rows lack that are behind: the tokens of the batch before, on the device."""
        behind = [sequence.request_id for sequence, row in zip(sampling, rows, strict=True) if row.is_behind]
        if not behind:
            return None
        drawn_by, drawn = self._last_drawn
        row_of = {sequence.request_id: row for row, sequence in enumerate(drawn_by)}
        tokens = torch.cat(drawn)
        return tokens[on_device([row_of[request_id] for request_id in behind], tokens)]

    def _restrict(self, sampling: list[Sequence], rows: list[SamplingRow]) -> None:
        """Tell the rows of sequences that follow a grammar what it allows next."""
        bound = [(row, s.matcher) for row, s in zip(rows, sampling, strict=True) if s.matcher is not None]
        if bound and self.grammars is not None:
            for (row, _), allowed in zip(bound, self.grammars.allowed([matcher for _, matcher in bound]), strict=True):
                row.allowed = allowed

    def _told(self, scheduled: list[Scheduled], result: RunResult, tokens: Tensor) -> "_Told | None":
        """Have the log-probabilities that were asked for computed and sent."""
        sampling = [item.sequence for item in scheduled if item.samples]
        asked = [i for i, s in enumerate(sampling) if s.params.logprobs is not None]
        scored = [(item.sequence, position) for item in scheduled for position in item.scored]
        if not asked and not scored:
            return None
        num_top = [sampling[i].params.logprobs or 0 for i in asked] + [s.params.prompt_logprobs or 0 for s, _ in scored]
        packed = []
        if asked:
            index = on_device(asked, tokens)
            packed.append(self._packed(result.logits[index], tokens[index], max(num_top)))
        if scored:
            assert result.prompt_logits is not None
            following = on_device([s.token_ids[position + 1] for s, position in scored], tokens)
            packed.append(self._packed(result.prompt_logits, following, max(num_top)))
        return _Told([sampling[i] for i in asked], scored, Numbers(*packed, dtype=torch.float64))

    def _packed(self, logits: Tensor, tokens: Tensor, num_top: int) -> Tensor:
        return token_logprobs(logits[:, : self.limits.vocab_size], tokens, num_top).flatten()

    def _commit(self, launched: "_Launched", page_errors: list[PageError]) -> list[RequestOutput]:
        """Wait for what a batch drew, and tell the scheduler."""
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprobs] = {}
        failed = launched.failed
        for part in launched.parts:
            poisoned, drawn = part.numbers.wait()
            for item, is_poisoned in zip(part.scheduled, poisoned, strict=True):
                if is_poisoned:
                    failed[item.sequence.request_id] = "the model computed NaN or infinity for this request"
            sampling = [item.sequence for item in part.scheduled if item.samples]
            for sequence, token in zip(sampling, drawn, strict=True):
                if token < 0:
                    failed.setdefault(sequence.request_id, "the model gave no finite logits for this request")
                elif sequence.matcher is not None and not sequence.matcher.consume_token(token):
                    failed[sequence.request_id] = f"the grammar cannot go on: {sequence.matcher.get_error()}"
                else:
                    tokens[sequence.request_id] = token
            if part.told:
                logprobs |= _note(part.told)
            if part.errors:
                for sampled, (keys, values) in zip(part.result.page_errors, part.errors.wait(), strict=True):
                    page_errors += [PageError(sampled.layer, "keys", keys), PageError(sampled.layer, "values", values)]
        outputs = self.scheduler.commit(launched.batch, tokens, failed)
        return _with_logprobs(outputs, launched.batch.scheduled, logprobs)

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
        moves, self.scheduler.cache.moves = self.scheduler.cache.moves, []
        self._move(moves)
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

    def _run(self, scheduled: list[Scheduled], failed: dict[str, str]) -> Iterator[tuple[list[Scheduled], RunResult]]:
        """Run a batch, in halves if memory does not suffice; a sequence that fails alone is given up.

        A result is to be drawn from before the next is asked for: logits may lie in the same place.
        """
        if not scheduled:
            return
        try:
            result = self.runner.run(scheduled)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            logger.warning("out of memory in a step of %d sequences", len(scheduled))
            if len(scheduled) == 1:
                failed[scheduled[0].sequence.request_id] = (
                    "out of memory while computing this request: send a shorter prompt, or lower --max-batch-tokens"
                )
                return
        else:
            yield scheduled, result
            return
        half = len(scheduled) // 2
        yield from self._run(scheduled[:half], failed)
        yield from self._run(scheduled[half:], failed)

    def stats(self) -> EngineStats:
        return self.scheduler.stats(self.runner.peak_memory_bytes())


def _ratios(result: RunResult) -> Numbers | None:
    errors = result.page_errors
    return Numbers(*(sampled.ratios for sampled in errors), dtype=torch.float64) if errors else None


def _note(told: _Told) -> dict[str, TokenLogprobs]:
    """Of drawn tokens by request id; those of prompts are kept until the first token is sent."""
    rows = told.wait()
    num_drawn = len(told.drawn)
    for (sequence, position), row in zip(told.scored, rows[num_drawn:], strict=True):
        if position == len(sequence.prompt_logprobs):  # else it was computed a second time meanwhile
            sequence.prompt_logprobs.append(row)
    return {sequence.request_id: row for sequence, row in zip(told.drawn, rows[:num_drawn], strict=True)}


def _with_logprobs(
    outputs: list[RequestOutput], scheduled: list[Scheduled], logprobs: dict[str, TokenLogprobs]
) -> list[RequestOutput]:
    """The outputs, with what requests asked to be told: of the prompt once, with the first token."""
    first = {
        item.sequence.request_id: item.sequence.prompt_logprobs
        for item in scheduled
        if item.sequence.params.prompt_logprobs is not None
        and len(item.sequence.token_ids) == item.sequence.num_prompt + 1
    }
    if not logprobs and not first:
        return outputs
    return [
        msgspec.structs.replace(
            output,
            logprobs=[logprobs[output.request_id]] if output.token_ids and output.request_id in logprobs else None,
            prompt_logprobs=first.get(output.request_id) if output.token_ids else None,
        )
        for output in outputs
    ]


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # what torch's CPU allocator says
