"""POST /v1/messages: Anthropic's official client, the shape of its events, its errors and its counts."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from fastapi import FastAPI
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings

USER = {"role": "user", "content": "Hi"}
BODY: dict[str, Any] = {"model": "small", "max_tokens": 50, "messages": [USER]}


@pytest.fixture
def official(engine: ScriptedEngine) -> Iterator[anthropic.Anthropic]:
    settings = Settings(served_model_name=("small",), api_key=("key",))
    with (
        LiveServer(lambda: create_app(settings, engine)).running() as server,
        anthropic.Anthropic(base_url=server.url, api_key="key", max_retries=0) as client,
    ):
        yield client


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The data of each event, whose name is its type."""
    events = []
    for text in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.submitted[-1].token_ids, skip_special_tokens=False)


def test_the_official_client_gets_answers_streams_and_counts(
    official: anthropic.Anthropic, engine: ScriptedEngine
) -> None:
    engine.num_cached_tokens = 3
    whole = official.messages.create(**BODY)
    assert [block.text for block in whole.content] == ["Hello world"]
    assert (whole.role, whole.stop_reason, whole.model) == ("assistant", "end_turn", "small")
    with official.messages.stream(**BODY) as stream:
        assert "".join(stream.text_stream) == "Hello world"
        streamed = stream.get_final_message()
    assert [block.text for block in streamed.content] == ["Hello world"]
    assert streamed.usage == whole.usage
    counted = official.messages.count_tokens(model="small", messages=[USER])  # type: ignore[list-item]
    assert counted.input_tokens == whole.usage.input_tokens + 3 == len(engine.submitted[0].token_ids)
    assert whole.usage.cache_read_input_tokens == 3


def test_refusals_become_the_official_clients_own_exceptions(
    official: anthropic.Anthropic, engine: ScriptedEngine
) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        official.messages.create(**BODY, extra_body={"temperature": -1})
    with pytest.raises(anthropic.AuthenticationError):
        official.with_options(api_key="wrong").messages.create(**BODY)
    with pytest.raises(anthropic.NotFoundError):
        official.messages.create(**BODY | {"model": "other"})
    engine.max_requests = 0
    with pytest.raises(anthropic.RateLimitError):
        official.messages.create(**BODY)
    engine.max_requests, engine.error_after = 9, 1
    with pytest.raises(anthropic.APIStatusError, match="NaN logits"), official.messages.stream(**BODY) as stream:
        stream.until_done()


async def test_events_come_in_anthropics_order(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "ab"]
    engine.num_cached_tokens = 2
    response = await client.post("/v1/messages", json=BODY | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream"
    events = events_of(response)
    start, ping, *block, delta, stop = events
    assert start["message"]["content"] == []
    assert start["message"]["usage"]["output_tokens"] == 0
    assert (ping["type"], stop) == ("ping", {"type": "message_stop"})
    assert block == [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "b"}},
        {"type": "content_block_stop", "index": 0},
    ]
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    num_prompt = len(engine.submitted[0].token_ids)
    assert start["message"]["usage"]["input_tokens"] == num_prompt
    assert delta["usage"] == {
        "input_tokens": num_prompt - 2, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2,
        "output_tokens": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "text", "ending"),
    [
        ({"max_tokens": 2}, "ab", ("max_tokens", None)),
        ({"stop_sequences": ["zz", "c"]}, "ab", ("stop_sequence", "c")),
        ({"stop_sequences": ["a"]}, "", ("stop_sequence", "a")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_an_answer_ended_is_said_whole_and_streamed(
    client: httpx.AsyncClient, engine: ScriptedEngine, fields: Any, text: str, ending: Any, stream: bool
) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "abcd"]
    response = await client.post("/v1/messages", json=BODY | fields | {"stream": stream})
    if stream:
        events = events_of(response)
        got = "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta")
        end = events[-2]["delta"]
        assert [event["type"] for event in events].count("content_block_start") == 1
    else:
        end = response.json()
        got = end["content"][0]["text"]
    assert (got, (end["stop_reason"], end["stop_sequence"])) == (text, ending)


async def test_system_blocks_and_results_of_tools_become_messages(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    text = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "42"}
    messages = [
        {"role": "user", "content": [text, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, text]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}]},
    ]
    response = await client.post("/v1/messages", json=BODY | {"system": [text], "messages": messages})
    assert response.status_code == 200, response.text
    parts = [
        "<system>one",
        "<user>one\ntwo",
        "<assistant>one",
        "<user><tool_response>\n42\n</tool_response>",
        "<user>and?",
        "<assistant>",
    ]
    assert prompt_of(engine) == "<|end|>".join(parts)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens is required"),
        ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
        ({"messages": [{"role": "tool", "content": "x"}]},
         "messages[0].role must be 'user', 'assistant' or 'system', got 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
         "messages[0].content: blocks of type 'image' are not supported, only text and tool use"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences: List should have at most 16 items after validation, not 17"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
         "messages[0].content[0].text must be a valid string, got 5"),
        ({"mcp_servers": [{}]}, "mcp_servers is not supported yet: leave it out"),
        ({"max_tokens": 1000}, "the prompt has 17 tokens and max_tokens is 1000, together 1017, but this model serves "
                               "256 (--max-model-len): shorten the prompt or lower max_tokens"),
    ],
)  # fmt: skip
async def test_refusals_have_anthropics_shape_and_name_the_field(
    client: httpx.AsyncClient, fields: Any, message: str
) -> None:
    response = await client.post("/v1/messages", json=BODY | fields)
    assert response.status_code == 400
    assert response.json() == {"type": "error", "error": {"type": "invalid_request_error", "message": message}}


async def test_every_status_has_anthropics_shape(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.is_alive = False
    for response, kind in (
        (await client.post("/v1/messages", json=BODY), "overloaded_error"),
        (await client.get("/v1/messages"), "invalid_request_error"),
        (await client.post("/v1/messages/nothing", json=BODY), "not_found_error"),
        (await client.post("/v1/messages", json=BODY | {"model": "other"}), "not_found_error"),
        (await client.post("/v1/messages", content=b"x"), "invalid_request_error"),
    ):
        assert (response.json()["type"], response.json()["error"]["type"]) == ("error", kind)


async def test_an_answer_cut_by_a_shutdown_is_an_error_that_may_be_retried(
    client: httpx.AsyncClient, app: FastAPI, engine: ScriptedEngine
) -> None:
    engine.answer = lambda request: [5] * 5
    engine.pause_after = 1

    async def ask(stream: bool) -> httpx.Response:
        return await client.post("/v1/messages", json=BODY | {"stream": stream})

    asking = [asyncio.create_task(ask(stream)) for stream in (False, True)]
    await engine.until(lambda: engine.num_requests == 2)
    await asyncio.sleep(0.01)
    await app.state.context.traffic.drain(0.0)
    whole, streamed = [await task for task in asking]
    assert (whole.status_code, whole.json()["error"]["type"]) == (503, "overloaded_error")
    last = events_of(streamed)[-1]
    assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")
