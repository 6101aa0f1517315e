"""With API keys set, everything but /health and /ready wants one."""

from collections.abc import AsyncIterator

import httpx
import pytest
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings


@pytest.fixture
async def locked(engine: ScriptedEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(api_key="first, schlüssel"), engine)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/metrics", "/version", "/docs", "/openapi.json",
                                  "/v1/completions", "/no/such/route"])  # fmt: skip
async def test_without_a_key_nothing_is_answered(locked: httpx.AsyncClient, path: str) -> None:
    response = await locked.get(path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "x-request-id" in response.headers
    error = response.json()["error"]
    assert error["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in error["message"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(locked: httpx.AsyncClient, path: str) -> None:
    assert (await locked.get(path)).status_code == 200


@pytest.mark.parametrize("header", ["Bearer first", "bearer first", "Bearer  first ", "Bearer schlüssel"])
async def test_every_key_opens_everything(locked: httpx.AsyncClient, header: str) -> None:
    for path in ("/v1/models", "/metrics"):
        response = await locked.get(path, headers={"Authorization": header.encode()})  # type: ignore[dict-item]
        assert response.status_code == 200


@pytest.mark.parametrize("header", ["Bearer firs", "Bearer first2", "Bearer first, schlüssel", "Basic first", "Bearer",
                                    "Bearer ", "first", ""])  # fmt: skip
async def test_any_other_key_opens_nothing(locked: httpx.AsyncClient, header: str) -> None:
    response = await locked.get("/v1/models", headers={"Authorization": header.encode()})  # type: ignore[dict-item]
    assert response.status_code == 401
    assert "first" not in response.text


async def test_a_key_may_come_as_anthropics_clients_send_it(locked: httpx.AsyncClient) -> None:
    assert (await locked.get("/v1/models", headers={"X-API-Key": "first"})).status_code == 200
    assert (await locked.get("/v1/models", headers={"X-API-Key": "firs"})).status_code == 401
    refused = await locked.post("/v1/messages", headers={"X-API-Key": "firs"})
    assert refused.json()["error"]["type"] == "authentication_error"


async def test_a_path_that_only_looks_open_is_not(locked: httpx.AsyncClient) -> None:
    for path in ("/health/", "http://test//health", "/health/../metrics", "/ready%2F", "/HEALTH"):
        assert (await locked.get(path)).status_code == 401


async def test_refused_keys_are_not_counted_as_rejected_requests(locked: httpx.AsyncClient) -> None:
    await locked.post("/v1/completions", json={"prompt": "a"})
    metrics = (await locked.get("/metrics", headers={"Authorization": "Bearer first"})).text
    assert 'gear_requests_total{finish_reason="rejected",model="SmolLM2-135M-Instruct"} 0.0' in metrics


async def test_isolated_keys_share_no_cached_prompt(engine: ScriptedEngine) -> None:
    app = create_app(Settings(api_key=("first", "second"), isolate_keys=True), engine)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        for key, salt in (("first", None), ("first", "x"), ("second", None), ("second", "x"), ("first", None)):
            for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", chat)):
                headers = {"Authorization": f"Bearer {key}"}
                response = await client.post(path, json={**body, "cache_salt": salt}, headers=headers)
                assert response.status_code == 200
    salts = [request.cache_salt for request in engine.submitted]
    assert salts[::2] == salts[1::2]
    assert len(set(salts)) == 4
    assert salts[0] == salts[8]
    assert not any("first" in salt for salt in salts)  # a digest, not the key itself


async def test_without_keys_everything_is_open(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models")).status_code == 200
