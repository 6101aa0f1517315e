"""The default model, which is small and wanders, gives what was asked for: JSON of a schema, a choice, a call.

Runs after the tests of the real server, whose peak of memory these would raise.
"""

import json
import re
from typing import Any

import httpx
import pytest

from tests.e2e.serving import MODEL

ASK = [{"role": "user", "content": "Describe a person called Ada, who is 36, in JSON."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "languages": {"type": "array", "items": {"enum": ["en", "fr", "de"]}, "minItems": 1, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "languages"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def chat(url: str, **body: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}/v1/chat/completions", json={"messages": ASK} | body, timeout=120)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def assert_person(text: str) -> None:
    person = json.loads(text)
    assert {"name", "age", "languages"} <= set(person) <= set(PERSON["properties"])  # type: ignore[call-overload]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert 1 <= len(person["languages"]) <= 3
    assert set(person["languages"]) <= {"en", "fr", "de"}
    assert isinstance(person.get("alive", True), bool)


def test_json_of_a_schema_validates_however_it_is_drawn(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    body = {"messages": ASK, "response_format": form, "n": 4, "seed": 1, "temperature": 1.3, "max_tokens": 200}
    choices = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=240).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["stop"] * 4
    for choice in choices:
        assert_person(choice["message"]["content"])


def test_json_that_max_tokens_cuts_says_length(url: str) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": PERSON}}
    choice = chat(url, response_format=form, max_tokens=4, temperature=0)
    assert choice["finish_reason"] == "length"
    with pytest.raises(ValueError, match=r"."):
        json.loads(choice["message"]["content"])


def test_any_object_a_choice_a_regex_and_a_grammar(url: str) -> None:
    given = chat(url, response_format={"type": "json_object"}, max_tokens=40, temperature=0)
    assert given["finish_reason"] == "length" or isinstance(json.loads(given["message"]["content"]), dict)
    texts = [
        chat(url, structured_outputs=structured, max_tokens=20, seed=2)["message"]["content"]
        for structured in (
            {"choice": ["red", "blue"]},
            {"regex": "[a-f]{4}-[0-9]{3}"},
            {"grammar": 'root ::= "a" "b"*'},
        )
    ]
    assert texts[0] in ("red", "blue")
    assert re.fullmatch("[a-f]{4}-[0-9]{3}", texts[1])
    assert re.fullmatch("ab*", texts[2])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_one_whose_arguments_validate(url: str, choice: Any) -> None:
    body = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 300, "seed": 3, "parallel_tool_calls": False}
    answer = chat(url, **body)
    assert answer["finish_reason"] == "tool_calls"
    (call,) = answer["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("C", "F")


def test_a_choice_streamed_is_the_choice_whole(url: str) -> None:
    body = {"model": MODEL, "prompt": "The colour of the sky is", "guided_choice": ["green", "blue"], "temperature": 0}
    whole = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=60) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole["text"]
    assert whole["text"] in ("green", "blue")


def test_logprobs_of_an_echoed_prompt_are_those_of_the_model(url: str) -> None:
    body = {"prompt": "The capital of France is Paris", "echo": True, "max_tokens": 0, "logprobs": 1}
    lists = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["logprobs"]
    assert "".join(lists["tokens"]) == body["prompt"]
    assert lists["token_logprobs"][0] is None
    assert lists["token_logprobs"][-1] > -2.0  # Paris is no surprise
    assert max(lists["top_logprobs"][-1], key=lists["top_logprobs"][-1].get) == " Paris"
