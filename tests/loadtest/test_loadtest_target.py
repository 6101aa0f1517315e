import pytest

from gear_loadtest.errors import UsageError
from gear_loadtest.plan import LoadPlan, refuse_flood, resolve_arrivals
from gear_loadtest.target import parse_target


def make_plan(rate: float | None = None, concurrency: int | None = None) -> LoadPlan:
    return LoadPlan(
        model=None, rate=rate, concurrency=concurrency, num_requests=1, input_len=1, output_len=1, seed=0, timeout_s=1
    )


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
    refuse_flood(make_plan(rate=1000), parse_target(url), own_target=False)
    refuse_flood(make_plan(concurrency=1000), parse_target(url), own_target=False)


@pytest.mark.parametrize("url", ["http://example.org", "http://10.0.0.1:8000", "http://localhost.example.org"])
def test_a_flood_on_a_stranger_needs_a_promise(url: str):
    target = parse_target(url)
    for allowed in (make_plan(rate=50), make_plan(concurrency=64)):
        refuse_flood(allowed, target, own_target=False)
    for flood in (make_plan(rate=50.1), make_plan(concurrency=65)):
        with pytest.raises(UsageError, match="--i-own-this-target"):
            refuse_flood(flood, target, own_target=False)
        refuse_flood(flood, target, own_target=True)


def test_a_run_is_either_open_or_closed():
    assert resolve_arrivals(None, None) == (None, 1)
    assert resolve_arrivals(None, 8) == (None, 8)
    assert resolve_arrivals(2.5, None) == (2.5, None)
    with pytest.raises(UsageError, match="exclude each other"):
        resolve_arrivals(2.5, 8)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_a_number_above_zero(rate: float):
    with pytest.raises(UsageError, match="--rate"):
        make_plan(rate=rate)
