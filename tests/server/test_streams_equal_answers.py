"""Whatever a request asks for, what its stream adds up to is what the same request gets whole."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

FUZZ = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
ANSWERS = st.lists(st.integers(0, 393), min_size=1, max_size=20)
BOTH = {
    "max_tokens": st.integers(1, 30),
    "stop": st.lists(st.text("ab e", min_size=1, max_size=3), max_size=2),
    "stop_token_ids": st.lists(st.integers(0, 393), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "min_tokens": st.just(1),
    "n": st.integers(1, 2),
}
COMPLETION = BOTH | {
    "echo": st.booleans(),
    "logprobs": st.none() | st.integers(0, 2),
    "prompt": st.sampled_from(["Once", "Grüße", [5, 60, 70]]),
    "truncate_prompt_tokens": st.none() | st.integers(1, 2),
}
CHAT = BOTH | {"logprobs": st.booleans()}


def bodies(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def choices_of(response: httpx.Response, content: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """What the chunks of each choice add up to."""
    found: dict[int, dict[str, Any]] = {}
    for line in response.text.split("\n\n"):
        if not line or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        for choice in chunk["choices"]:
            one = found.setdefault(choice["index"], {"text": "", "logprobs": None, "token_ids": None})
            one["text"] += content(choice)
            one["logprobs"] = _added(one["logprobs"], choice["logprobs"])
            one["token_ids"] = _added(one["token_ids"], choice.get("token_ids"))
            one["finish_reason"], one["stop_reason"] = choice["finish_reason"], choice.get("stop_reason")
            for place in (choice, chunk):
                if "prompt_token_ids" in place:
                    one["prompt_token_ids"] = place["prompt_token_ids"]
    return [found[index] for index in sorted(found)]


def _added(known: Any, new: Any) -> Any:
    if known is None or new is None:
        return new if known is None else known
    if isinstance(new, list):
        return known + new
    return {name: value if value is None else known[name] + value for name, value in new.items()}


def whole_of(response: httpx.Response, content: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    whole = response.json()
    return [
        {
            "text": content(choice),
            "logprobs": choice["logprobs"],
            "token_ids": choice.get("token_ids"),
            "finish_reason": choice["finish_reason"],
            "stop_reason": choice["stop_reason"],
            **{name: place[name] for place in (choice, whole) for name in ("prompt_token_ids",) if name in place},
        }
        for choice in whole["choices"]
    ]


def compare(client: httpx.AsyncClient, path: str, body: dict[str, Any], *contents: Callable[[Any], str]) -> None:
    async def both() -> tuple[httpx.Response, httpx.Response]:
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        return await client.post(path, json=body), await client.post(path, json=body | usage)

    whole, streamed = asyncio.run(both())
    assert whole.status_code == streamed.status_code, streamed.text
    if whole.status_code == 200:
        assert choices_of(streamed, contents[1]) == whole_of(whole, contents[0])
        last = json.loads(streamed.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["usage"] == whole.json()["usage"]


@FUZZ
@given(answer=ANSWERS, tokens_per_step=st.integers(1, 4), body=bodies(COMPLETION))
def test_completions(
    client: httpx.AsyncClient, engine: ScriptedEngine, answer: list[int], tokens_per_step: int, body: dict[str, Any]
) -> None:
    engine.answer, engine.tokens_per_step = answer, tokens_per_step
    text: Callable[[Any], str] = lambda choice: choice["text"]  # noqa: E731
    compare(client, "/v1/completions", {"prompt": "Once"} | body, text, text)


@FUZZ
@given(answer=ANSWERS, tokens_per_step=st.integers(1, 4), body=bodies(CHAT))
def test_chats(
    client: httpx.AsyncClient, engine: ScriptedEngine, answer: list[int], tokens_per_step: int, body: dict[str, Any]
) -> None:
    engine.answer, engine.tokens_per_step = answer, tokens_per_step
    compare(
        client,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hi"}]} | body,
        lambda choice: choice["message"]["content"],
        lambda choice: choice["delta"].get("content", ""),
    )
