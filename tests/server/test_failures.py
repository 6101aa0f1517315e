"""Overload, a dead engine, a failed request, a bug: each has its status, in OpenAI's shape."""

import asyncio
from typing import Any

import httpx
from scripted_engine import ScriptedEngine

from gear_engine.config import EngineConfig
from gear_server.app import create_app
from gear_server.settings import Settings

COMPLETION = {"prompt": "Once", "max_tokens": 5}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_unknown_routes_and_wrong_methods_have_the_same_shape(client: httpx.AsyncClient) -> None:
    assert error_of(await client.get("/v2/nothing"), 404)["message"] == "there is no /v2/nothing"
    assert error_of(await client.post("/v1/completions/", json={}), 404)
    response = await client.get("/v1/completions")
    assert error_of(response, 405)["message"] == "/v1/completions does not take GET"
    assert response.headers["allow"] == "POST"


async def test_a_full_queue_is_a_429_with_retry_after(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.max_requests = 2
    response = await client.post("/v1/completions", json=COMPLETION | {"n": 3})
    assert error_of(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "7"
    assert engine.num_requests == 0, "what had been queued of it is taken back"


async def test_more_answers_than_the_server_holds_are_the_callers_mistake(
    engine: ScriptedEngine,
) -> None:
    app = create_app(Settings(max_running=2, max_waiting=1), engine)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        error = error_of(await client.post("/v1/completions", json=COMPLETION | {"n": 4}), 400)
    assert "make 4 answers, but this server holds at most 3" in error["message"]
    assert EngineConfig().max_waiting > 3


async def test_a_dead_engine_is_a_503(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.is_alive = False
    assert error_of(await client.post("/v1/completions", json=COMPLETION), 503)["code"] == "engine_dead"


async def test_an_engine_that_dies_before_the_answer_is_a_503(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.pause_after = 1
    asking = asyncio.create_task(client.post("/v1/completions", json=COMPLETION))
    await engine.until(lambda: engine.num_requests == 1)
    engine.die()
    assert error_of(await asking, 503)["code"] == "engine_dead"


async def test_a_request_that_the_engine_gives_up_is_a_500_with_its_reason(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.error_after = 1
    error = error_of(await client.post("/v1/completions", json=COMPLETION), 500)
    assert error == {"message": "NaN logits", "type": "internal_error", "param": None, "code": None}


async def test_a_bug_is_a_500_that_tells_nothing_but_where_to_look(engine: ScriptedEngine, settings: Settings) -> None:
    def broken(request: object) -> list[int]:
        raise KeyError("secret detail")

    app = create_app(settings, engine)
    engine.submit = broken  # type: ignore[method-assign, assignment]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/completions", json=COMPLETION, headers={"X-Request-Id": "abc"})
    error = error_of(response, 500)
    assert "secret" not in error["message"]
    assert "X-Request-Id abc" in error["message"]
    assert response.headers["x-request-id"] == "abc"
