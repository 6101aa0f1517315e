"""Bad requests are refused in OpenAI's shape, by a sentence that names the parameter; never with a 500."""

from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine

from gear_server.json_body import MAX_BODY_BYTES

COMPLETION = {"prompt": "Once", "max_tokens": 5}
USER = {"role": "user", "content": "Hi"}
JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature must be greater than or equal to 0, got -1"),
        ("temperature", "hot", "temperature must be a valid number, got 'hot'"),
        ("temperature", True, "temperature must be a valid number, got True"),
        ("top_p", 0, "top_p must be greater than 0, got 0"),
        ("top_p", 1.5, "top_p must be less than or equal to 1, got 1.5"),
        ("top_k", -2, "top_k must be greater than or equal to -1, got -2"),
        ("max_tokens", -1, "max_tokens must be greater than or equal to 0, got -1"),
        ("max_tokens", 2.5, "max_tokens must be a valid integer, got 2.5"),
        ("max_tokens", 10**30, "max_tokens must be a valid integer, got 1e+30"),
        ("n", 129, "n must be less than or equal to 128, got 129"),
        ("seed", 2**63, "seed must be less than or equal to 9223372036854775807, got 9223372036854775808"),
        ("stream", "yes", "stream must be a valid boolean, got 'yes'"),
        ("stop", 5, "stop must be a string or a list of strings"),
        ("stop", [""], "each string in stop must have 1 to 1024 characters"),
        ("stop", ["a"] * 17, "stop takes at most 16 strings, got 17"),
        ("prompt", None, "prompt is required"),
        ("prompt", 7, "prompt must be a string, a list of strings, token ids, or a list of lists of ids"),
        ("prompt", [], "prompt must be a string, a list of strings, token ids, or a list of lists of ids"),
        ("prompt", ["a", [1]], "prompt must be a string, a list of strings, token ids, or a list of lists of ids"),
        ("prompt", [True], "prompt must be a string, a list of strings, token ids, or a list of lists of ids"),
        ("prompt", "", "the prompt is empty: send at least one token"),
        ("prompt", [[]], "the prompt is empty: send at least one token"),
        ("prompt", [10**6], "token id 1000000 is outside the vocabulary (0 to 393)"),
        ("logit_bias", {"hello": 1}, "the keys of logit_bias must be token ids, got 'hello'"),
        ("logit_bias", {"9" * 5000: 1}, f"the keys of logit_bias must be token ids, got '{'9' * 40}'"),
        ("logit_bias", {"5": "much"}, "logit_bias of token 5 must be a number"),
        ("logit_bias", {"5": 101}, "logit_bias of token 5 must be between -100 and 100, got 101.0"),
        ("min_tokens", 6, "min_tokens must be between 0 and max_tokens (5), got 6"),
        ("stop_token_ids", [10**6], "stop token id 1000000 is outside the vocabulary (0 to 393)"),
        ("priority", 2**31, "priority must be less than or equal to 2147483647, got 2147483648"),
        ("timeout", 0, "timeout must be greater than 0, got 0"),
        ("stream_options", {"include_usage": True}, "stream_options is only for requests with stream set to true"),
        ("cache_salt", 5, "cache_salt must be a valid string, got 5"),
    ],
)
async def test_a_wrong_value_is_named_in_one_sentence(
    client: httpx.AsyncClient, engine: ScriptedEngine, field: str, value: Any, message: str
) -> None:
    error = error_of(await client.post("/v1/completions", json=COMPLETION | {field: value}))
    assert (error["message"], error["param"], error["type"]) == (message, field, "invalid_request_error")
    assert engine.num_requests == 0


@pytest.mark.parametrize(
    ("messages", "message", "param"),
    [
        (None, "messages is required", "messages"),
        ("Hi", "messages must be a valid list, got 'Hi'", "messages"),
        ([{"role": "user"}], "content is required, except beside tool_calls", "messages[0].content"),
        ([USER, {"content": "x"}], "messages[1].role is required", "messages[1].role"),
        ([{"role": "user", "content": 5}], "messages[0].content: must be a string or a list of parts",
         "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
         "messages[0].content: parts of type 'image_url' are not supported yet, only text", "messages[0].content"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
         "messages[0].tool_calls[0].function is required", "messages[0].tool_calls[0].function"),
    ],
)  # fmt: skip
async def test_a_wrong_message_is_named_with_its_place(
    client: httpx.AsyncClient, messages: Any, message: str, param: str
) -> None:
    error = error_of(await client.post("/v1/chat/completions", json={"messages": messages}))
    assert (error["message"], error["param"]) == (message, param)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "suffix", "the end"),
        ("/v1/chat/completions", "functions", [{"name": "f"}]),
        ("/v1/chat/completions", "modalities", ["text", "audio"]),
        ("/v1/chat/completions", "chat_template", "{{ 1 }}"),
        ("/v1/chat/completions", "echo", True),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    client: httpx.AsyncClient, path: str, field: str, value: Any
) -> None:
    body = COMPLETION if path == "/v1/completions" else {"messages": [USER]}
    error = error_of(await client.post(path, json=body | {field: value}))
    assert error["message"] == f"{field} is not supported yet: leave it out"
    assert error["param"] == field


async def test_values_that_ask_for_nothing_are_fine(client: httpx.AsyncClient) -> None:
    nothing = {
        "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "modalities": ["text"], "functions": None, "stop": None, "temperature": None, "stream_options": None,
    }  # fmt: skip
    response = await client.post("/v1/chat/completions", json={"messages": [USER]} | nothing)
    assert response.status_code == 200, response.text


async def test_unknown_fields_are_tolerated_and_logged(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "gear_server"):
        response = await client.post("/v1/completions", json=COMPLETION | {"wibble": 1, "metadata": {}})
    assert response.status_code == 200
    assert "ignored fields: metadata, wibble" in caplog.text


NOT_JSON = [
    b"{",
    b"",
    b"nonsense",
    b'{"prompt": NaN}',
    b'{"temperature": Infinity}',
    b'{"temperature": 1e999}',
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b"[" * 5000,
]


@pytest.mark.parametrize("content", NOT_JSON)
async def test_a_body_that_is_not_json_is_a_400(client: httpx.AsyncClient, content: bytes) -> None:
    error = error_of(await client.post("/v1/completions", content=content, headers=JSON))
    assert "JSON" in error["message"]


@pytest.mark.parametrize("content", [b"[]", b"5", b'"text"', b"null"])
async def test_a_body_that_is_no_object_is_a_400(client: httpx.AsyncClient, content: bytes) -> None:
    error = error_of(await client.post("/v1/completions", content=content, headers=JSON))
    assert error["message"] == "the body must be a JSON object" or content == b"null"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_only_json_bodies_are_read_so_that_no_web_page_can_send_one_unasked(
    client: httpx.AsyncClient, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    response = await client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    assert "Content-Type: application/json" in error_of(response, 415)["message"]


async def test_a_body_over_the_limit_is_a_413_announced_or_not(client: httpx.AsyncClient) -> None:
    async def pieces() -> Any:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    announced = JSON | {"Content-Length": str(MAX_BODY_BYTES + 1)}
    assert "32 MiB" in error_of(await client.post("/v1/completions", content=b"", headers=announced), 413)["message"]
    assert "32 MiB" in error_of(await client.post("/v1/completions", content=pieces(), headers=JSON), 413)["message"]


async def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": [5] * 300, "max_tokens": 5}))
    assert "300 tokens" in error["message"]
    assert str(engine.max_model_len) in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


async def test_a_conversation_that_is_too_long_names_messages(client: httpx.AsyncClient) -> None:
    body = {"messages": [{"role": "user", "content": "x1" * 300}]}
    assert error_of(await client.post("/v1/chat/completions", json=body))["param"] == "messages"


async def test_a_huge_prompt_is_refused_without_encoding_it(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": "x" * 20_000_000}))
    assert "20000000 characters" in error["message"]
    assert error["code"] == "context_length_exceeded"


async def test_an_unknown_model_is_a_404_that_names_the_served_ones(client: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/completions", COMPLETION),
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        error = error_of(await client.post(path, json=body | {"model": "gpt-9"}), 404)
        assert error["message"] == "the model 'gpt-9' is not served here; served: small, alias"
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/images/generations", "images"),
        ("/v1/audio/transcriptions", "audio"),
        ("/v1/assistants", "assistants"),
        ("/v1/responses/resp_1", "stored responses"),
    ],
)
async def test_what_only_other_servers_have_is_refused_by_name(client: httpx.AsyncClient, path: str, what: str) -> None:
    for response in (await client.get(path), await client.post(path, json={"input": "Hi"})):
        error = error_of(response, 404)
        assert error["message"].startswith(f"{what} are not served here")
        assert error["code"] == "not_supported"
