"""Chats with tools and with models that think: what reaches the template, and what the answer is made of."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine
from small_tokenizers import byte_level, write_model
from tokenizers import AddedToken

from gear_server.app import create_app
from gear_server.settings import Settings

USER = {"role": "user", "content": "Weather?"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(autouse=True)
def room_for_tools(engine: ScriptedEngine) -> None:
    engine.max_model_len = 4000


def serve(folder: Path, template: str, *, special: tuple[str, ...] = (), **engine: Any) -> tuple[Any, ScriptedEngine]:
    """A client of a server whose model has that chat template and those special tokens."""
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    scripted = ScriptedEngine(write_model(folder / "model", tokenizer, chat_template=template), **engine)
    transport = httpx.ASGITransport(create_app(Settings(), scripted))
    return httpx.AsyncClient(transport=transport, base_url="http://test"), scripted


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"messages": [USER]} | body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


async def streamed(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """The message and the end that a stream's deltas add up to."""
    response = await client.post("/v1/chat/completions", json={"messages": [USER], "stream": True} | body)
    message: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    end = None
    for line in response.text.split("\n\n"):
        if not line or line == "data: [DONE]":
            continue
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        end = choice["finish_reason"] or end
        for name, value in choice["delta"].items():
            if name == "tool_calls":
                for piece in value:
                    if "id" in piece:
                        calls.append({"id": "", "type": piece["type"], "function": dict(piece["function"])})
                    else:
                        calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
            else:
                message[name] = message.get(name, "") + value
    return {"message": message | ({"tool_calls": calls} if calls else {}), "finish_reason": end}


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    message = {k: v for k, v in choice["message"].items() if k != "refusal"}
    message["content"] = message["content"] or ""
    for call in message.get("tool_calls", ()):
        call["id"] = ""
    return {"message": message, "finish_reason": choice["finish_reason"]}


def prompt_of(engine: ScriptedEngine, i: int = 0) -> str:
    text: str = engine.tokenizer.decode(engine.submitted[i].token_ids, skip_special_tokens=False)
    return text


async def test_a_call_is_a_tool_call_of_the_message_and_the_reason_it_ended(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = CALL
    choice = await chat(client, tools=[WEATHER])
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert call["id"].startswith("call_")


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
@pytest.mark.parametrize(
    ("answer", "more"),
    [
        (CALL, {}),
        (f"I look.\n{CALL}\n{CALL}", {}),
        (f"{CALL}\n{CALL}", {"parallel_tool_calls": False}),
        ("No tool at all <tool_", {}),
        (CALL, {"max_tokens": 20}),
        (CALL, {"stop": "Paris"}),
    ],
)
async def test_a_streamed_answer_with_tools_equals_the_whole_one(
    client: httpx.AsyncClient, engine: ScriptedEngine, answer: str, more: dict[str, Any], tokens_per_step: int
) -> None:
    engine.answer, engine.tokens_per_step = answer, tokens_per_step
    whole = await chat(client, tools=[WEATHER], **more)
    assert await streamed(client, tools=[WEATHER], **more) == without_ids(whole)


async def test_one_call_at_a_time_when_asked(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = f"{CALL}\n{CALL}"
    assert len((await chat(client, tools=[WEATHER]))["message"]["tool_calls"]) == 2
    assert len((await chat(client, tools=[WEATHER], parallel_tool_calls=False))["message"]["tool_calls"]) == 1


async def test_a_call_that_was_cut_says_length(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = CALL
    choice = await chat(client, tools=[WEATHER], max_tokens=50)
    assert choice["finish_reason"] == "length"


async def test_without_tools_or_with_none_a_call_is_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = CALL
    for body in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        choice = await chat(client, **body)
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    assert "get_weather" not in prompt_of(engine, 1)


async def test_a_template_that_knows_no_tools_is_told_of_them_in_words(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        USER,
        {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": "Rain"},
    ]  # fmt: skip
    await chat(client, messages=messages, tools=[WEATHER], max_tokens=50)
    prompt = prompt_of(engine)
    assert prompt.startswith("<system>Be brief.\n\n# Tools")
    assert json.dumps(WEATHER) in prompt
    assert f"<assistant>{CALL}" in prompt
    assert "<user><tool_response>\nRain\n</tool_response>" in prompt


async def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects(tmp_path: Path) -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    client, engine = serve(tmp_path, template)
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "Rain"}]
    await chat(client, messages=messages, tools=[WEATHER, ADD])
    assert prompt_of(engine) == "[get_weather][add]<assistant><tool_call>Paris<tool>Rain"
    await chat(client, messages=messages)
    assert prompt_of(engine, 1) == "<assistant><tool_call>Paris<tool>Rain"


async def test_a_template_that_knows_developers_keeps_them(tmp_path: Path) -> None:
    client, engine = serve(tmp_path, "{# developer #}{{ messages[0].role }}")
    await chat(client, messages=[{"role": "developer", "content": "x"}])
    assert prompt_of(engine) == "developer"


async def test_markers_that_are_special_tokens_are_seen_and_not_shown(tmp_path: Path) -> None:
    client, engine = serve(tmp_path, "[TOOL_CALLS]{{ tools }}", special=("[TOOL_CALLS]",))
    engine.answer = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]'
    choice = await chat(client, tools=[ADD])
    assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == ['{"a": 1}']


THINKING = "{{ '<think>' if add_generation_prompt and not quiet else '</think>' }}"


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")])
@pytest.mark.parametrize(
    ("template", "answer", "reasoning", "content"),
    [
        (THINKING, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("<think></think>?", "<think>\nHm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("<think></think>?", "Yes.", None, "Yes."),
        ("no such thing", "<think>Hm.", None, "<think>Hm."),
    ],
)
async def test_reasoning_is_told_apart_whole_and_streamed(
    tmp_path: Path, template: str, answer: str, reasoning: str | None, content: str, special: tuple[str, ...]
) -> None:
    client, _ = serve(tmp_path, template, special=special, answer=answer)
    if special and reasoning is None and "<think>" in answer:
        content = "Hm."  # a special token like any other
    whole = await chat(client)
    assert whole["message"].get("reasoning_content") == reasoning
    assert whole["message"]["content"] == content
    assert await streamed(client) == without_ids(whole)


async def test_template_kwargs_may_turn_thinking_off(tmp_path: Path) -> None:
    client, _ = serve(tmp_path, THINKING, answer="Yes.")
    assert (await chat(client, chat_template_kwargs={"quiet": True}))["message"]["content"] == "Yes."


async def test_the_last_message_may_be_gone_on_with(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    messages = [USER, {"role": "assistant", "content": "It is "}]
    await chat(client, messages=messages, continue_final_message=True)
    assert prompt_of(engine).endswith("<assistant>It is ")


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice is only for requests with tools", "tool_choice"),
        ({"tools": [ADD], "tool_choice": "any"},
         'tool_choice must be "auto", "none", "required" or {"type": "function", "function": {"name": "…"}}',
         "tool_choice"),
        ({"guided_json": 5}, "guided_json: must be a JSON schema: an object, or its text", "guided_json"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}},
         "tool_choice names a function that is not among the tools", "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]},
         "tools[0].function.name: String should match pattern '^[\\w.-]+$'", "tools[0].function.name"),
        ({"continue_final_message": True, "add_generation_prompt": True},
         "continue_final_message goes on with the last message: leave add_generation_prompt out",
         "continue_final_message"),
        ({"top_logprobs": 2}, "top_logprobs is only for requests with logprobs set to true", "top_logprobs"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
         "messages[0].tool_calls: the arguments of a are not valid JSON: Expecting property name enclosed in double "
         "quotes: line 1 column 2 (char 1)", "messages[0].tool_calls"),
        ({"response_format": {"type": "json_schema"}}, "response_format of type json_schema needs json_schema",
         "response_format"),
        ({"guided_regex": "(a"}, None, "guided_regex"),
        ({"structured_outputs": {"json": {"type": "wat"}}}, "structured_outputs cannot be followed: at 2(7): failed to "
         "compile JSON schema: Invalid type: wat",
         "structured_outputs"),
        ({"structured_outputs": {"json": {"not": {}}}}, None, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, None, "structured_outputs"),
        ({"structured_outputs": {"grammar": "nothing like a grammar"}}, None, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag is not supported yet: leave it out",
         "structured_outputs.structural_tag"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}},
         "response_format and guided_choice both say what the answer looks like: send one of them", "guided_choice"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True},
         "ignore_eos contradicts structured output, whose end the grammar decides", "ignore_eos"),
    ],
)  # fmt: skip
async def test_what_cannot_be_is_refused_by_name(
    client: httpx.AsyncClient, engine: ScriptedEngine, body: dict[str, Any], message: str | None, param: str
) -> None:
    response = await client.post("/v1/chat/completions", json={"messages": [USER]} | body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in (None, error["message"])
    assert not engine.submitted


async def test_chat_logprobs_have_tokens_bytes_and_alternatives(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = "é"
    choice = await chat(client, logprobs=True, top_logprobs=2, return_token_ids=True)
    content = choice["logprobs"]["content"]
    assert bytes(byte for entry in content[:-1] for byte in entry["bytes"]).decode() == "é"
    assert content[-1]["token"] == "<|end|>"
    assert len(content) == len(choice["token_ids"])
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}


async def test_a_chats_prompt_logprobs_and_ids_belong_to_the_response(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    body = {"messages": [USER], "prompt_logprobs": 0, "return_token_ids": True}
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    assert whole["prompt_token_ids"] == engine.submitted[0].token_ids
    assert len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"])
    assert whole["prompt_logprobs"][0] is None
