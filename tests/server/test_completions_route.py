"""POST /v1/completions without streaming: choices, usage, the ends of answers."""

import asyncio
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, Submitted


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 100} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_an_answer_has_the_shape_that_openai_gives_it(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = 2
    answer = await complete(client)
    num_prompt, num_answer = len(engine.submitted[0].token_ids), len(engine._tokens(engine.submitted[0])) + 1
    assert answer["object"] == "text_completion"
    assert answer["model"] == "small"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,  # the end-of-sequence token counts
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


async def test_max_tokens_defaults_to_sixteen_and_ends_with_length(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = "a" * 50
    answer = await complete(client, max_tokens=None)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16


async def test_the_default_max_tokens_shrinks_for_a_prompt_that_barely_fits(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = "a" * 50
    answer = await complete(client, prompt=[5] * (engine.max_model_len - 3), max_tokens=None)
    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "cd"], ["ab", "cd"]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_every_form_of_prompt_becomes_its_choices(
    client: httpx.AsyncClient, engine: ScriptedEngine, prompt: Any, expected: list[Any]
) -> None:
    answer = await complete(client, prompt=prompt)
    ids = [
        engine.tokenizer.encode(one, add_special_tokens=False).ids if isinstance(one, str) else one for one in expected
    ]
    assert [request.token_ids for request in engine.submitted] == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


async def test_several_prompts_and_answers_are_numbered_as_openai_does(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    def echo_first_token_and_seed(request: Submitted) -> list[int]:
        return engine.tokenizer.encode(f"{request.token_ids[0]}/{request.params.seed}", add_special_tokens=False).ids

    engine.answer = echo_first_token_and_seed
    answer = await complete(client, prompt=[[5], [6]], n=3, seed=40)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["5/40", "5/41", "5/42", "6/40", "6/41", "6/42"]
    assert answer["usage"]["prompt_tokens"] == 2  # a prompt counts once, however many answers it has


async def test_cached_tokens_of_a_prompt_count_once_too(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = 1
    answer = await complete(client, prompt=[[5, 6], [7, 8]], n=3)
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


async def test_a_salt_reaches_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(client, n=2, cache_salt="mine")
    await complete(client)
    assert [request.cache_salt for request in engine.submitted] == ["mine", "mine", ""]


async def test_seeds_stay_within_64_bits(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(client, n=2, seed=2**63 - 1)
    assert [request.params.seed for request in engine.submitted] == [2**63 - 1, -(2**63)]


async def test_sampling_parameters_reach_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(
        client, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=3, presence_penalty=0.3, frequency_penalty=-0.2,
        repetition_penalty=1.2, logit_bias={"12": -100, "5": 1.5}, stop_token_ids=[9], min_tokens=2, ignore_eos=False,
        priority=-3, timeout=2.5, user="me",
    )  # fmt: skip
    params = engine.submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, 3)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.3, -0.2, 1.2)
    assert params.logit_bias == {12: -100.0, 5: 1.5}
    assert (params.stop_token_ids, params.min_tokens, engine.submitted[0].priority) == ((9,), 2, -3)
    assert engine.submitted[0].timeout_s == 2.5


@pytest.mark.parametrize("off", [-1, 0, None])
async def test_top_k_is_off_in_every_spelling(
    client: httpx.AsyncClient, engine: ScriptedEngine, off: int | None
) -> None:
    await complete(client, top_k=off)
    assert engine.submitted[0].params.top_k == 0


async def test_a_stop_string_cuts_the_text_and_aborts_the_request(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = "Hello world, and much more of it"
    answer = await complete(client, stop=["never", "wor"])
    choice = answer["choices"][0]
    assert choice == {"index": 0, "text": "Hello ", "logprobs": None, "finish_reason": "stop", "stop_reason": "wor"}
    assert engine.aborted == [engine.submitted[0].request_id]


async def test_a_stop_string_can_stay_in_the_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await complete(client, stop="wor", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "Hello wor"


async def test_text_held_back_for_a_stop_string_comes_when_the_answer_ends(client: httpx.AsyncClient) -> None:
    answer = await complete(client, stop=["world!!"])
    assert answer["choices"][0]["text"] == "Hello world"


async def test_stop_strings_wait_for_min_tokens(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer = engine.tokenizer.encode("xzxz", add_special_tokens=False).ids
    answer = await complete(client, stop="z", min_tokens=2)
    assert answer["choices"][0]["text"] == "xzx"


@pytest.mark.parametrize(("include", "text"), [(False, "H"), (True, "Hx")])
async def test_a_stop_token_ends_the_text_before_it(
    client: httpx.AsyncClient, engine: ScriptedEngine, include: bool, text: str
) -> None:
    token = engine.tokenizer.token_to_id("x")
    engine.answer = [engine.tokenizer.token_to_id("H"), token, token]
    answer = await complete(client, stop_token_ids=[token], include_stop_str_in_output=include)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["stop_reason"] == token
    assert answer["usage"]["completion_tokens"] == 2


async def test_echo_begins_with_the_prompt(client: httpx.AsyncClient) -> None:
    answer = await complete(client, prompt=["Once ", "Twice "], echo=True)
    assert [choice["text"] for choice in answer["choices"]] == ["Once Hello world", "Twice Hello world"]


async def test_special_tokens_have_no_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    begin, h = engine.tokenizer.token_to_id("<|begin|>"), engine.tokenizer.token_to_id("H")
    engine.answer = [begin, h, begin, h]
    assert (await complete(client))["choices"][0]["text"] == "HH"


async def test_several_tokens_in_one_step_make_the_same_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.tokens_per_step = 4
    engine.answer = "Grüße 🎉, Hello world END and more"
    assert (await complete(client, stop="END"))["choices"][0]["text"] == "Grüße 🎉, Hello world "


async def test_a_request_without_a_model_is_for_the_only_one(client: httpx.AsyncClient) -> None:
    assert (await complete(client, model=None))["model"] == "small"
    assert (await complete(client, model="alias"))["model"] == "alias"


async def test_an_abort_by_the_engine_is_said(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.pause_after = 1
    asking = asyncio.create_task(complete(client))
    await engine.until(lambda: len(engine.submitted) == 1)
    engine.abort(engine.submitted[0].request_id)
    assert (await asking)["choices"][0]["finish_reason"] == "abort"
