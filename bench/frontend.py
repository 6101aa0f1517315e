"""What the front end adds to a token: its CPU, its delay, and whether any is lost when a thousand streams are open.

    python bench/frontend.py [--rounds 3] [--seconds 10] [--output bench/results/frontend.json]

The real server on a real socket; only the engine is a stub (`stub_engine.py`), in a process of its own that sends 20
tokens a second to every stream and notes when, so a token's delay is from there to this client, both sockets
included. The yardstick is the same engine behind the plain way to stream with FastAPI, which is also vLLM's in its
default of one API process: a pydantic object for every chunk, `model_dump_json`, `StreamingResponse`; it does no more
than that (no stop strings, metrics or refusals).
"""

import argparse
import asyncio
import datetime
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from stub_engine import Notes, answer_tokens

HERE = Path(__file__).parent
TOKEN = b'"delta":{"content":"'  # one in each chunk that carries a token
REQUEST_ID = re.compile(rb'"id":"([^"]+)"')
PROMPT_CHARS = 100_000


@dataclass
class Stream(asyncio.Protocol):
    """One streaming request, read with as little work as possible: bytes are kept, tokens counted and timed."""

    body: bytes
    ended: asyncio.Future[None]
    received: bytearray = field(default_factory=bytearray)
    token_s: list[float] = field(default_factory=list)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
        )
        transport.write("\r\n".join((*head, "", "")).encode() + self.body)

    def data_received(self, data: bytes) -> None:
        now_s = time.monotonic()
        self.token_s += [now_s] * data.count(TOKEN)
        self.received += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)

    @property
    def request_id(self) -> str:
        found = REQUEST_ID.search(self.received)
        assert found is not None, self.received[:500]
        return f"{found[1].decode()}-0"

    def text(self) -> str:
        """The whole answer; whoever lost a byte fails here."""
        head, _, chunked = bytes(self.received).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        plain = bytearray()
        while (size := int(chunked[: chunked.index(b"\r\n")], 16)) > 0:
            start = chunked.index(b"\r\n") + 2
            plain += chunked[start : start + size]
            chunked = chunked[start + size + 2 :]
        *events, done = bytes(plain).removesuffix(b"\n\n").split(b"\n\n")
        assert done == b"data: [DONE]", done
        deltas = [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"] for event in events]
        return "".join(delta.get("content") or "" for delta in deltas)


async def open_streams(port: int, num_streams: int, num_tokens: int) -> list[Stream]:
    loop = asyncio.get_running_loop()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": num_tokens, "stream": True}
    streams = [Stream(json.dumps(body).encode(), loop.create_future()) for _ in range(num_streams)]
    for stream in streams:
        await loop.create_connection(lambda stream=stream: stream, "127.0.0.1", port)
    return streams


@dataclass
class Server:
    port: int
    process: subprocess.Popen[str]
    notes_file: Path
    folder: Path

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> dict[str, list[float]]:
        """When each token of each request left the engine."""
        self.process.terminate()
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0
        return msgspec.json.decode(self.notes_file.read_bytes(), type=Notes).sent_s


@contextmanager
def serving(folder: Path, design: str) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        notes_file = Path(directory) / "notes.json"
        command = [sys.executable, __file__, "--serve", design, str(folder), str(notes_file), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/ready")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    time.sleep(0.05)
            yield Server(port, process, notes_file, folder)
        finally:
            process.kill()
            process.wait()


def measure_streams(folder: Path, design: str, num_streams: int, seconds: float) -> dict[str, Any]:
    """Gaps and delays over the middle of the run, when all streams are open; the text of every one is checked."""
    num_tokens = round(seconds * 20)

    async def run(server: Server) -> tuple[list[Stream], float, float, float]:
        streams = await open_streams(server.port, num_streams, num_tokens)
        while not all(stream.token_s for stream in streams):  # noqa: ASYNC110 (of many)
            await asyncio.sleep(0.05)
        began_s, began_cpu_s = time.monotonic(), server.cpu_s()
        await asyncio.sleep(seconds * 0.6)
        ended_s, cpu_s = time.monotonic(), server.cpu_s() - began_cpu_s
        await asyncio.gather(*(stream.ended for stream in streams))
        return streams, cpu_s, began_s, ended_s

    with serving(folder, design) as server:
        streams, cpu_s, began_s, ended_s = asyncio.run(run(server))
        sent_s = server.stop()
    expected = expected_text(folder, num_tokens)
    gaps, delays = [], []
    for stream in streams:
        gaps += [b - a for a, b in pairwise(stream.token_s) if began_s <= a <= ended_s]
        sent = sent_s[stream.request_id]
        delays += [b - a for a, b in zip(sent, stream.token_s, strict=True) if began_s <= a <= ended_s]
    return {
        "streams": num_streams,
        "seconds": seconds,
        "tokens_per_s": round(len(delays) / (ended_s - began_s)),
        "complete_streams": sum(stream.text() == expected for stream in streams),
        "gap_ms": quantiles_ms(gaps),
        "delay_ms": quantiles_ms(delays),
        "cpu_us_per_token": round(cpu_s / len(delays) * 1e6, 1),
    }


def measure_tokenising(folder: Path, num_streams: int, seconds: float) -> dict[str, Any]:
    """How long tokens of open streams are delayed, with and without prompts of 100 kB coming in one after another."""
    prompt = (Path(__file__).read_text() * 100)[:PROMPT_CHARS]
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 1}

    async def run(server: Server) -> tuple[list[Stream], list[tuple[float, float]]]:
        streams = await open_streams(server.port, num_streams, round(seconds * 20))
        asked: list[tuple[float, float]] = []
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as client:
            await asyncio.sleep(seconds / 2)
            while not all(stream.ended.done() for stream in streams):
                began_s = time.monotonic()
                response = await client.post("/v1/chat/completions", json=body)
                assert response.json()["usage"]["prompt_tokens"] > 20_000
                asked.append((began_s, time.monotonic()))
        return streams, asked

    with serving(folder, "ours") as server:
        streams, asked = asyncio.run(run(server))
        sent_s = server.stop()
    before, during = [], []
    for stream in streams:
        for at, sent in zip(stream.token_s, sent_s[stream.request_id], strict=True):
            (before if sent < asked[0][0] else during).append(at - sent)
    return {
        "streams": num_streams,
        "prompt_chars": PROMPT_CHARS,
        "prompts": len(asked),
        "prompt_ms_median": round(statistics.median(end - begin for begin, end in asked) * 1000, 1),
        "delay_ms_without": quantiles_ms(before),
        "delay_ms_with": quantiles_ms(during),
    }


def expected_text(folder: Path, num_tokens: int) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = answer_tokens(tokenizer)
    return tokenizer.decode([tokens[i % len(tokens)] for i in range(num_tokens)])


def quantiles_ms(values_s: list[float]) -> dict[str, float]:
    values = sorted(values_s)
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: round(values[min(len(values) - 1, int(len(values) * q))] * 1000, 2) for name, q in at.items()}


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure by figure."""
    merged: dict[str, Any] = {}
    for name, first in runs[0].items():
        values = [run[name] for run in runs]
        merged[name] = median_of(values) if isinstance(first, dict) else statistics.median(values)
    return merged


def serve(design: str, folder: str, notes_file: str, port: str) -> None:
    """The server's own process."""
    from gear_engine.client import EngineClient
    from gear_engine.config import EngineConfig
    from gear_server.serving import bind_all, serve
    from gear_server.settings import Settings

    engine = EngineClient(EngineConfig(max_running=2048), [str(HERE / "stub_engine.py"), folder, notes_file])
    if design == "ours":
        settings = Settings(port=int(port), max_running=2048)
        asyncio.run(serve(settings, bind_all(settings), engine))
    else:
        asyncio.run(serve_plainly(engine, int(port)))


async def serve_plainly(engine: Any, port: int) -> None:
    """The yardstick."""
    import uuid

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel
    from starlette.responses import StreamingResponse

    from gear_engine.protocol import SamplingParams
    from gear_server.tokenizer import TextTokenizer

    class DeltaMessage(BaseModel):
        content: str | None = None

    class Choice(BaseModel):
        index: int
        delta: DeltaMessage
        logprobs: None = None
        finish_reason: str | None = None

    class Chunk(BaseModel):
        id: str
        object: str = "chat.completion.chunk"
        created: int
        model: str
        choices: list[Choice]

    info = await engine.start()
    tokenizer = TextTokenizer(Path(info.model_path))
    app = FastAPI()

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        return {}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            request_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
            detokenizer = tokenizer.detokenizer()
            with engine.submit(f"{request_id}-0", [5], SamplingParams(max_tokens=body["max_tokens"])) as outputs:
                async for output in outputs:
                    text = "".join(map(detokenizer.feed, output.token_ids))
                    choice = Choice(index=0, delta=DeltaMessage(content=text), finish_reason=output.finish_reason)
                    chunk = Chunk(id=request_id, created=created, model="stub", choices=[choice])
                    yield f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", access_log=False))
    server.capture_signals = nullcontext  # type: ignore[method-assign, assignment]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: setattr(server, "should_exit", True))
    await server.serve()
    await engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="the figures are medians of so many")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each measurement streams")
    parser.add_argument("--output", type=Path, help="write the figures there, too")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    from gear_engine.model_files import model_folder

    folder = model_folder(None)
    rounds: dict[str, list[dict[str, Any]]] = {"ours_256": [], "plain_256": [], "ours_1000": [], "plain_1000": []}
    tokenising = []
    for _ in range(options.rounds):  # interleaved: what else the machine does falls on all alike
        for name, runs in rounds.items():
            design, num_streams = name.split("_")
            runs.append(measure_streams(folder, design, int(num_streams), options.seconds))
        tokenising.append(measure_tokenising(folder, 64, options.seconds))
    results: dict[str, Any] = {"date": f"{datetime.date.today()}", "cpus": os.cpu_count(), "rounds": options.rounds}
    results |= {name: median_of(runs) for name, runs in rounds.items()} | {"tokenising": median_of(tokenising)}
    text = json.dumps(results, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
