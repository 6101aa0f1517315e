"""A client that goes away takes its request with it, streaming or not, on a real socket."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    with LiveServer(lambda: create_app(Settings(), engine)).running() as server:
        yield server


def send_request(live: LiveServer, **body: object) -> socket.socket:
    content = json.dumps({"prompt": "Once", "max_tokens": 100} | body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(content)}\r\n"
    connection = socket.create_connection(live.address, timeout=5)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return connection


def read_until(connection: socket.socket, expected: bytes) -> None:
    received = b""
    while expected not in received:
        piece = connection.recv(4096)
        assert piece, received
        received += piece


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_leaving_aborts_every_sequence_of_the_request(
    live: LiveServer, engine: ScriptedEngine, stream: bool, n: int
) -> None:
    engine.pause_after = 1
    connection = send_request(live, stream=stream, n=n)
    live.run(engine.until(lambda: engine.num_requests == n))
    if stream:
        read_until(connection, b"data: ")
    assert engine.aborted == []
    connection.close()
    live.run(engine.until(lambda: len(engine.aborted) == n))
    assert engine.num_requests == 0


def test_an_aborted_request_is_counted(live: LiveServer, engine: ScriptedEngine) -> None:
    engine.pause_after = 0
    send_request(live, stream=True).close()
    live.run(engine.until(lambda: len(engine.aborted) == 1))
    assert 'finish_reason="abort",model="SmolLM2-135M-Instruct"} 1.0' in httpx.get(f"{live.url}/metrics").text


def test_one_client_that_leaves_does_not_disturb_another(live: LiveServer, engine: ScriptedEngine) -> None:
    engine.pause_after = 1
    leaving = send_request(live, stream=True)
    live.run(engine.until(lambda: engine.num_requests == 1))
    with httpx.stream("POST", f"{live.url}/v1/completions", json={"prompt": "a", "stream": True}) as response:
        leaving.close()
        live.run(engine.until(lambda: len(engine.aborted) == 1))
        live.run(_set(engine))
        assert response.read().endswith(b"data: [DONE]\n\n")


async def _set(engine: ScriptedEngine) -> None:
    engine.go_on.set()
