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

import msgspec
import zmq

from gear_engine.config import EngineConfig
from gear_engine.engine import Engine
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
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


def main() -> None:
    address, parent, config = sys.argv[1], int(sys.argv[2]), msgspec.json.decode(sys.argv[3], type=EngineConfig)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
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


def _send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    socket.send(_encode(message))


def _end_with(parent: int) -> None:
    """End this process when its parent has: nobody is left to answer to, be it loading, stepping or idle."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_S)
    os._exit(1)


def _serve(engine: Engine, socket: zmq.Socket[bytes]) -> None:
    while True:
        ended: list[RequestOutput] = []
        wait_ms = 0 if engine.has_work else None
        while socket.poll(wait_ms):
            message = _decode(socket.recv())
            if isinstance(message, Shutdown):
                return
            ended += _take(engine, message)
            wait_ms = 0
        if engine.has_work:
            report = engine.step()
            _send(socket, msgspec.structs.replace(report, outputs=ended + report.outputs) if ended else report)
        elif ended:
            _send(socket, StepReport(ended, engine.stats(), None, 0, []))


def _take(engine: Engine, message: AddRequest | AbortRequest) -> list[RequestOutput]:
    """Outputs that a message gives rise to at once."""
    if isinstance(message, AbortRequest):
        output = engine.abort(message.request_id)
        return [output] if output else []
    try:
        engine.add(message)
    except RequestError as error:
        return [RequestOutput(message.request_id, [], finish_reason="error", error=str(error))]
    return []


if __name__ == "__main__":
    main()
