"""An engine process without a model: every request gets one token a step, 20 steps a second, and the time is noted.

Started by `EngineClient` in place of `gear_engine.process`, so that the front end is measured with its real socket and
messages. Arguments: the tokenizer's folder, the file for the notes, then what `EngineClient` adds.
"""

import os
import sys
import time
from pathlib import Path

import msgspec
import zmq
from tokenizers import Tokenizer

from gear_engine.protocol import (
    AbortRequest,
    AddRequest,
    EngineInfo,
    EngineStats,
    RequestOutput,
    Shutdown,
    StepReport,
    ToEngine,
)

STEP_S = 0.05
MAX_MODEL_LEN = 131_072
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ToEngine).decode


class Notes(msgspec.Struct):
    """When each token of each request left the engine: `time.monotonic`, which processes share."""

    sent_s: dict[str, list[float]] = {}


def answer_tokens(tokenizer: Tokenizer) -> list[int]:
    """What answers are made of, again and again: words of plain letters, so that text is one token's each."""
    words = [" the", " engine", " sends", " one", " token", " each", " step", " to", " every", " stream"]
    return [tokenizer.encode(word).ids[0] for word in words]


def main() -> None:
    folder, notes_file, address, parent = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    socket = zmq.Context().socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    socket.send(_encode(_info(folder, tokenizer.get_vocab_size())))
    notes = Notes()
    _serve(socket, answer_tokens(tokenizer), notes, parent)
    notes_file.write_bytes(msgspec.json.encode(notes))


def _serve(socket: zmq.Socket[bytes], tokens: list[int], notes: Notes, parent: int) -> None:
    running: dict[str, tuple[int, int]] = {}  # tokens sent, tokens asked for
    next_step_s = time.monotonic()
    while os.getppid() == parent:
        while socket.poll(max(0.0, next_step_s - time.monotonic()) * 1000):
            match _decode(socket.recv()):
                case Shutdown():
                    return
                case AddRequest(request_id=request_id, params=params):
                    running[request_id] = (0, params.max_tokens)
                case AbortRequest(request_id=request_id):
                    running.pop(request_id, None)
        next_step_s = max(next_step_s + STEP_S, time.monotonic())
        if not running:
            continue
        outputs = []
        for request_id, (num_sent, max_tokens) in list(running.items()):
            running[request_id] = (num_sent + 1, max_tokens)
            ended = num_sent + 1 == max_tokens
            if ended:
                del running[request_id]
            reason = "length" if ended else None
            outputs.append(RequestOutput(request_id, [tokens[num_sent % len(tokens)]], finish_reason=reason))
        report = _encode(StepReport(outputs, EngineStats(num_running=len(running)), STEP_S, len(outputs), {}))
        now_s = time.monotonic()
        for output in outputs:
            notes.sent_s.setdefault(output.request_id, []).append(now_s)
        socket.send(report)


def _info(folder: Path, vocab_size: int) -> EngineInfo:
    return EngineInfo(
        model_path=str(folder), max_model_len=MAX_MODEL_LEN, vocab_size=vocab_size, eos_token_ids=[], preset="none",
        backend="reference", device="cpu", dtype="float32", num_layers=1, num_pages=1, page_size=128, page_bytes=1,
        bf16_token_bytes=1, kv_compression_ratio=1.0, memory=[], memory_table="a stub: no model, no memory",
        max_running=2048,
    )  # fmt: skip


if __name__ == "__main__":
    main()
