"""Log-probabilities, token ids, best_of and the other parameters that tell or choose more than the text."""

import math
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine, Submitted, logprobs_of

MINUS = "best_of must be at least n (3), got 2"


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 100} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def ids(engine: ScriptedEngine, text: str) -> list[int]:
    found: list[int] = engine.tokenizer.encode(text, add_special_tokens=False).ids
    return found


def text(engine: ScriptedEngine, token: int) -> str:
    return engine.tokenizer.decode([token], skip_special_tokens=False)


async def test_logprobs_are_four_lists_with_the_token_that_ended_the_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.answer = ids(engine, "Hello world")
    answer = await complete(client, logprobs=1)
    tokens = [*engine.answer, engine.eos]
    lists = answer["choices"][0]["logprobs"]
    assert lists["tokens"] == [text(engine, token) for token in tokens]
    assert lists["token_logprobs"] == [-0.5 - token for token in tokens]
    assert lists["top_logprobs"][0] == {
        text(engine, tokens[0] - 1): -0.25,
        text(engine, tokens[0]): -0.5 - tokens[0],
    }
    assert lists["text_offset"] == [sum(map(len, lists["tokens"][:i])) for i in range(len(tokens))]
    assert "".join(lists["tokens"][:-1]) == answer["choices"][0]["text"]


async def test_logprobs_zero_tell_only_the_tokens_own(client: httpx.AsyncClient) -> None:
    lists = (await complete(client, logprobs=0))["choices"][0]["logprobs"]
    assert [list(top) for top in lists["top_logprobs"]] == [[token] for token in lists["tokens"]]


async def test_an_echoed_prompt_has_logprobs_too_and_its_first_token_none(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    prompt = ids(engine, "Once upon")
    choice = (await complete(client, prompt=prompt, echo=True, logprobs=1))["choices"][0]
    lists = choice["logprobs"]
    assert lists["token_logprobs"][: len(prompt)] == [None, *(-0.5 - token for token in prompt[1:])]
    assert lists["top_logprobs"][0] is None
    assert "".join(lists["tokens"][:-1]) == choice["text"] == "Once uponHello world"
    assert lists["text_offset"][0] == 0


async def test_max_tokens_zero_with_echo_is_only_about_the_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    answer = await complete(client, prompt="Once upon", echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Once upon", "length")
    assert "".join(choice["logprobs"]["tokens"]) == "Once upon"
    assert answer["usage"]["completion_tokens"] == 0
    assert engine.submitted[0].params.max_tokens == 1


async def test_prompt_logprobs_have_vllms_shape(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    prompt = [9, 30]
    choice = (await complete(client, prompt=prompt, prompt_logprobs=1))["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "30": {"logprob": -30.5, "rank": 2, "decoded_token": text(engine, 30)},
            "29": {"logprob": -0.25, "rank": 1, "decoded_token": text(engine, 29)},
        },
    ]
    assert choice["logprobs"] is None


async def test_an_echo_and_prompt_logprobs_may_ask_for_different_numbers(client: httpx.AsyncClient) -> None:
    choice = (await complete(client, prompt=[9, 30], echo=True, logprobs=0, prompt_logprobs=2))["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 1
    assert len(choice["prompt_logprobs"][1]) == 2


async def test_token_ids_are_returned_when_asked_for(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await complete(client, prompt=[[5], [6]], return_token_ids=True)
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[5], [6]]
    assert answer["choices"][0]["token_ids"] == [*ids(engine, "Hello world"), engine.eos]
    assert len(answer["choices"][0]["token_ids"]) * 2 == answer["usage"]["completion_tokens"]


async def test_tokens_end_where_the_stop_string_does(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.answer, engine.tokens_per_step = ids(engine, "xyzabc"), 4
    answer = await complete(client, stop="z", return_token_ids=True, logprobs=0)
    assert answer["choices"][0]["token_ids"] == ids(engine, "xyz")
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 3
    assert answer["usage"]["completion_tokens"] == 3


async def test_tokens_may_be_called_by_their_ids(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await complete(client, logprobs=0, return_tokens_as_token_ids=True)
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert tokens == [f"token_id:{token}" for token in [*ids(engine, "Hello world"), engine.eos]]


async def test_best_of_sends_the_answers_whose_tokens_are_likeliest(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    """The lower a token's id, the likelier it is to the scripted engine; the end counts too."""

    def by_seed(request: Submitted) -> list[int]:
        return [20 + 10 * (request.params.seed or 0)] * 3

    engine.answer = by_seed
    answer = await complete(client, prompt=[[5], [6]], seed=1, n=2, best_of=4, return_token_ids=True)
    assert [choice["token_ids"][0] for choice in answer["choices"]] == [30, 40, 30, 40]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[5], [5], [6], [6]]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 8 * 4  # what was drawn, as OpenAI counts


async def test_special_tokens_may_be_shown(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    begin = engine.tokenizer.token_to_id("<|begin|>")
    engine.answer = [begin, *ids(engine, "Hi")]
    answer = await complete(client, skip_special_tokens=False)
    assert answer["choices"][0]["text"] == "<|begin|>Hi"  # the one that ended the answer is no part of it


@pytest.mark.parametrize(("keep", "num_kept"), [(3, 3), (100, 50), (-1, 50), (None, 50)])
async def test_a_prompt_is_cut_only_when_asked(
    client: httpx.AsyncClient, engine: ScriptedEngine, keep: int | None, num_kept: int
) -> None:
    prompt = list(range(10, 60))
    answer = await complete(client, prompt=prompt, truncate_prompt_tokens=keep, echo=True)
    assert engine.submitted[0].token_ids == prompt[-num_kept:]
    assert answer["usage"]["prompt_tokens"] == num_kept
    assert answer["choices"][0]["text"].startswith(engine.tokenizer.decode(prompt[-num_kept:])[:1])


async def test_minus_one_keeps_what_leaves_room_for_the_answer(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await complete(client, prompt="x1" * 900, truncate_prompt_tokens=-1, max_tokens=20)
    assert len(engine.submitted[0].token_ids) == engine.max_model_len - 20


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"logprobs": 21}, "logprobs must be less than or equal to 20, got 21", "logprobs"),
        ({"logprobs": True}, "logprobs must be a valid integer, got True", "logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs is not for streams: set stream to false",
         "prompt_logprobs"),
        ({"n": 3, "best_of": 2}, MINUS, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of above n is not for streams: the best is known at the end", "best_of"),
        ({"max_tokens": 0}, "max_tokens must be at least 1 without echo, got 0", "max_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be -1 or at least 1, got 0",
         "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens must be greater than or equal to -1, got -2",
         "truncate_prompt_tokens"),
        ({"suffix": "the end"}, "suffix is not supported yet: leave it out", "suffix"),
    ],
)  # fmt: skip
async def test_what_does_not_go_together_is_refused(
    client: httpx.AsyncClient, body: dict[str, Any], message: str, param: str
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "Once"} | body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["message"], error["param"]) == (message, param)


async def test_an_impossible_token_has_a_number_that_json_can_hold(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = logprobs_of(5, 1)
    monkeypatch.setattr("scripted_engine.logprobs_of", lambda token, num_top: type(told)(-math.inf, 9, []))
    lists = (await complete(client, logprobs=0))["choices"][0]["logprobs"]
    assert set(lists["token_logprobs"]) == {-9999.0}
