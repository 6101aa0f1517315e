"""Every request has an id and a line in the log."""

import json
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from test_serving_process import scripted_server, wait_for_url


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


def test_in_json_a_request_is_one_line_that_says_what_became_of_it_and_not_what_was_asked(model_folder: Path) -> None:
    settings = {"port": 0, "log_format": "json", "log_level": "debug"}
    with scripted_server(model_folder, settings, {"step_s": 0.01}) as process:
        url, _ = wait_for_url(process)
        for number, body in enumerate(
            (
                {"prompt": "confidential", "stream": True, "unheard_of": "confidential"},
                {"prompt": "confidential", "stop": ["confidential"]},
                {"prompt": "confidential" * 500},
                {"prompt": "confidential", "temperature": "confidential"},
            )
        ):
            httpx.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": f"r{number}"})
        process.terminate()
        _, errors = process.communicate(timeout=10)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert "confidential" not in errors
    requests = [line for line in lines if line.get("request_id", "").startswith("r")]
    assert [(line["request_id"], line["status"]) for line in requests] == [
        ("r0", 200), ("r1", 200), ("r2", 400), ("r3", 400)
    ]  # fmt: skip
    streamed, _, refused, _ = requests
    assert datetime.fromisoformat(streamed["time"]).tzinfo is not None
    assert (streamed["level"], streamed["method"], streamed["path"]) == ("info", "POST", "/v1/completions")
    assert (streamed["prompt_tokens"], streamed["completion_tokens"]) == (12, 3)
    assert streamed["finish_reasons"] == ["stop"]
    assert 0.009 < streamed["first_token_s"] < streamed["duration_s"]
    assert streamed["queue_time_s"] == pytest.approx(0.01)
    assert "finish_reasons" not in refused
