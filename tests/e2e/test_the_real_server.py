"""The way a newcomer goes: start the real server with the real model, ask it, and look at what it saved."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.e2e.serving import MODEL, free_port, serve

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] == name)


def test_the_capital_of_france_is_paris_plain_and_streamed(url: str) -> None:
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 32}
    plain = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert "Paris" in plain["choices"][0]["message"]["content"]
    assert plain["choices"][0]["finish_reason"] == "stop"
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as stream:
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])
    assert text == plain["choices"][0]["message"]["content"]


def test_the_openai_client_works(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        completion = client.completions.create(model=MODEL, prompt="The sky is", max_tokens=5, temperature=0)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 5
        assert [model.id for model in client.models.list()] == [MODEL]


def test_a_long_prompt_is_held_compressed_and_metrics_say_so(url: str) -> None:
    assert metric(url, "gear_kv_compression_ratio") > 3.2
    body = {"model": MODEL, "prompt": "one two three four " * 200, "max_tokens": 4, "temperature": 0}
    usage = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]
    assert usage["prompt_tokens"] > 700
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "max_tokens": 64, "stream": True}) as stream:
        events = stream.iter_lines()
        next(events)
        held = metric(url, "gear_kv_bytes")
        assert list(events)
    # Seven pages of 128 tokens and an open one hold at most 13 slots, far below bf16's 23 kB a token.
    assert 0 < held < usage["prompt_tokens"] * 23040 / 1.8
    assert metric(url, "gear_kv_peak_bytes") >= held
    assert metric(url, "gear_kv_tokens") == 0
    assert metric(url, "gear_prompt_tokens_total") >= usage["prompt_tokens"]
    errors = httpx.get(f"{url}/metrics").text.split("\ngear_page_error_ratio{")[1:]
    assert errors
    assert all(0.001 < float(line.split("} ")[1].split("\n")[0]) < 0.3 for line in errors)


def test_a_system_prompt_is_computed_once_and_metrics_say_so(url: str) -> None:
    hits, cached = metric(url, "gear_prefix_hits_total"), metric(url, "gear_cached_tokens_total")
    system = {"role": "system", "content": "You name capitals. " + "Answer with one word. " * 60}
    found = []
    for country in ("France", "Italy"):
        messages = [system, {"role": "user", "content": f"What is the capital of {country}?"}]
        body = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 4}
        usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
        found.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, 256]  # of 340 tokens or so, in pages of 128
    assert metric(url, "gear_prefix_hits_total") - hits == 1
    assert metric(url, "gear_cached_tokens_total") - cached == 256
    assert 'gear_pages{model="' + MODEL + '",state="cached"} 0.0' not in httpx.get(f"{url}/metrics").text


def test_eight_prompts_at_once_share_their_steps(url: str) -> None:
    before = metric(url, "gear_step_seconds_count")
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(f"{url}/v1/completions", json=body, timeout=120), range(8)))
    assert all(answer.json()["usage"]["completion_tokens"] == 24 for answer in answers)
    assert metric(url, "gear_step_seconds_count") - before < 4 * 24  # one after the other: 8 × 24


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["/no/such/model"], "no such model folder"),
        (["--memory", "100MiB"], "raise --memory"),
        (["--preset", "best"], "near-lossless"),
        (["--host", "0.0.0.0"], "--api-key"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence(arguments: list[str], remedy: str) -> None:
    process = serve("--port", str(free_port()), *arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert remedy in output
    assert "Traceback" not in output
