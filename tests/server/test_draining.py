"""A server that was asked to stop finishes what it has and takes nothing new."""

import asyncio

import httpx
from fastapi import FastAPI
from scripted_engine import ScriptedEngine

from gear_server.traffic import Traffic

STREAM = {"prompt": "Once", "max_tokens": 50, "stream": True}


async def test_a_running_stream_finishes_and_new_requests_are_refused(
    client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine
) -> None:
    traffic: Traffic = app.state.context.traffic
    engine.pause_after = 1
    streaming = asyncio.create_task(client.post("/v1/completions", json=STREAM))
    await engine.until(lambda: engine.num_requests == 1)
    draining = asyncio.create_task(traffic.drain(limit_s=5))
    await engine.until(lambda: traffic.draining)
    for path, body in (
        ("/v1/completions", STREAM),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        refused = await client.post(path, json=body)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
    assert not draining.done()
    engine.go_on.set()
    assert (await streaming).text.endswith("data: [DONE]\n\n")
    await draining
    assert engine.aborted == []
    assert 'finish_reason="rejected",model="small"} 2.0' in (await client.get("/metrics")).text


async def test_what_does_not_finish_in_time_is_aborted_and_says_so(
    client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine
) -> None:
    engine.pause_after = 1
    streaming = asyncio.create_task(client.post("/v1/completions", json=STREAM | {"n": 2}))
    await engine.until(lambda: engine.num_requests == 2)
    await app.state.context.traffic.drain(limit_s=0.05)
    assert streaming.done()
    assert (await streaming).text.count('"finish_reason":"abort"') == 2
    assert len(engine.aborted) == 2


async def test_an_idle_server_drains_at_once() -> None:
    async with asyncio.timeout(0.5):
        await Traffic().drain(limit_s=30)
