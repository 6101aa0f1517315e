"""Each example runs as its reader would run it, against the real server and model, and says what it should."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GEAR_")}


def run(url: str, *command: str) -> str:
    result = subprocess.run(
        command, cwd=EXAMPLES, env=ENVIRONMENT | {"GEAR_URL": url}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "openai_client.py",
            [
                "whole: The capital of France is Paris.",
                "stream: The capital of Japan is Tokyo.",
                "response: The capital of Germany is Berlin.",
            ],
        ),
        ("anthropic_client.py", ["tokens: 27\nThe capital of France is Paris.\nend_turn 27 8"]),
        ("tools.py", ["the model calls: get_weather {'city': 'Paris'}", "the model answers: "]),
        (
            "json_schema.py",
            [
                "schema: name='Paris' country='France' is_capital=True",
                "choice: yes",
                "pattern: The capital of Japan is Tokyo.",
            ],
        ),
        ("langchain_chat.py", ["invoke: The capital of France is Paris.", "stream: The capital of Japan is Tokyo."]),
    ],
)
def test_a_python_client_gets_its_answers(url: str, name: str, said: list[str]) -> None:
    output = run(url, sys.executable, name)
    for line in said:
        assert line in output


def test_the_javascript_client_gets_answers_and_may_stop_a_stream(url: str) -> None:
    assert shutil.which("node"), "install it: make javascript"
    assert (EXAMPLES / "node_modules").is_dir(), "install its client: make javascript"
    output = run(url, "node", "openai_client.mjs")
    assert "whole: The capital of France is Paris." in output
    assert "stopped after 20 chunks" in output
    assert "response: The capital of Japan is Tokyo." in output


def test_curl_shows_chat_stream_logprobs_tokens_and_a_refusal(url: str) -> None:
    output = run(url, "bash", "curl.sh")
    parts = [part.split("\n", 1)[1].strip() for part in output.split("== ")[1:]]
    chat, stream, completion, tokens, refusal = parts
    assert "Paris" in json.loads(chat)["choices"][0]["message"]["content"]
    assert stream.endswith("data: [DONE]")
    logprobs = json.loads(completion)["choices"][0]["logprobs"]
    assert [len(likeliest) for likeliest in logprobs["top_logprobs"]] == [2, 2]
    assert json.loads(tokens)["count"] == 2
    assert "embeddings" in json.loads(refusal)["error"]["message"]


def test_every_example_is_listed_and_run() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".mjs", ".sh")]
    assert len(names) >= 7
    for name in names:
        assert f"`{name}`" in listed
        assert f'"{name}"' in tested
