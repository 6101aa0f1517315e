"""A real uvicorn around an application, on a free port and a thread of its own."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI


class LiveServer:
    """`url` to talk to it; `run` to do something on its event loop, where the engine lives."""

    def __init__(self, make_app: Callable[[], FastAPI]) -> None:
        self._make_app = make_app
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        config = uvicorn.Config(self._make_app(), log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        serving = asyncio.ensure_future(self._server.serve([listener]))
        while not self._server.started:  # noqa: ASYNC110 (uvicorn offers nothing to wait for)
            await asyncio.sleep(0.005)
        self._ready.set()
        await serving

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(timeout=10)

    @contextmanager
    def running(self) -> Iterator["LiveServer"]:
        self._thread.start()
        assert self._ready.wait(10)
        try:
            yield self
        finally:
            self._server.should_exit = True
            self._thread.join(10)
            assert not self._thread.is_alive()
