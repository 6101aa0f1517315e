"""One server with the real model for all end-to-end tests: its start is the slow part."""

import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.serving import START_TIMEOUT_S, free_port, serve


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    port = free_port()
    process = serve("--port", str(port), "--max-model-len", "2048")
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{base}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            process.kill()
            raise AssertionError(process.communicate()[0])
        yield base
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "tokens fit" in output  # the memory table
