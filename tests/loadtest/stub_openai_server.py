"""An OpenAI-compatible server of known latency, which notes when it did what; and which can fail in every way.

It runs on the event loop of the test, so its clock is the client's.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from aiohttp import web

MODEL = "stub-model"


@dataclass
class Answer:
    """When a completion was asked for, and when each of its chunks left."""

    arrived_at: float
    chunk_times: list[float] = field(default_factory=list)


@dataclass
class StubServer:
    """Answers `max_tokens` tokens: the first after `ttft_s`, the next `itl_s` apart."""

    ttft_s: float = 0.0
    itl_s: float = 0.0
    tokens_per_chunk: int = 1
    tokens_per_word: int | None = None  # None: there is no /tokenize
    sends_usage: bool = True
    one_at_a_time: bool = False
    api_key: str | None = None
    faults: dict[int, str] = field(default_factory=dict)  # by number of the request
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)  # what a perfect client would measure
    itls_s: list[float] = field(default_factory=list)
    answers: "list[Answer]" = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)  # what /metrics answers: each once, the last for ever
    stalled_until: float = 0.0  # what is due before then (perf_counter) is `stall_s` late, and what follows it
    stall_s: float = 0.0
    num_running: int = 0
    max_running: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _received: asyncio.Condition = field(default_factory=asyncio.Condition)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator["StubServer"]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        if self.tokens_per_word is not None:
            app.router.add_post("/tokenize", self._tokenize)
        if self.metrics:
            app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def has_received(self, num_requests: int) -> None:
        """Wait until so many completions were asked for."""
        async with asyncio.timeout(20), self._received:
            await self._received.wait_for(lambda: len(self.bodies) >= num_requests)

    async def _models(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "a key is needed"}}, status=401)
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics.pop(0) if len(self.metrics) > 1 else self.metrics[0])

    async def _tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"count": self._count((await request.json())["prompt"]), "max_model_len": 8192})

    def _count(self, prompt: str) -> int:
        """One special token, and so many for a word."""
        return 1 + (self.tokens_per_word or 1) * len(prompt.split())

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        arrived_at = perf_counter()
        index = len(self.bodies)
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        async with self._received:
            self._received.notify_all()
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            if self.one_at_a_time:
                async with self._turn:
                    return await self._answer(request, body, index, arrived_at, start=perf_counter())
            return await self._answer(request, body, index, arrived_at, start=arrived_at)
        finally:
            self.num_running -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], index: int, arrived_at: float, start: float
    ) -> web.StreamResponse:
        fault = self.faults.get(index)
        if fault is not None and fault.isdigit():
            error = {"error": {"message": f"refused with {fault}"}}
            return web.json_response(error, status=int(fault), headers={"Location": "/v1/completions"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await _write(response, {"choices": [{"text": "", "finish_reason": None}]})  # holds no token, as some servers do
        num_tokens, last_at = body["max_tokens"], None
        answer = Answer(arrived_at)
        self.answers.append(answer)
        for first in range(0, num_tokens, self.tokens_per_chunk):
            await asyncio.sleep(max(0.0, start + self.ttft_s + first * self.itl_s - perf_counter()))
            if perf_counter() < self.stalled_until:
                start += self.stall_s
                await asyncio.sleep(self.stall_s)
            if fault is not None and first > 0:
                await self._fail(request, response, fault)
                return response
            now = perf_counter()
            answer.chunk_times.append(now)
            if last_at is None:
                self.ttfts_s.append(now - arrived_at)
            else:
                self.itls_s.append(now - last_at)
            last_at = now
            ends = first + self.tokens_per_chunk >= num_tokens
            await _write(response, {"choices": [{"text": " word", "finish_reason": "length" if ends else None}]})
        if self.sends_usage and body["stream_options"]["include_usage"]:
            usage = {"prompt_tokens": self._count(body["prompt"]), "completion_tokens": num_tokens}
            await _write(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _fail(self, request: web.Request, response: web.StreamResponse, fault: str) -> None:
        """In the middle of a stream, whose status was 200."""
        match fault:
            case "error_event":
                await _write(response, {"error": {"message": "out of\x1b[31m pages", "type": "server_error"}})
            case "drop":
                assert request.transport is not None
                request.transport.close()
            case "truncate":
                pass
            case "garbage":
                await response.write(b"data: {not json\n\n")
            case "no_done":
                await _write(response, {"choices": [{"text": "", "finish_reason": "length"}]})
            case "no_reason":
                await response.write(b"data: [DONE]\n\n")
            case "abort":
                await _write(response, {"choices": [{"text": "", "finish_reason": "abort"}]})
                await response.write(b"data: [DONE]\n\n")
            case "hang":
                await asyncio.sleep(30)


async def _write(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
