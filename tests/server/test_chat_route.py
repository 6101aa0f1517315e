"""POST /v1/chat/completions without streaming, and /tokenize, which shows what a conversation becomes."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
from scripted_engine import ScriptedEngine
from small_tokenizers import byte_level, write_model

from gear_server.app import create_app
from gear_server.settings import Settings

USER = {"role": "user", "content": "Hi"}


async def chat(client: httpx.AsyncClient, *messages: dict[str, Any], **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/chat/completions", json={"messages": messages or [USER]} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_an_answer_has_the_shape_that_openai_gives_it(client: httpx.AsyncClient) -> None:
    answer = await chat(client)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hello world", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]


async def test_the_prompt_is_the_rendered_template_with_its_special_tokens_encoded_once(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await chat(client, {"role": "system", "content": "Be kind."}, USER)
    token_ids = engine.submitted[0].token_ids
    text = engine.tokenizer.decode(token_ids, skip_special_tokens=False)
    assert text == "<system>Be kind.<|end|><user>Hi<|end|><assistant>"
    assert token_ids.count(engine.eos) == 2


async def test_only_completions_get_the_special_tokens_that_templates_write_themselves(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", byte_level(), config={"add_bos_token": True})
    engine = ScriptedEngine(folder)
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await chat(client)
        await client.post("/v1/completions", json={"prompt": "Hi"})
        await client.post("/v1/completions", json={"prompt": "Hi", "add_special_tokens": False})
    begin = engine.tokenizer.token_to_id("<|begin|>")
    assert [request.token_ids[0] == begin for request in engine.submitted] == [False, True, False]


async def test_templating_does_not_hold_up_other_requests(tmp_path: Path) -> None:
    slow = "{% for i in range(2000) %}{% for j in range(500) %}{% endfor %}{% endfor %}x"
    engine = ScriptedEngine(write_model(tmp_path / "model", byte_level(), chat_template=slow))
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        chatting = asyncio.create_task(chat(client))
        await asyncio.sleep(0.01)
        assert (await client.get("/health")).status_code == 200
        assert engine.submitted == [], "the template was still at work"
        await chatting


async def test_an_answer_may_fill_what_is_left_of_the_context(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await chat(client)
    request = engine.submitted[0]
    assert request.params.max_tokens == engine.max_model_len - len(request.token_ids)


async def test_max_completion_tokens_wins_over_max_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, max_tokens=5, max_completion_tokens=3)
    await chat(client, max_tokens=5)
    assert [request.params.max_tokens for request in engine.submitted] == [3, 5]


async def test_text_parts_are_accepted_as_content(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await chat(client, {"role": "user", "content": parts}, add_generation_prompt=False)
    text = engine.tokenizer.decode(engine.submitted[0].token_ids, skip_special_tokens=False)
    assert text == "<user>one\ntwo<|end|>"


async def test_fields_of_messages_reach_the_template(tmp_path: Path) -> None:
    template = "{{ messages[0].name }}{{ mood }}"
    folder = write_model(tmp_path / "model", byte_level(), chat_template=template)
    engine = ScriptedEngine(folder)
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        await chat(client, USER | {"name": "Ada"}, chat_template_kwargs={"mood": "!"})
    assert engine.tokenizer.decode(engine.submitted[0].token_ids) == "Ada!"


async def test_a_model_without_template_points_to_completions(tmp_path: Path) -> None:
    engine = ScriptedEngine(write_model(tmp_path / "model", byte_level(), chat_template=None))
    transport = httpx.ASGITransport(create_app(Settings(), engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "this model has no chat template: use /v1/completions"


async def test_what_a_template_refuses_is_a_400_in_its_own_words(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", byte_level(), chat_template="{{ raise_exception('no system role') }}")
    transport = httpx.ASGITransport(create_app(Settings(), ScriptedEngine(folder)))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 400
    assert response.json()["error"]["message"].endswith("no system role")
    assert response.json()["error"]["param"] == "messages"


async def test_tokenize_counts_what_a_chat_request_would_send(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await chat(client)
    response = await client.post("/tokenize", json={"messages": [USER]})
    token_ids = engine.submitted[0].token_ids
    assert response.json() == {
        "count": len(token_ids), "max_model_len": engine.max_model_len, "tokens": token_ids, "token_strs": None,
    }  # fmt: skip


async def test_tokenize_and_detokenize_make_a_round_trip(client: httpx.AsyncClient) -> None:
    text = "Grüße <|end|> 🎉"
    tokens = (await client.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()["tokens"]
    assert (await client.post("/detokenize", json={"tokens": tokens})).json() == {"prompt": text}


async def test_tokenize_says_tokens_as_the_vocabulary_has_them(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/tokenize", json={"prompt": " é<|end|>", "return_token_strs": True})).json()
    assert answer["token_strs"] == ["Ġ", "Ã©", "<|end|>"]


async def test_tokenize_wants_a_prompt_or_messages(client: httpx.AsyncClient) -> None:
    for body in ({}, {"prompt": "a", "messages": [USER]}):
        response = await client.post("/tokenize", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["message"] == "send either prompt or messages"


async def test_detokenize_refuses_ids_that_no_token_has(client: httpx.AsyncClient) -> None:
    for token in (-1, 100_000, 2**40):
        response = await client.post("/detokenize", json={"tokens": [token]})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert message == f"token id {token} is not in the tokenizer's vocabulary"
