"""Whatever is sent, the answer is never a 5xx: the client raises what the application raises."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scripted_engine import ScriptedEngine

from gear_server.anthropic_types import CountTokensRequest, MessagesRequest
from gear_server.openai_types import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from gear_server.responses_types import ResponsesRequest
from gear_server.unsupported import CHAT, COMPLETIONS, MESSAGES, RESPONSES

FIELDS = {
    "/v1/completions": [*CompletionRequest.model_fields, *COMPLETIONS],
    "/v1/chat/completions": [*ChatRequest.model_fields, *CHAT],
    "/v1/responses": [*ResponsesRequest.model_fields, *RESPONSES],
    "/v1/messages": [*MessagesRequest.model_fields, *MESSAGES],
    "/v1/messages/count_tokens": [*CountTokensRequest.model_fields, *MESSAGES],
    "/tokenize": list(TokenizeRequest.model_fields),
    "/detokenize": list(DetokenizeRequest.model_fields),
}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once", "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"prompt": "Once"},
    "/detokenize": {"tokens": [5]},
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.integers(-3, 500)
    | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, 1, -1, 0.0, 1.0, 1e300]) | TEXT
)  # fmt: skip
KEYS = TEXT | st.sampled_from(
    ["role", "content", "type", "text", "include_usage", "name", "5", "-1", "tool_calls", "format", "schema"]
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))
FUZZ = hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120, deadline=None)


def assert_answered(response: httpx.Response) -> None:
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        openais = set() if "type" in response.json() else {"param", "code"}
        assert set(error) == {"message", "type"} | openais
        assert error["message"]


@pytest.mark.parametrize("path", FIELDS)
def test_no_value_of_a_known_field_is_a_500(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    @FUZZ
    @given(fields=st.dictionaries(st.sampled_from(FIELDS[path]), VALUES, min_size=1, max_size=3))
    def fuzz(fields: dict[str, Any]) -> None:
        content = orjson.dumps(VALID[path] | fields)
        headers = {"Content-Type": "application/json"}
        assert_answered(asyncio.run(client.post(path, content=content, headers=headers)))
        assert engine.num_requests == 0

    fuzz()


@pytest.mark.parametrize("path", FIELDS)
def test_no_sequence_of_bytes_is_a_500(client: httpx.AsyncClient, path: str) -> None:
    valid = orjson.dumps(VALID[path])
    cut = st.integers(0, len(valid)).map(lambda end: valid[:end])
    bodies = st.binary(max_size=30) | cut | VALUES.map(orjson.dumps)

    @FUZZ
    @given(content=bodies, content_type=st.sampled_from(["application/json", "application/json; charset=latin-1"]))
    def fuzz(content: bytes, content_type: str) -> None:
        response = asyncio.run(client.post(path, content=content, headers={"Content-Type": content_type}))
        assert_answered(response)

    fuzz()


@pytest.mark.parametrize("prefix", ["/", "/v1/models/"])
def test_no_path_is_a_500(client: httpx.AsyncClient, prefix: str) -> None:
    @FUZZ
    @given(raw=st.binary(max_size=12), method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS"]))
    def fuzz(raw: bytes, method: str) -> None:
        path = prefix + "".join(f"%{byte:02X}" for byte in raw)
        response = asyncio.run(client.request(method, path))
        assert response.status_code < 500

    fuzz()


def test_valid_bodies_are_answered(client: httpx.AsyncClient) -> None:
    """So that the tests above do not pass by refusing everything."""
    post: Callable[[str], Any] = lambda path: client.post(path, json=VALID[path])  # noqa: E731
    assert [asyncio.run(post(path)).status_code for path in VALID] == [200] * len(VALID)
