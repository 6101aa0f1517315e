"""From settings to a running server: bind the port, start the engine, serve, drain when asked to stop.

The port is bound before the engine starts, because nobody should wait for weights to load to learn that it is busy.
"""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from gear_engine.protocol import EngineInfo, EngineStartError
from gear_server.app import create_app, create_metrics_app
from gear_server.context import Context, Engine
from gear_server.settings import Settings
from gear_server.tokenizer import TokenizerError
from gear_server.tracing import provider_from

logger = logging.getLogger("gear_server")

DRAIN_S = 30.0


class StartError(RuntimeError):
    """The server cannot start; one sentence that names the remedy."""


class StartableEngine(Engine, Protocol):
    """`EngineClient` before it is started."""

    async def start(self) -> EngineInfo: ...

    async def close(self) -> None: ...


class StopSignals:
    """SIGINT and SIGTERM: the first asks to stop, the second to stop at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `StopSignals` and says so when it listens."""

    def __init__(self, config: uvicorn.Config, welcome: str) -> None:
        super().__init__(config)
        self._welcome = welcome

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._welcome, flush=True)


def _bind(host: str, port: int, flag: str) -> socket.socket:
    """A bound socket, not listening yet: connections are refused until the model is there. Raises `StartError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise _bind_error(error, host, port, flag) from error
    return bound


@dataclass(frozen=True, slots=True)
class Sockets:
    """Bound to the addresses of the settings."""

    public: socket.socket
    metrics: socket.socket | None


def bind_all(settings: Settings) -> Sockets:
    """Raises `StartError`."""
    public = _bind(settings.host, settings.port, "--port")
    if settings.metrics_port is None:
        return Sockets(public, None)
    return Sockets(public, _bind(settings.metrics_host, settings.metrics_port, "--metrics-port"))


async def serve(settings: Settings, sockets: Sockets, engine: StartableEngine) -> None:
    """Start `engine` and return after a clean stop. Raises `StartError` with the remedy if it cannot start."""
    stop = StopSignals()
    stop.listen()
    tracer_provider = None
    try:
        if not await _started(engine, stop):
            return
        tracer_provider = provider_from()
        app = create_app(settings, engine, tracer_provider)
        print(engine.info.memory_table)
        async with _metrics_served(app.state.context, sockets.metrics):
            await _serve_until(stop, app, app.state.context, sockets.public)
    except (EngineStartError, TokenizerError) as error:
        raise StartError(str(error)) from error
    finally:
        await engine.close()
        if tracer_provider is not None:
            await asyncio.to_thread(tracer_provider.shutdown)  # sends what is left


async def _started(engine: StartableEngine, stop: StopSignals) -> bool:
    """False if the server was asked to stop while the engine was starting."""
    starting = asyncio.ensure_future(engine.start())
    stopping = asyncio.ensure_future(stop.first.wait())
    await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if starting.done():
        starting.result()
        return True
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    return False


async def _serve_until(stop: StopSignals, app: ASGIApp, context: Context, bound: socket.socket) -> None:
    server = _Uvicorn(_uvicorn_config(app, context.settings), _welcome(context, bound))
    serving = asyncio.ensure_future(server.serve([bound]))
    stopping = asyncio.ensure_future(stop.first.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        logger.info("stopping: requests in flight may finish within %d s, a second signal stops at once", DRAIN_S)
        await _drain(stop, context)
        server.should_exit = True
    stopping.cancel()
    try:
        await serving
    except OSError as error:  # another server took the port between bind and listen
        raise _bind_error(error, context.settings.host, context.settings.port, "--port") from error


async def _drain(stop: StopSignals, context: Context) -> None:
    draining = asyncio.ensure_future(context.traffic.drain(DRAIN_S))
    hurrying = asyncio.ensure_future(stop.second.wait())
    await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, hurrying):
        task.cancel()
    if stop.second.is_set():
        await context.traffic.drain(0.0)


def _uvicorn_config(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,  # its loggers speak through ours
        log_level="warning" if settings.log_level == "info" else settings.log_level,
        access_log=False,  # request_log.py has one
        lifespan="off",
        http="h11",  # not "auto", which takes what is installed: h11 bounds the size of a request's head
        ws="none",
        server_header=False,
        timeout_keep_alive=75,  # longer than load balancers keep idle connections
        timeout_graceful_shutdown=1,  # the drain is over by then
    )


@asynccontextmanager
async def _metrics_served(context: Context, bound: socket.socket | None) -> AsyncIterator[None]:
    """/metrics and /health without a key on a port of their own, also while the public one drains."""
    if bound is None:
        yield
        return
    try:
        bound.listen()
    except OSError as error:  # another server took the port since it was bound
        host, port = bound.getsockname()[:2]
        raise _bind_error(error, host, port, "--metrics-port") from error
    welcome = f"metrics on {_url(bound)}/metrics"
    server = _Uvicorn(_uvicorn_config(create_metrics_app(context), context.settings), welcome)
    serving = asyncio.ensure_future(server.serve([bound]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


def _welcome(context: Context, bound: socket.socket) -> str:
    url = _url(bound)
    key = ' -H "Authorization: Bearer $GEAR_API_KEY"' if context.settings.api_key else ""
    if context.template is not None:
        path, body = "/v1/chat/completions", '{"messages": [{"role": "user", "content": "Hello!"}]}'
    else:
        path, body = "/v1/completions", '{"prompt": "Once upon a time", "max_tokens": 32}'
    example = f"curl {url}{path}{key} -H 'Content-Type: application/json' -d '{body}'"
    return f"listening on {url}\ntry: {example}"


def _url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _bind_error(error: OSError, host: str, port: int, flag: str) -> StartError:
    if error.errno == errno.EADDRINUSE:
        return StartError(f"port {port} is in use on {host}: choose another one with {flag}")
    return StartError(f"cannot listen on {host}:{port}: {error.strerror or error}")
