"""Every request has an id and a line in the log."""

import httpx
import pytest


async def test_a_decent_request_id_is_echoed_and_another_replaced(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"X-Request-Id": "mine-1"})).headers["x-request-id"] == "mine-1"
    assert len((await client.get("/health")).headers["x-request-id"]) == 32
    for bad in ("x" * 200, "two words"):
        assert len((await client.get("/health", headers={"X-Request-Id": bad})).headers["x-request-id"]) == 32


async def test_a_request_is_one_line_of_the_log(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "gear_server.requests"):
        await client.post("/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "mine"})
        await client.get("/no%0Awhere")
        await client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "gear_server.requests"]
    assert len(lines) == 2, "probes are not worth a line"
    assert lines[0].startswith("POST /v1/completions 200 ")
    assert lines[0].endswith(" mine")
    assert lines[1].startswith("GET /no%0Awhere 404 ")
