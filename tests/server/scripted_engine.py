"""An engine without a model: it answers every request with a text that the test chose, one token a step.

Keeps `EngineClient`'s promises (validation, queue limit, aborts, death) and uses its `RequestStream`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from small_tokenizers import EOS
from tokenizers import Tokenizer

from gear_engine.client import RequestStream, StepListener
from gear_engine.protocol import (
    EngineDead,
    EngineInfo,
    EngineStats,
    MemoryRow,
    QueueFull,
    RequestOutput,
    SamplingParams,
    StepReport,
    TokenLogprobs,
    validate,
)


@dataclass
class Submitted:
    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str
    timeout_s: float | None
    stream: RequestStream
    playing: asyncio.Task[None] | None = None
    was_told: bool = False  # of its prompt's log-probabilities


@dataclass
class ScriptedEngine:
    folder: Path
    answer: str | list[int] | Callable[[Submitted], list[int]] = "Hello world"
    max_model_len: int = 256
    max_requests: int = 64
    tokens_per_step: int = 1
    num_cached_tokens: int = 0
    error_after: int | None = None  # tokens, and then finish_reason "error"
    pause_after: int | None = None  # tokens, and then nothing until `go_on`
    step_s: float = 0.0
    is_alive: bool = True
    stats: EngineStats = field(default_factory=EngineStats)
    submitted: list[Submitted] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.eos = self.tokenizer.token_to_id(EOS)
        self.listeners: list[StepListener] = []
        self.go_on = asyncio.Event()
        self._streams: dict[str, Submitted] = {}

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model_path=str(self.folder), max_model_len=self.max_model_len, vocab_size=self.tokenizer.get_vocab_size(),
            eos_token_ids=[self.eos], preset="near-lossless", backend="reference", device="cpu", dtype="float32",
            num_layers=2, num_pages=10, page_size=16, page_bytes=1000, bf16_token_bytes=100, kv_compression_ratio=3.2,
            memory=[MemoryRow("weights", 500), MemoryRow("pages", 10_000)], memory_table="MEMORY TABLE",
        )  # fmt: skip

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    def add_listener(self, listener: StepListener) -> None:
        self.listeners.append(listener)

    async def start(self) -> EngineInfo:
        return self.info

    async def close(self) -> None:
        pass

    def submit(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream:
        if not self.is_alive:
            raise EngineDead("the engine process ended (code -9); requests in flight are lost")
        validate(token_ids, params, timeout_s, max_model_len=self.max_model_len, vocab_size=self.info.vocab_size)
        if self.num_requests >= self.max_requests:
            raise QueueFull(self.num_requests, retry_after_s=7)
        assert request_id not in self._streams
        stream = RequestStream(request_id, self)  # type: ignore[arg-type]
        request = Submitted(request_id, token_ids, params, priority, cache_salt, timeout_s, stream)
        self._streams[request_id] = request
        self.submitted.append(request)
        request.playing = asyncio.create_task(self._play(request))
        return stream

    def abort(self, request_id: str) -> None:
        if request := self._streams.get(request_id):
            self._end(request)
            request.stream.put(RequestOutput(request_id, [], finish_reason="abort"))

    def forget(self, stream: RequestStream) -> None:
        request = self._streams.pop(stream.request_id, None)
        if request is not None and not stream.finished:
            self._end(request)

    def die(self) -> None:
        self.is_alive = False
        for request in self._streams.values():
            assert request.playing is not None
            request.playing.cancel()
            request.stream.put(EngineDead("the engine process ended (code -9); requests in flight are lost"))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until the engine is in that state."""
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 (any state, whoever changes it)
                await asyncio.sleep(0.001)

    def report(self, *outputs: RequestOutput, **more: object) -> None:
        """What one step says to listeners."""
        report = StepReport(
            outputs=list(outputs), stats=self.stats, step_s=0.004, batch_tokens=len(outputs),
            queue_times_s={}, page_errors=[],
        )  # fmt: skip
        for listener in self.listeners:
            listener(msgspec.structs.replace(report, **more))

    def _end(self, request: Submitted) -> None:
        self.aborted.append(request.request_id)
        assert request.playing is not None
        request.playing.cancel()

    def _tokens(self, request: Submitted) -> list[int]:
        if callable(self.answer):
            return self.answer(request)
        if isinstance(self.answer, str):
            return self.tokenizer.encode(self.answer, add_special_tokens=False).ids
        return self.answer

    async def _play(self, request: Submitted) -> None:
        tokens = [*self._tokens(request), self.eos]
        if request.params.ignore_eos:
            tokens = [token for token in tokens if token != self.eos] * request.params.max_tokens
        done = 0
        while True:
            await asyncio.sleep(self.step_s)
            if request.stream.queue_time_s is None:
                request.stream.queue_time_s = self.step_s
            if self.error_after is not None and done >= self.error_after:
                request.stream.put(self._output(request, [], "error", error="NaN logits"))
                return
            if self.pause_after is not None and done >= self.pause_after:
                await self.go_on.wait()
            output = self._next_output(request, tokens, done)
            done += len(output.token_ids)
            self.report(output)
            request.stream.put(output)
            if output.finish_reason is not None:
                return

    def _next_output(self, request: Submitted, tokens: list[int], done: int) -> RequestOutput:
        new: list[int] = []
        ending = set() if request.params.ignore_eos else {self.eos}
        for token in tokens[done : done + self.tokens_per_step]:
            new.append(token)
            if token in ending or token in request.params.stop_token_ids:
                return self._output(request, new, "stop", stop_token_id=token)
            if done + len(new) == request.params.max_tokens:
                return self._output(request, new, "length")
        return self._output(request, new, None)

    def _output(self, request: Submitted, tokens: list[int], reason: str | None, **more: object) -> RequestOutput:
        params = request.params
        if params.logprobs is not None:
            more["logprobs"] = [logprobs_of(token, params.logprobs) for token in tokens]
        if params.prompt_logprobs is not None and tokens and not request.was_told:
            more["prompt_logprobs"] = [logprobs_of(token, params.prompt_logprobs) for token in request.token_ids[1:]]
            request.was_told = True
        return RequestOutput(
            request.request_id, tokens, finish_reason=reason, num_cached_tokens=self.num_cached_tokens, **more
        )  # type: ignore[arg-type]


def logprobs_of(token: int, num_top: int) -> TokenLogprobs:
    """What the scripted engine says of a token: it is the second likeliest, behind the one before it in the vocabulary,
    and the likelier the lower its id."""
    top = [(max(0, token - 1), -0.25), (token, -0.5 - token), *((i, -1000.0 - i) for i in range(num_top))]
    return TokenLogprobs(-0.5 - token, 2, top[:num_top])
