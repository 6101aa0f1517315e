"""The asynchronous face of an engine that runs in a process of its own: submit token ids, receive token ids.

Imports no torch: the HTTP server lives on this file and `protocol.py`.
"""

import asyncio
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from gear_engine.config import EngineConfig
from gear_engine.protocol import (
    AbortRequest,
    AddRequest,
    EngineDead,
    EngineInfo,
    EngineStartError,
    EngineStats,
    FromEngine,
    QueueFull,
    RequestOutput,
    SamplingParams,
    Shutdown,
    StartFailed,
    StepReport,
    ToEngine,
    validate,
)

logger = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(FromEngine).decode

StepListener = Callable[[StepReport], None]


class RequestStream:
    """The outputs of one request, as an asynchronous iterator and a context manager that aborts what is left."""

    def __init__(self, request_id: str, client: "EngineClient") -> None:
        self.request_id = request_id
        self.finished = False
        self.queue_time_s: float | None = None  # once it was scheduled
        self._client = client
        self._outputs: asyncio.Queue[RequestOutput | EngineDead] = asyncio.Queue()

    def put(self, output: RequestOutput | EngineDead) -> None:
        self._outputs.put_nowait(output)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        """Raises `EngineDead` if the engine ended before the request did."""
        if self.finished:
            raise StopAsyncIteration
        return self._take(await self._outputs.get())

    def take_ready(self) -> RequestOutput | None:
        """The next output if it has come already; the end of the engine is left to `anext`."""
        if self.finished or self._outputs.empty():
            return None
        output = self._outputs.get_nowait()
        if isinstance(output, EngineDead):
            self._outputs.put_nowait(output)
            return None
        return self._take(output)

    def _take(self, output: RequestOutput | EngineDead) -> RequestOutput:
        if isinstance(output, EngineDead):
            self.finished = True
            raise output
        self.finished = output.finish_reason is not None
        if self.finished:
            self._client.forget(self)
        return output

    def __enter__(self) -> "RequestStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.forget(self)


class EngineClient:
    """Starts the engine process, carries requests to it and their tokens back.

    One ZeroMQ pair over a socket in a private directory; the engine answers with one message a step.
    """

    def __init__(self, config: EngineConfig, program: Sequence[str] = ("-m", "gear_engine.process")) -> None:
        """`program` is what Python runs as the engine: benchmarks bring one without a model."""
        self.config = config
        self._program = program
        self.stats = EngineStats()
        self._streams: dict[str, RequestStream] = {}
        self._listeners: list[StepListener] = []
        self._info: EngineInfo | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._dead: EngineDead | None = None
        self._directory: Path | None = None
        self._context: zmq.asyncio.Context | None = None
        self._socket: zmq.asyncio.Socket | None = None

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "start() first"
        return self._info

    @property
    def is_alive(self) -> bool:
        return self._info is not None and self._dead is None

    @property
    def num_requests(self) -> int:
        """Requests submitted and not finished."""
        return len(self._streams)

    def add_listener(self, listener: StepListener) -> None:
        """`listener` is called on the event loop with every step's report."""
        self._listeners.append(listener)

    async def start(self) -> EngineInfo:
        """Return when the engine is ready. Raises `EngineStartError` with the remedy if it cannot start."""
        self._directory = Path(tempfile.mkdtemp(prefix="gear-"))  # mode 0700: nobody else may connect
        address = f"ipc://{self._directory / 'engine'}"
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # unbounded: the engine must never block on a slow reader
        self._socket.linger = 0
        self._socket.bind(address)
        config = msgspec.json.encode(self.config).decode()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *self._program, address, str(os.getpid()), config,
                start_new_session=True,  # Ctrl-C reaches the server alone, which drains and then stops the engine
            )  # fmt: skip
            first = await self._first_message()
            if not isinstance(first, EngineInfo):
                raise EngineStartError(first.message if isinstance(first, StartFailed) else "unexpected first message")
        except BaseException:
            await self.close()
            raise
        self._info = first
        self._reader = asyncio.create_task(self._read(), name="engine reader")
        return first

    async def _first_message(self) -> FromEngine:
        assert self._socket is not None
        assert self._process is not None
        message = asyncio.ensure_future(self._socket.recv())
        ended = asyncio.ensure_future(self._process.wait())
        await asyncio.wait([message, ended], return_when=asyncio.FIRST_COMPLETED)
        if not message.done():
            await asyncio.wait([message], timeout=0.5)  # its last word may still be under way
        ended.cancel()
        if message.done():
            return _decode(message.result())
        message.cancel()
        raise EngineStartError(f"the engine process ended with code {self._process.returncode} before it was ready")

    async def _read(self) -> None:
        """Hand every report to its streams until the engine ends."""
        assert self._socket is not None
        assert self._process is not None
        ended = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                message = asyncio.ensure_future(self._socket.recv())
                if not message.done():  # what has come already is taken at once, so that who fell behind catches up
                    await asyncio.wait([message, ended], return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    break
                self._take_report(_decode(message.result()))
        finally:
            ended.cancel()
            code = self._process.returncode
            self._dead = EngineDead(f"the engine process ended (code {code}); requests in flight are lost")
            for stream in self._streams.values():
                stream.put(EngineDead(str(self._dead)))

    def _take_report(self, report: FromEngine) -> None:
        assert isinstance(report, StepReport)
        self.stats = report.stats
        self._tell_listeners(report)
        for request_id, queue_time_s in report.queue_times_s.items():
            if stream := self._streams.get(request_id):
                stream.queue_time_s = queue_time_s
        for output in report.outputs:
            if stream := self._streams.get(output.request_id):
                stream.put(output)

    def _tell_listeners(self, report: StepReport) -> None:
        for listener in self._listeners:
            try:
                listener(report)
            except Exception:  # whoever watches must not end the requests of others
                logger.exception("a listener of engine steps failed")

    def submit(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> "RequestStream":
        """Queue a request now and return its outputs, the last with `finish_reason`.

        Raises `RequestError` (the caller's fault), `QueueFull` or `EngineDead` here, before any output.
        Use it as a context manager: leaving it early aborts the request.
        """
        if self._dead is not None:
            raise EngineDead(str(self._dead))  # a new one: raising one again and again would grow its traceback
        validate(token_ids, params, timeout_s, max_model_len=self.info.max_model_len, vocab_size=self.info.vocab_size)
        if self.num_requests >= self.info.max_running + self.config.max_waiting:
            raise QueueFull(self.num_requests - self.info.max_running)
        assert request_id not in self._streams, f"request id {request_id} is in use"
        self._send(AddRequest(request_id, token_ids, params, priority, cache_salt, timeout_s))
        stream = self._streams[request_id] = RequestStream(request_id, self)
        return stream

    def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort". Unknown ids are ignored."""
        if request_id in self._streams:
            self._send(AbortRequest(request_id))

    def forget(self, stream: "RequestStream") -> None:
        """Called by a stream that is left: what it did not finish is aborted."""
        if self._streams.pop(stream.request_id, None) is not None and not stream.finished:
            self._send(AbortRequest(stream.request_id))

    def _send(self, message: ToEngine) -> None:
        """Socket buffers are unbounded, so sending never blocks; a dead engine has nobody to tell."""
        if self._socket is not None and self._dead is None:
            self._socket.send(_encode(message))  # to a connected engine: done at once, nothing to await

    @property
    def _patience_s(self) -> float:
        """How long a stop may take; an engine that saves pages needs some seconds for that (`Engine.close`)."""
        if not self.is_alive:
            return 0
        return 5 if self.config.cache_dir is None else 20

    async def close(self) -> None:
        """Stop the engine process (politely, then by force) and remove the socket."""
        if self._process is not None and self._process.returncode is None:
            self._send(Shutdown())
            try:  # one that is still starting, or that nothing can be sent to, does not listen
                await asyncio.wait_for(self._process.wait(), timeout=self._patience_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
            if not self._reader.cancelled() and (error := self._reader.exception()):
                logger.error("reading from the engine failed: %s", error)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._context is not None:
            self._context.term()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
