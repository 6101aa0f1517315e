"""POST /v1/responses: OpenAI's official client, the order of its events, what is refused because nothing is stored."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings

BODY: dict[str, Any] = {"model": "small", "input": "Hi"}


@pytest.fixture
def official(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    settings = Settings(served_model_name=("small",), api_key=("key",))
    with (
        LiveServer(lambda: create_app(settings, engine)).running() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as client,
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
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_the_official_client_gets_answers_and_streams(official: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = 3
    whole = official.responses.create(**BODY, instructions="Be kind.", metadata={"a": "b"})
    assert whole.output_text == "Hello world"
    assert (whole.status, whole.model, whole.metadata) == ("completed", "small", {"a": "b"})
    assert whole.usage is not None
    assert whole.usage.input_tokens_details.cached_tokens == 3
    with official.responses.stream(**BODY, instructions="Be kind.", metadata={"a": "b"}) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()
    assert "".join(pieces) == streamed.output_text == "Hello world"
    assert len(pieces) > 1
    assert streamed.usage == whole.usage


async def test_events_come_in_openais_order(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = [engine.tokenizer.token_to_id(letter) for letter in "ab"]
    whole = (await client.post("/v1/responses", json=BODY)).json()
    events = events_of(await client.post("/v1/responses", json=BODY | {"stream": True}))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert events[0]["response"]["status"] == "in_progress"
    assert events[6]["text"] == "ab"
    last = events[-1]["response"]
    assert last["output"][0] == events[-2]["item"]
    assert {event["item_id"] for event in events if "item_id" in event} == {last["output"][0]["id"]}
    for response in (whole, last):
        for name in ("id", "created_at"):
            del response[name]
        del response["output"][0]["id"]
    assert last == whole


async def test_an_answer_that_was_too_long_is_incomplete(client: httpx.AsyncClient) -> None:
    limited = BODY | {"max_output_tokens": 1}
    whole = (await client.post("/v1/responses", json=limited)).json()
    last = events_of(await client.post("/v1/responses", json=limited | {"stream": True}))[-1]
    assert last["type"] == "response.incomplete"
    for response in (whole, last["response"]):
        assert response["status"] == response["output"][0]["status"] == "incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_items_become_messages(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "id": "msg_1", "content": [{"type": "output_text", "text": "three"}]},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]
    response = await client.post("/v1/responses", json={"input": items, "instructions": "Be kind."})
    assert response.status_code == 200, response.text
    text = engine.tokenizer.decode(engine.submitted[0].token_ids, skip_special_tokens=False)
    assert text == "<|end|>".join(
        [
            "<system>Be kind.",
            "<user>one\ntwo",
            "<assistant>three",
            "<user><tool_response>\n42\n</tool_response>",
            "<assistant>",
        ]
    )


async def test_an_error_in_a_stream_is_one_last_event(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.error_after = 1
    events = events_of(await client.post("/v1/responses", json=BODY | {"stream": True}))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "NaN logits"}
    assert events[-1]["response"]["status"] == "failed"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "input is required"),
        ({"input": []}, "input", "input: List should have at least 1 item after validation, not 0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input",
         "input: items of type 'item_reference' are not supported, only messages and function calls"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
         "input[0].content", None),
        ({"previous_response_id": "resp_1"}, "previous_response_id",
         "previous_response_id is not supported yet: leave it out"),
        ({"background": True}, "background", "background is not supported yet: leave it out"),
        ({"include": ["message.output_text.logprobs"]}, "include", "include is not supported yet: leave it out"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "tools[0].type must be 'function', got 'web_search'"),
        ({"max_output_tokens": 0}, "max_output_tokens",
         "max_output_tokens must be greater than or equal to 1, got 0"),
        ({"max_output_tokens": 1000}, "max_output_tokens", None),
        ({"input": "x1" * 300}, "input", None),
    ],
)  # fmt: skip
async def test_refusals_name_the_field_that_was_sent(
    client: httpx.AsyncClient, fields: Any, param: str, message: str | None
) -> None:
    response = await client.post("/v1/responses", json=BODY | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message is None or error["message"] == message


async def test_what_asks_for_nothing_is_fine(client: httpx.AsyncClient) -> None:
    nothing = {
        "store": True, "reasoning": {"effort": "low"}, "include": ["reasoning.encrypted_content"], "tools": [],
        "tool_choice": "auto", "text": {"format": {"type": "text"}, "verbosity": "low"}, "truncation": "auto",
        "background": False, "service_tier": "auto", "prompt_cache_key": "x", "stream_options": {},
    }  # fmt: skip
    response = await client.post("/v1/responses", json=BODY | nothing)
    assert response.status_code == 200, response.text
    assert response.json()["store"] is False
