"""The engine: token ids in, token ids out, one synchronous and deterministic step at a time.

`step` reads schedule → move → run → sample → commit; speed goes around it, not into it.
"""

import logging
import random
import resource
import sys
import time
from dataclasses import dataclass

import msgspec
import torch
from llguidance import LLMatcher

from gear_engine.grammar import Grammars
from gear_engine.logprobs import prompt_logprobs
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
from gear_engine.sampler import Sampler, SamplingRow
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Scheduled, Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for."""

    max_model_len: int
    vocab_size: int


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
        self._num_arrivals = 0
        self._seeds = random.Random()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: AddRequest) -> None:
        """Queue a request. Raises `RequestError` for what cannot run as asked."""
        validate(
            request.token_ids,
            request.params,
            max_model_len=self.limits.max_model_len,
            vocab_size=self.limits.vocab_size,
        )
        if self.scheduler.has(request.request_id):
            raise RequestError(f"request id {request.request_id!r} is in use: choose another", "request_id")
        matcher = self._matcher(request.params.grammar)
        self._num_arrivals += 1
        seed = request.params.seed
        self.scheduler.add(
            Sequence(
                request_id=request.request_id,
                token_ids=list(request.token_ids),
                num_prompt=len(request.token_ids),
                params=request.params,
                seed=self._seeds.getrandbits(63) if seed is None else seed,
                order=(request.priority, self._num_arrivals),
                arrival_s=time.monotonic(),
                cache_salt=request.cache_salt,
                matcher=matcher,
            )
        )

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

    def step(self) -> StepReport:
        """Compute one batch. A request that fails ends with an error; the others go on."""
        start_s = time.monotonic()
        batch = self.scheduler.schedule()
        queue_times_s = [
            start_s - item.sequence.arrival_s for item in batch.scheduled if not item.sequence.was_scheduled
        ]
        tokens: dict[str, int] = {}
        logprobs: dict[str, TokenLogprobs] = {}
        failed: dict[str, str] = {}
        page_errors: list[PageError] = []
        self.runner.move(batch.moves)
        for part, result in self._run(batch.scheduled, failed):
            self._sample(part, result, tokens, logprobs, failed)
            self._score(part, result)
            page_errors += result.page_errors
        outputs = self.scheduler.commit(batch, tokens, failed)
        outputs = _with_logprobs(outputs, batch.scheduled, logprobs)
        return StepReport(
            outputs, self.stats(), time.monotonic() - start_s, batch.num_tokens, queue_times_s, page_errors
        )

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
        self,
        scheduled: list[Scheduled],
        result: RunResult,
        tokens: dict[str, int],
        logprobs: dict[str, TokenLogprobs],
        failed: dict[str, str],
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
        self._restrict(sampling, rows)
        sampled = self.sampler.sample(result.logits, rows)
        for sequence, token, told in zip(sampling, sampled.tokens, sampled.logprobs, strict=True):
            if token is None:
                failed.setdefault(sequence.request_id, "the model gave no finite logits for this request")
                continue
            if sequence.matcher is not None and not sequence.matcher.consume_token(token):
                failed[sequence.request_id] = f"the grammar cannot go on: {sequence.matcher.get_error()}"
                continue
            tokens[sequence.request_id] = token
            if told is not None:
                logprobs[sequence.request_id] = told

    def _restrict(self, sampling: list[Sequence], rows: list[SamplingRow]) -> None:
        """Tell the rows of sequences that follow a grammar what it allows next."""
        bound = [(row, s.matcher) for row, s in zip(rows, sampling, strict=True) if s.matcher is not None]
        if bound and self.grammars is not None:
            for (row, _), allowed in zip(bound, self.grammars.allowed([matcher for _, matcher in bound]), strict=True):
                row.allowed = allowed

    def _score(self, scheduled: list[Scheduled], result: RunResult) -> None:
        """Note the log-probabilities of prompt tokens that were asked for."""
        if result.prompt_logits is None:
            return
        each = [(item.sequence, position) for item in scheduled for position in item.scored]
        tokens = [sequence.token_ids[position + 1] for sequence, position in each]
        num_top = [sequence.params.prompt_logprobs or 0 for sequence, _ in each]
        told = prompt_logprobs(result.prompt_logits[:, : self.limits.vocab_size], tokens, num_top)
        for (sequence, _), one in zip(each, told, strict=True):
            sequence.prompt_logprobs.append(one)

    def stats(self) -> EngineStats:
        return self.scheduler.stats(peak_memory_bytes())


def _with_logprobs(
    outputs: list[RequestOutput], scheduled: list[Scheduled], logprobs: dict[str, TokenLogprobs]
) -> list[RequestOutput]:
    """The outputs, with what requests asked to be told: of the prompt once, with the first token."""
    first = {
        item.sequence.request_id: item.sequence.prompt_logprobs
        for item in scheduled
        if item.sequence.params.prompt_logprobs is not None and item.sequence.num_output == 1
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


def peak_memory_bytes() -> int:
    """The peak resident set of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # what torch's CPU allocator says
