"""What probes, clients and people ask a server about itself."""

import httpx
from fastapi import FastAPI
from scripted_engine import ScriptedEngine

from gear_server import version


async def test_health_follows_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await client.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    engine.is_alive = False
    for path in ("/health", "/ready"):
        response = await client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"


async def test_a_draining_server_is_healthy_and_not_ready(client: httpx.AsyncClient, app: FastAPI) -> None:
    assert (await client.get("/ready")).status_code == 200
    app.state.context.traffic.draining = True
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503


async def test_version_is_the_packages(client: httpx.AsyncClient) -> None:
    assert (await client.get("/version")).json() == {"version": version()}


async def test_models_lists_every_served_name(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    models = (await client.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [card["id"] for card in models["data"]] == ["small", "alias"]
    assert models["data"][0]["max_model_len"] == engine.max_model_len
    assert (await client.get("/v1/models/alias")).json() == models["data"][1]


async def test_an_unknown_model_is_a_404(client: httpx.AsyncClient) -> None:
    for name in ("other", "org/other", ""):
        response = await client.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


async def test_the_api_documents_its_bounds_and_forms(client: httpx.AsyncClient) -> None:
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    assert fields["temperature"]["maximum"] == 100
    assert {form["type"] for form in fields["prompt"]["anyOf"]} == {"string", "array"}
    assert all("description" in field for field in fields.values())
