"""The engine process: takes requests from a socket, steps while there is work, answers with one message a step.

Started by `client.py` as `python -m gear_engine.process ADDRESS PARENT_PID CONFIG`; ends when told to, or with its
parent.
"""

import gc
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import zmq
from llguidance import LLMatcher

from gear_engine.config import EngineConfig
from gear_engine.engine import Engine
from gear_engine.log_format import configure_logging
from gear_engine.protocol import (
    AbortRequest,
    AddRequest,
    EngineStartError,
    FromEngine,
    RequestError,
    RequestOutput,
    Shutdown,
    StartFailed,
    StepReport,
    ToEngine,
)
from gear_engine.start import start_engine

PARENT_CHECK_S = 1.0
COMPILE_CHECK_MS = 2
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


def main() -> None:
    address, parent, config = sys.argv[1], int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=EngineConfig)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    configure_logging(logging.INFO, config.log_format)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle: it drains, then tells us
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    try:
        started = start_engine(config)
    except EngineStartError as error:
        _send(socket, StartFailed(str(error)))
        socket.close(linger=2000)
        sys.exit(1)
    _send(socket, started.info)
    gc.freeze()  # what a start has made stays: the collector need not walk through it in the middle of a step
    _serve(started.engine, socket)
    started.engine.close()
    context.destroy(linger=0)
    gc.unfreeze()  # else libraries find at exit that their objects outlive them, and say so


def _send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(_encode(message))


def _end_with(parent: int) -> None:
    """End this process when its parent has: nobody is left to answer to, be it loading, stepping or idle."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


class _Arrivals:
    """Hands requests to the engine; one whose grammar must be compiled waits for that, and nobody waits for it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._compiling: dict[str, tuple[AddRequest, Future[LLMatcher]]] = {}

    @property
    def wait_ms(self) -> int | None:
        """How long to wait for the next message."""
        if self._engine.has_work:
            return 0
        return COMPILE_CHECK_MS if self._compiling else None

    def take(self, message: AddRequest | AbortRequest) -> list[RequestOutput]:
        """Outputs that it gives rise to at once."""
        if isinstance(message, AddRequest):
            if message.params.grammar and self._engine.grammars is not None:
                compiling = self._threads.submit(self._engine.grammars.matcher, message.params.grammar)
                self._compiling[message.request_id] = (message, compiling)
                return []
            return self._add(message)
        if self._compiling.pop(message.request_id, None):
            return [RequestOutput(message.request_id, [], finish_reason="abort")]
        output = self._engine.abort(message.request_id)
        return [output] if output else []

    def compiled(self) -> list[RequestOutput]:
        """Let in whose grammar is ready: the engine finds it compiled, or refuses it again."""
        outputs = []
        for request_id, (message, compiling) in list(self._compiling.items()):
            if compiling.done():
                del self._compiling[request_id]
                outputs += self._add(message)
        return outputs

    def _add(self, message: AddRequest) -> list[RequestOutput]:
        try:
            self._engine.add(message)
        except RequestError as error:
            return [RequestOutput(message.request_id, [], finish_reason="error", error=str(error))]
        return []


def _serve(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    arrivals = _Arrivals(engine)
    while True:
        ended = arrivals.compiled()
        wait_ms = 0 if ended else arrivals.wait_ms
        while socket.poll(wait_ms):
            message = _decode(socket.recv())
            if isinstance(message, Shutdown):
                return
            ended += arrivals.take(message)
            wait_ms = 0
        if engine.has_work:
            report = engine.step()
            _send(socket, msgspec.structs.replace(report, outputs=ended + report.outputs) if ended else report)
        elif ended:
            _send(socket, StepReport(ended, engine.stats(), None, 0, {}))


if __name__ == "__main__":
    main()
