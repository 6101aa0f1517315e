from pathlib import Path
from typing import Any

import pytest

from gear_loadtest.errors import UsageError
from gear_loadtest.plan import LoadPlan, refuse_flood, resolve
from gear_loadtest.rows import Row
from gear_loadtest.target import parse_target


def make_plan(**changes: Any) -> LoadPlan:
    return LoadPlan(**changes)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_a_base_url_may_end_in_v1(suffix: str):
    assert parse_target("http://127.0.0.1:8000" + suffix).url("/v1/models") == "http://127.0.0.1:8000/v1/models"
    assert parse_target("https://example.org/llm" + suffix).base_url == "https://example.org/llm"


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://[::1", "http://h?x=1"],
)
def test_what_is_no_base_url_is_refused_with_an_example(url: str):
    with pytest.raises(UsageError, match=r"such as http://127\.0\.0\.1:8000"):
        parse_target(url)


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(UsageError, match="GEAR_API_KEY") as refusal:
        parse_target("http://me:secret@127.0.0.1:8000")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.8.9.1:1", "http://[::1]:1", "https://example.org"])
def test_this_machine_and_encrypted_targets_take_any_load(url: str):
    refuse_flood(make_plan(rate=1000), parse_target(url), [], own_target=False)
    refuse_flood(make_plan(concurrency=1000), parse_target(url), [], own_target=False)


@pytest.mark.parametrize("url", ["http://example.org", "http://10.0.0.1:8000", "http://localhost.example.org"])
def test_a_flood_on_a_stranger_needs_a_promise(url: str):
    target = parse_target(url)
    for allowed in (make_plan(rate=50), make_plan(concurrency=64)):
        refuse_flood(allowed, target, [], own_target=False)
    for flood in (make_plan(rate=50.1), make_plan(concurrency=65)):
        with pytest.raises(UsageError, match="--i-own-this-target"):
            refuse_flood(flood, target, [], own_target=False)
        refuse_flood(flood, target, [], own_target=True)


def test_a_fast_trace_is_a_flood_too():
    rows = [Row(None, 1, 1, time_s=10 + index / 60) for index in range(61)]
    with pytest.raises(UsageError, match="--i-own-this-target"):
        refuse_flood(make_plan(trace=Path("x")), parse_target("http://example.org"), rows, own_target=False)
    refuse_flood(make_plan(trace=Path("x")), parse_target("http://example.org"), rows[::2], own_target=False)


def test_a_run_has_one_kind_of_arrivals_and_an_end():
    assert (resolve(make_plan()).concurrency, resolve(make_plan()).num_requests) == (1, 100)
    assert resolve(make_plan(concurrency=8, duration_s=5)) == make_plan(concurrency=8, duration_s=5)
    assert resolve(make_plan(rate=2.5)) == make_plan(rate=2.5, num_requests=100)
    with pytest.raises(UsageError, match="--rate and --concurrency exclude each other"):
        resolve(make_plan(rate=2.5, concurrency=8))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arrivals": "gamma:0.5"}, "give --rate too"),
        ({"arrivals": "gamma:-1", "rate": 1.0}, r"gamma:0\.25"),
        ({"input_len": "many"}, "--input-len"),
        ({"output_len": "uniform:9-1"}, "--output-len"),
        ({"warmup_s": 5.0, "duration_s": 5.0}, "--warmup-s"),
    ],
)
def test_what_cannot_be_run_is_refused_with_an_example(changes: dict[str, Any], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        make_plan(**changes)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_a_number_above_zero(rate: float):
    with pytest.raises(UsageError, match="--rate"):
        make_plan(rate=rate)
