"""What requests ask: prompts, their lengths, and rows from files."""

import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from gear_loadtest.errors import UsageError
from gear_loadtest.lengths import Lengths, parse_lengths
from gear_loadtest.rows import Row, read_rows
from gear_loadtest.workload import Vocabulary, Workload


def make_workload(input_len: int = 37, **changes: Any) -> Workload:
    options = {"vocabulary": Vocabulary(), "seed": 5} | changes
    return Workload(Lengths(input_len, input_len), Lengths(7, 7), **options)


def test_a_prompt_has_the_words_asked_for():
    ask = make_workload().ask(0)
    assert (len(ask.prompt.split()), ask.output_len) == (37, 7)
    ask = make_workload(vocabulary=Vocabulary(tokens_per_word=3, num_special_tokens=1)).ask(0)
    assert len(ask.prompt.split()) == 12


def test_no_two_prompts_share_a_beginning_that_a_prefix_cache_could_keep():
    workload = make_workload()
    assert len({tuple(workload.ask(index).prompt.split()[:16]) for index in range(500)}) == 500


def test_the_seed_decides_the_prompts():
    assert make_workload(seed=1).ask(3) == make_workload(seed=1).ask(3)
    assert make_workload(seed=1).ask(3) != make_workload(seed=2).ask(3)


def test_a_shared_prefix_is_shared_and_counts_to_the_length():
    workload = make_workload(prefix_len=20)
    one, other = (workload.ask(index).prompt.split() for index in (0, 1))
    assert len(one) == len(other) == 37
    assert one[:20] == other[:20]
    assert one[20:] != other[20:]
    assert len(make_workload(prefix_len=99).ask(0).prompt.split()) == 37


def test_a_turn_adds_to_what_was_said():
    prompt = make_workload().ask(1, history="said before").prompt
    assert prompt.startswith("said before\n")
    assert len(prompt.split()) == 2 + 37


def test_rows_are_taken_in_turn_and_go_before_the_lengths():
    workload = make_workload(rows=[Row("tell me", None, 3, None), Row(None, 5, None, None)])
    assert (workload.ask(2).prompt, workload.ask(2).output_len) == ("tell me", 3)
    assert (len(workload.ask(1).prompt.split()), workload.ask(1).output_len) == (5, 7)


def test_lengths_spread_as_asked():
    draws = random.Random(1)
    assert {parse_lengths("", "12").draw(draws) for _ in range(5)} == {12}
    assert {parse_lengths("", "uniform:3-5").draw(draws) for _ in range(100)} == {3, 4, 5}
    lognormal = parse_lengths("", "lognormal:500,0.8")
    drawn = [lognormal.draw(draws) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(500, rel=0.03)
    assert statistics.mean(drawn) == pytest.approx(lognormal.mean, rel=0.03)


@pytest.mark.parametrize(
    ("name", "content", "times"),
    [
        ("t.csv", "timestamp,input_len,output_len\n7.5,20,4\n7,10,3\n", [0, 0.5]),
        (
            "azure.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            "2023-11-16 18:15:46.6805900,10,3\n2023-11-16 18:15:47.6805900,20,4\n",
            [0, 1],
        ),
        (
            "mooncake.jsonl",
            '{"timestamp_ms": 500, "input_length": 10, "output_length": 3}\n\n'
            '{"timestamp_ms": 2500, "input_length": 20, "output_length": 4}\n',
            [0, 2],
        ),
    ],
)
def test_a_trace_is_read_in_the_order_of_its_times(tmp_path: Path, name: str, content: str, times: list[float]):
    (tmp_path / name).write_text(content)
    rows = read_rows("--trace", tmp_path / name, with_times=True)
    assert [(row.input_len, row.output_len) for row in rows] == [(10, 3), (20, 4)]
    assert [row.time_s for row in rows] == pytest.approx(times)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("t.csv", "input_len\n1\n", r"line 2: no column timestamp \(seconds or a date\)"),
        ("t.csv", "timestamp\n1\n", "line 2: no column prompt or input_len"),
        ("t.csv", "timestamp,input_len\n1,many\n", "line 2: invalid literal"),
        ("t.jsonl", "{}\n", "line 1: no column"),
        ("t.jsonl", "nonsense\n", "line 1 is not JSON"),
        ("t.jsonl", "\n", "holds no rows"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, name: str, content: str, sentence: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=sentence):
        read_rows("--trace", tmp_path / name, with_times=True)
