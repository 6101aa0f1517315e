"""Streaming: the same text as without, events in OpenAI's order, and honest ends."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from gear_engine.protocol import RequestOutput

USER = {"role": "user", "content": "Hi"}


def events_of(response: httpx.Response) -> list[Any]:
    """The data of each event; [DONE] stays a string."""
    assert response.text.endswith("\n\n")
    events = response.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    return [
        data if data == "[DONE]" else json.loads(data) for data in (event.removeprefix("data: ") for event in events)
    ]


async def stream(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[Any]:
    prompt = {"prompt": "Once"} if path == "/v1/completions" else {"messages": [USER]}
    response = await client.post(path, json={"stream": True, "max_tokens": 100} | prompt | body)
    assert response.status_code == 200, response.text
    return events_of(response)


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events if event != "[DONE]" for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


async def test_a_stream_is_server_sent_events_and_ends_with_done(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "Once", "stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    *chunks, done = events_of(response)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_text_comes_token_by_token(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "abc"]
    events = await stream(client)
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["a", "b", "c", ""]


async def test_a_chat_stream_has_the_role_first_then_text_then_the_reason(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "ab"]
    *chunks, done = await stream(client, "/v1/chat/completions")
    assert done == "[DONE]"
    assert [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": "a"}, None),
        ({"content": "b"}, None),
        ({}, "stop"),
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, 403), min_size=1, max_size=30),
    stop=st.lists(st.text("ab e", min_size=1, max_size=3), max_size=3),
    tokens_per_step=st.integers(1, 4),
)
def test_text_streamed_is_text_not_streamed(
    client: httpx.AsyncClient, engine: ScriptedEngine, token_ids: list[int], stop: list[str], tokens_per_step: int
) -> None:
    engine.answer, engine.tokens_per_step = token_ids, tokens_per_step

    async def both() -> tuple[str, str]:
        body = {"prompt": "Once", "max_tokens": 40, "stop": stop}
        whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["text"]
        return text_of(await stream(client, **body)), whole

    streamed, whole = asyncio.run(both())
    assert streamed == whole


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_include_usage_adds_one_chunk_before_done(client: httpx.AsyncClient, path: str) -> None:
    whole = await client.post(path, json={"prompt": "Once"} if path == "/v1/completions" else {"messages": [USER]})
    *chunks, last, done = await stream(client, path, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == whole.json()["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_without_include_usage_no_chunk_has_a_usage(client: httpx.AsyncClient) -> None:
    assert not any("usage" in event for event in (await stream(client))[:-1])


async def test_stop_strings_are_held_back_and_cut(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "abcde"]
    events = await stream(client, stop=["cd"])
    texts = [event["choices"][0]["text"] for event in events[:-1]]
    assert texts == ["a", "b", ""]
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert engine.aborted == [engine.submitted[0].request_id]


async def bodies_sent(app: FastAPI, **fields: Any) -> list[bytes]:
    """Each message that the application hands to its server."""
    sent: list[bytes] = []
    body = json.dumps({"prompt": "Once", "stream": True} | fields).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
    }  # fmt: skip
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message.get("body", b""))

    await app(scope, receive, send)
    return sent


async def test_outputs_that_came_meanwhile_leave_in_one_piece(app: FastAPI, engine: ScriptedEngine) -> None:
    engine.pause_after = 0
    streaming = asyncio.create_task(bodies_sent(app))
    await engine.until(lambda: engine.num_requests == 1)
    request = engine.submitted[0]
    for token in (5, 6, 7):
        request.stream.put(RequestOutput(request.request_id, [token]))
    request.stream.put(RequestOutput(request.request_id, [engine.eos], "stop", engine.eos))
    bodies = await streaming
    assert [body.count(b"data: ") for body in bodies] == [0, 4, 1]  # the head, four chunks, [DONE]


async def test_choices_of_one_step_leave_in_one_piece(app: FastAPI) -> None:
    first_step = (await bodies_sent(app, n=3))[1]
    assert [first_step.count(b'"index":%d' % index) for index in range(3)] == [1, 1, 1]


async def test_choices_are_told_apart_by_their_index(client: httpx.AsyncClient) -> None:
    events = await stream(client, n=3, echo=True)
    assert [text_of(events[:-1], index) for index in range(3)] == ["OnceHello world"] * 3
    ends = [event["choices"][0] for event in events[:-1] if event["choices"][0]["finish_reason"]]
    assert sorted(end["index"] for end in ends) == [0, 1, 2]


async def test_a_choice_that_stopped_early_does_not_hold_up_the_others(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    tokenizer = engine.tokenizer
    engine.answer = lambda request: (
        tokenizer.encode("xEND and on" if request.params.seed == 1 else "y" * 20, add_special_tokens=False).ids
    )
    events = await stream(client, n=2, seed=1, stop="END")
    assert [text_of(events[:-1], index) for index in range(2)] == ["x", "y" * 20]
    assert engine.aborted == [engine.submitted[0].request_id]


async def test_the_engines_death_is_one_last_event_and_no_done(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.pause_after = 1
    streaming = asyncio.create_task(stream(client, n=2))
    await engine.until(lambda: len(engine.submitted) == 2)
    await asyncio.sleep(0.02)
    engine.die()
    events = await streaming
    assert "choices" in events[0]
    assert events[-1]["error"]["code"] == "engine_dead"
    assert [event for event in events if "error" in event] == [events[-1]]


async def test_a_request_that_the_engine_gives_up_is_one_last_event_and_no_done(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.error_after = 1
    events = await stream(client)
    assert events[-1] == {"error": {"message": "NaN logits", "type": "internal_error", "param": None, "code": None}}
    assert "choices" in events[0]


async def test_refusals_come_before_the_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.max_requests = 0
    response = await client.post("/v1/completions", json={"prompt": "Once", "stream": True})
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
