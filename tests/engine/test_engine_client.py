"""The client of an engine process: what has come is taken at once, and the engine's end is never lost."""

import time
from pathlib import Path

import pytest

from gear_engine.client import EngineClient, RequestStream
from gear_engine.config import EngineConfig
from gear_engine.protocol import EngineDead, RequestOutput, SamplingParams

# An engine that answers the first request with twenty steps in one go, and then ends.
HASTY = """
import sys, msgspec, zmq
from gear_engine.protocol import *
socket = zmq.Context().socket(zmq.PAIR)
socket.connect(sys.argv[1])
encode = msgspec.msgpack.encode
info = EngineInfo(
    model_path="", max_model_len=99, vocab_size=9, eos_token_ids=[], preset="none", backend="cpu", device="cpu",
    dtype="float32", num_layers=1, num_pages=1, page_size=1, page_bytes=1, bf16_token_bytes=1,
    kv_compression_ratio=1.0, memory=[], memory_table="",
)
socket.send(encode(info))
request = msgspec.msgpack.decode(socket.recv(), type=ToEngine)
for token in range(20):
    output = RequestOutput(request.request_id, [token])
    socket.send(encode(StepReport([output], EngineStats(), 0.1, 1, {})))
socket.recv()
"""


async def test_who_fell_behind_takes_all_steps_that_have_come(tmp_path: Path) -> None:
    program = tmp_path / "engine.py"
    program.write_text(HASTY)
    client = EngineClient(EngineConfig(), [str(program)])
    await client.start()
    try:
        with client.submit("a", [1], SamplingParams(max_tokens=50)) as stream:
            time.sleep(0.5)  # noqa: ASYNC251 (the event loop is busy meanwhile)
            tokens = (await anext(stream)).token_ids
            while (output := stream.take_ready()) is not None:
                tokens += output.token_ids
            assert tokens == list(range(20))
    finally:
        await client.close()


async def test_what_is_ready_leaves_the_end_of_the_engine_to_the_next_wait() -> None:
    stream = RequestStream("a", EngineClient(EngineConfig()))
    stream.put(RequestOutput("a", [1]))
    stream.put(EngineDead("gone"))
    ready = stream.take_ready()
    assert ready is not None
    assert ready.token_ids == [1]
    assert stream.take_ready() is None
    with pytest.raises(EngineDead, match="gone"):
        await anext(stream)
    assert stream.take_ready() is None
