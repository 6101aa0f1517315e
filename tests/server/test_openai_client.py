"""The official client, against a real socket, gets what it expects from OpenAI."""

from collections.abc import Iterator

import openai
import pytest
from live_server import LiveServer
from scripted_engine import ScriptedEngine

from gear_server.app import create_app
from gear_server.settings import Settings


@pytest.fixture
def live(engine: ScriptedEngine) -> Iterator[LiveServer]:
    settings = Settings(served_model_name=("small",), api_key=("key",))
    with LiveServer(lambda: create_app(settings, engine)).running() as server:
        yield server


@pytest.fixture
def client(live: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_chat_answers_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model="small", messages=messages)  # type: ignore[call-overload]
    assert whole.choices[0].message.content == "Hello world"
    assert whole.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model="small", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.usage == whole.usage
    assert last.usage.prompt_tokens_details.cached_tokens == 0


def test_completions_answer_whole_and_as_a_stream(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="small", prompt=["a", "b"], n=2, max_tokens=50)
    assert [choice.text for choice in whole.choices] == ["Hello world"] * 4
    stream = client.completions.create(model="small", prompt="a", max_tokens=50, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world"


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "gearserve"


def test_refusals_become_the_clients_own_exceptions(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="small", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.max_requests = 0
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(model="small", prompt="a")
    assert full.value.response.headers["retry-after"] == "7"


def test_an_error_in_a_stream_is_raised_by_the_client(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.error_after = 1
    stream = client.completions.create(model="small", prompt="a", max_tokens=50, stream=True)
    with pytest.raises(openai.APIError, match="NaN logits"):
        list(stream)
