"""One HTTP request's answers: submit to the engine, detokenise what comes back, watch for stop strings, measure.

Knows token ids and text, not HTTP and not JSON. A `Generation` that is closed early aborts what still runs.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from gear_engine.client import RequestStream
from gear_engine.protocol import EngineDead, FinishReason, RequestError, RequestOutput, SamplingParams, TokenLogprobs
from gear_server.answer_reader import AnswerReader, Parts
from gear_server.context import Context
from gear_server.detokenizer import Detokenizer
from gear_server.errors import GenerationFailed
from gear_server.metrics import Metrics, Outcome
from gear_server.sampling import for_choice
from gear_server.stop_strings import StopStrings
from gear_server.tool_calls import ToolCall

EndReason = FinishReason | Literal["tool_calls"]

logger = logging.getLogger("gear_server")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: list[int]
    params: SamplingParams
    echo: str = ""  # text that its answers begin with
    echo_only: bool = False  # nothing but that: the engine's one token is computed for the prompt's sake and not shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a request asks for: `n` answers to each prompt."""

    request_id: str
    prompts: list[Prompt]
    prompt_param: str  # the field that errors about the prompt name
    arrived_s: float  # time.perf_counter()
    n: int = 1
    stop: list[str]
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_special_ids: Set[int] = frozenset()  # whose text is shown even so
    make_reader: Callable[[], AnswerReader] | None = None  # of chats: tells reasoning, content and calls apart
    priority: int = 0
    cache_salt: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What one choice gained. `finish_reason` is in its last one, and only there."""

    index: int
    text: str  # of a chat: its content, without reasoning and calls
    finish_reason: EndReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token, as in vLLM; None for the model's own end
    token_ids: list[int] = field(default_factory=list)  # with the token that ended it, whose text is not in `text`
    logprobs: list[TokenLogprobs] | None = None  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # in its first one, if asked for
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)  # what was added to them


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


class Choice:
    """One sequence at the engine and the text it has become."""

    def __init__(self, index: int, stream: RequestStream, plan: Plan, context: Context) -> None:
        prompt = plan.prompts[index // plan.n]
        self.index = index
        self.stream = stream
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self._include_stop = plan.include_stop
        self._min_tokens = prompt.params.min_tokens
        self._eos_token_ids = context.engine.info.eos_token_ids
        self._pending = prompt.echo
        self._echo_only = prompt.echo_only
        self._reader = None if plan.make_reader is None else plan.make_reader()
        self._detokenizer: Detokenizer = context.tokenizer.detokenizer(
            skip_special_tokens=plan.skip_special_tokens, keep=plan.keep_special_ids
        )
        self._stops = StopStrings(plan.stop, plan.include_stop)
        self._metrics: Metrics = context.metrics
        self._metrics.arrive()
        self._arrived_s = plan.arrived_s
        self.first_output_s: float | None = None
        self._last_output_s: float | None = None
        self._stack = ExitStack()
        self._stack.push(stream)  # leaving it aborts what still runs

    def take(self, output: RequestOutput) -> Delta:
        """Turn an output into text. Raises `GenerationFailed` if the engine gave this sequence up."""
        if output.token_ids:
            self._observe_output()
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.finish_reason == "error":
            self.leave("error")
            logger.error("%s failed: %s", output.request_id, output.error)
            raise GenerationFailed(500, output.error or "the engine could not finish this request")
        if self._echo_only:
            self._finish("length")
            return Delta(self.index, self._pending, "length", logprobs=[], prompt_logprobs=output.prompt_logprobs)
        before = self.num_tokens
        text, self._pending = self._pending + self._read(output), ""
        num_new = self.num_tokens - before
        reason: FinishReason | None = "stop" if self._stops.matched is not None else output.finish_reason
        parts = self._parts(text, ended=reason is not None)
        if reason is not None:
            self._finish(reason)
        called = reason == "stop" and self._reader is not None and self._reader.num_calls > 0
        stop_token_id = None if output.stop_token_id in self._eos_token_ids else output.stop_token_id
        return Delta(
            self.index,
            parts.content,
            "tool_calls" if called else reason,
            stop_token_id if self._stops.matched is None else self._stops.matched,
            output.token_ids[:num_new],
            None if output.logprobs is None else output.logprobs[:num_new],
            output.prompt_logprobs,
            parts.reasoning,
            parts.calls,
        )

    def _parts(self, text: str, *, ended: bool) -> Parts:
        if self._reader is None:
            return Parts(content=text)
        parts = self._reader.feed(text)
        if ended:
            last = self._reader.flush()
            parts.reasoning += last.reasoning
            parts.content += last.content
            parts.calls += last.calls
        return parts

    def leave(self, outcome: Outcome) -> None:
        """Have no more of it: what still runs is aborted. Does nothing to a choice that has ended."""
        if self.finish_reason is None:
            self.finish_reason = "error" if outcome == "error" else "abort"
            self._metrics.count(outcome)
        self._stack.close()

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self._metrics.count(reason)
        if reason in ("stop", "length"):
            self._metrics.request_latency_s.observe(time.perf_counter() - self._arrived_s)
        self._stack.close()  # aborts at the engine if a stop string ended it here

    def _read(self, output: RequestOutput) -> str:
        """The text of an output, up to a stop string. The token that ended the answer has none, unless asked for."""
        hidden = output.stop_token_id is not None and not self._include_stop
        token_ids = output.token_ids[:-1] if hidden else output.token_ids
        text = ""
        for token_id in token_ids:
            self.num_tokens += 1
            piece = self._detokenizer.feed(token_id)
            text += self._stops.feed(piece) if self.num_tokens > self._min_tokens else piece
            if self._stops.matched is not None:
                return text
        self.num_tokens += len(output.token_ids) - len(token_ids)
        if output.finish_reason is not None:
            text += self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
        return text

    def _observe_output(self) -> None:
        now_s = time.perf_counter()
        if self._last_output_s is None:
            self.first_output_s = now_s
            self._metrics.time_to_first_token_s.observe(now_s - self._arrived_s)
        else:
            self._metrics.inter_token_latency_s.observe(now_s - self._last_output_s)
        self._last_output_s = now_s


class Generation:
    """All choices of a request: read with `next_deltas` until None, and closed in any case."""

    def __init__(self, plan: Plan, context: Context) -> None:
        """Submits everything or nothing. Raises `RequestError`, `QueueFull` or `EngineDead`."""
        self.request_id = plan.request_id
        self.submitted_s = time.perf_counter()
        self.plan = plan
        self._context = context
        self._arrived: asyncio.Queue[tuple[Choice, RequestOutput | EngineDead]] = asyncio.Queue()
        self.choices = [Choice(i, stream, plan, context) for i, stream in enumerate(_submit(plan, context))]
        self._num_prompts = [len(prompt.token_ids) for prompt in plan.prompts]
        self._n = plan.n
        # A single stream is read directly; several are poured into one queue, which keeps a step's outputs together.
        several = len(self.choices) > 1
        self._pumps = [asyncio.create_task(self._pump(choice)) for choice in self.choices] if several else []
        context.traffic.generations.add(self)

    async def next_deltas(self) -> list[Delta] | None:
        """What the choices gained since the last call; None when all have ended.

        Raises `GenerationFailed` if the engine gave one of them up, or died.
        """
        if all(choice.finish_reason is not None for choice in self.choices):
            return None
        try:
            arrived = await self._next_outputs()
        except EngineDead as dead:
            for choice in self.choices:
                choice.leave("error")
            raise GenerationFailed(503, str(dead), code="engine_dead") from dead
        return [choice.take(output) for choice, output in arrived if choice.finish_reason is None]

    def usage(self) -> Usage:
        """A prompt counts once, however many answers it has."""
        return Usage(
            num_prompt_tokens=sum(self._num_prompts),
            num_completion_tokens=sum(choice.num_tokens for choice in self.choices),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in self.choices[:: self._n]),
        )

    def abort(self) -> None:
        """Let the engine end it now: the answer is what there is, with finish_reason "abort"."""
        for choice in self.choices:
            if choice.finish_reason is None:
                self._context.engine.abort(choice.stream.request_id)

    def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()
        for choice in self.choices:
            choice.leave("abort")
        self._context.traffic.generations.discard(self)

    async def _next_outputs(self) -> list[tuple[Choice, RequestOutput]]:
        if not self._pumps:
            choice = self.choices[0]
            ready = [(choice, await anext(choice.stream))]
            while (more := choice.stream.take_ready()) is not None:  # who fell behind catches up in one piece
                ready.append((choice, more))
            return ready
        arrived = [await self._arrived.get()]
        while not self._arrived.empty():
            arrived.append(self._arrived.get_nowait())
        outputs: list[tuple[Choice, RequestOutput]] = []
        for choice, output in arrived:
            if isinstance(output, EngineDead):
                raise output
            outputs.append((choice, output))
        return outputs

    async def _pump(self, choice: Choice) -> None:
        try:
            async for output in choice.stream:
                self._arrived.put_nowait((choice, output))
        except EngineDead as dead:
            self._arrived.put_nowait((choice, dead))


def _submit(plan: Plan, context: Context) -> list[RequestStream]:
    """Choice i of prompt p is number p * n + i, as with OpenAI."""
    with ExitStack() as undo:
        streams: list[RequestStream] = []
        for prompt in plan.prompts:
            for i in range(plan.n):
                request_id = f"{plan.request_id}-{len(streams)}"
                params = for_choice(prompt.params, i)
                try:
                    stream = context.engine.submit(
                        request_id, prompt.token_ids, params, plan.priority, plan.cache_salt, plan.timeout_s
                    )
                except RequestError as error:
                    if error.param == "prompt":
                        error.param = plan.prompt_param
                    raise
                streams.append(undo.enter_context(stream))
        undo.pop_all()
    return streams
