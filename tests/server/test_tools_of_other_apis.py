"""Tools, reasoning and JSON schemas through /v1/messages and /v1/responses: translated there and back."""

from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import orjson
import pytest
from live_server import LiveServer
from scripted_engine import ScriptedEngine
from small_tokenizers import byte_level, write_model

from gear_server.app import create_app
from gear_server.settings import Settings

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if tools %}[{{ tools[0].function.name }}]{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# <think></think> #}"
)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>Hm.</think>I look.\n{CALL}\n{CALL}"


@pytest.fixture
def thinker(tmp_path: Path) -> ScriptedEngine:
    """A model that thinks and calls tools; its template knows both."""
    folder = write_model(tmp_path / "model", byte_level(), chat_template=TEMPLATE)
    return ScriptedEngine(folder, answer=ANSWER, max_model_len=2000, tokens_per_step=3)


@pytest.fixture
def live(thinker: ScriptedEngine) -> Any:
    with LiveServer(lambda: create_app(Settings(served_model_name=("small",)), thinker)).running() as server:
        yield server


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.submitted[-1].token_ids, skip_special_tokens=False)


def test_anthropics_client_gets_thinking_text_and_calls_whole_and_streamed(live: LiveServer) -> None:
    body: Any = {
        "model": "small", "max_tokens": 300, "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"name": "get_weather", "description": "Now", "input_schema": SCHEMA}],
    }  # fmt: skip
    with anthropic.Anthropic(base_url=live.url, api_key="x", max_retries=0) as client:
        whole = client.messages.create(**body)
        with client.messages.stream(**body) as stream:
            streamed = stream.get_final_message()
    assert whole.stop_reason == streamed.stop_reason == "tool_use"
    for message in (whole, streamed):
        thinking, text, *calls = message.content
        assert (thinking.type, thinking.thinking) == ("thinking", "Hm.")
        assert (text.type, text.text.strip()) == ("text", "I look.")
        assert [(call.name, call.input) for call in calls] == [("get_weather", {"city": "Paris"})] * 2
        assert len({call.id for call in calls}) == 2


def test_openais_client_gets_reasoning_a_message_and_calls_whole_and_streamed(live: LiveServer) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}]
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client:
        whole = client.responses.create(model="small", input="Weather?", tools=tools)
        with client.responses.stream(model="small", input="Weather?", tools=tools) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    for response in (whole, streamed):
        reasoning, message, *calls = response.output
        assert (reasoning.type, reasoning.content[0].text) == ("reasoning", "Hm.")
        assert (message.type, response.output_text.strip()) == ("message", "I look.")
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", '{"city": "Paris"}')] * 2
        assert response.status == "completed"
    grown = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(grown) == '{"city": "Paris"}' * 2
    done = [event.item.type for event in events if event.type == "response.output_item.done"]
    assert done == ["reasoning", "message", "function_call", "function_call"]
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.id for item in streamed.output}


def test_calls_and_results_go_back_to_the_model_as_it_knows_them(live: LiveServer, thinker: ScriptedEngine) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "18 °C"}]}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, call]},
        {"role": "user", "content": [result]},
    ]
    tools = [{"name": "get_weather", "input_schema": SCHEMA}]
    body = {"max_tokens": 5, "messages": messages, "tools": tools, "tool_choice": {"type": "auto"}}
    assert httpx.post(f"{live.url}/v1/messages", json=body).status_code == 200
    from_messages = prompt_of(thinker)
    items = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "t1", "name": "get_weather", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "t1", "output": "18 °C"},
    ]
    tools = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}]
    response = httpx.post(f"{live.url}/v1/responses", json={"input": items, "tools": tools, "max_output_tokens": 5})
    assert response.status_code == 200, response.text
    assert prompt_of(thinker) == from_messages
    assert "<user>Weather?<|end|><assistant>I look.<tool_call>" in from_messages
    assert "18 °C" in from_messages
    assert "[get_weather]" in from_messages


def test_a_call_cut_by_max_tokens_is_not_given_as_one_that_can_be_made(live: LiveServer) -> None:
    body = {
        "max_tokens": 50, "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [{"name": "get_weather", "input_schema": SCHEMA}],
    }  # fmt: skip
    message = httpx.post(f"{live.url}/v1/messages", json=body).json()
    assert message["stop_reason"] == "max_tokens"
    assert [block["type"] for block in message["content"]] == ["thinking", "text"]


@pytest.mark.parametrize(
    ("path", "choice"),
    [("/v1/messages", {"type": "any"}), ("/v1/messages", {"type": "tool", "name": "get_weather"}),
     ("/v1/responses", "required"), ("/v1/responses", {"type": "function", "name": "get_weather"})],
)  # fmt: skip
def test_a_forced_call_is_a_grammar_for_the_engine(
    live: LiveServer, thinker: ScriptedEngine, path: str, choice: Any
) -> None:
    body: dict[str, Any] = {"tool_choice": choice}
    if path == "/v1/messages":
        tool = {"name": "get_weather", "input_schema": SCHEMA}
        body |= {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "tools": [tool]}
    else:
        tool = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
        body |= {"input": "Hi", "tools": [tool]}
    response = httpx.post(f"{live.url}{path}", json=body)
    assert response.status_code == 200, response.text
    assert "get_weather" in thinker.submitted[-1].params.grammar


def test_a_json_schema_is_a_grammar_for_the_engine(live: LiveServer, thinker: ScriptedEngine) -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9, "output_config": {"format": form}}
    assert httpx.post(f"{live.url}/v1/messages", json=body).status_code == 200
    text = {"format": form | {"name": "city"}}
    response = httpx.post(f"{live.url}/v1/responses", json={"input": "Hi", "text": text})
    assert response.status_code == 200, response.text
    assert response.json()["text"] == text
    for request in thinker.submitted:
        assert "city" in request.params.grammar


def test_an_answer_goes_on_from_a_last_message_of_the_assistant(live: LiveServer, thinker: ScriptedEngine) -> None:
    messages = [{"role": "user", "content": "Name a city."}, {"role": "assistant", "content": "The city of"}]
    response = httpx.post(f"{live.url}/v1/messages", json={"messages": messages, "max_tokens": 9})
    assert response.status_code == 200, response.text
    assert prompt_of(thinker).endswith("<assistant>The city of")


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/v1/messages", {"tool_choice": {"type": "tool", "name": "f"}},
         "tool_choice names a function that is not among the tools"),
        ("/v1/messages", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "tools[0].type must be 'custom', got 'web_search_20250305'"),
        ("/v1/responses", {"tools": [], "tool_choice": "required"}, "tool_choice is only for requests with tools"),
    ],
)  # fmt: skip
async def test_what_no_tool_can_do_is_refused(
    client: httpx.AsyncClient, path: str, fields: dict[str, Any], message: str
) -> None:
    body: dict[str, Any] = {"input": "Hi"}
    if path == "/v1/messages":
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}
        body["tools"] = [{"name": "get_weather", "input_schema": SCHEMA}]
    response = await client.post(
        path, content=orjson.dumps(body | fields), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message
