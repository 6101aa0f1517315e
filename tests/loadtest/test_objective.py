"""Objectives, the search for the highest rate that meets one, sweeps and comparisons."""

import dataclasses
from array import array
from pathlib import Path

import orjson
import pytest
from stub_openai_server import StubServer
from test_load_run import run_against
from test_loadtest_cli import gear_loadtest
from test_report_table import make_record, make_report_of
from typer.testing import CliRunner

from gear_loadtest.cli import app
from gear_loadtest.compare import compare, differences, read_run
from gear_loadtest.errors import UsageError
from gear_loadtest.plan import LoadPlan, search_rates
from gear_loadtest.record import RequestRecord
from gear_loadtest.report import Report
from gear_loadtest.search import find_max_rate, sweep
from gear_loadtest.slo import parse_objective


def make_slow_record(gaps_ms: list[float], ttft_ms: float = 100) -> RequestRecord:
    times = [ttft_ms / 1000]
    for gap in gaps_ms:
        times.append(times[-1] + gap / 1000)
    return RequestRecord(0.0, 0.0, array("d", times), times[-1], "length", 1, len(times))


def test_a_request_is_good_within_all_limits():
    objective = parse_objective("ttft=500ms,itl=50ms,p=90")
    assert objective.is_good(make_slow_record([40] * 10))
    assert objective.is_good(make_slow_record([40] * 9 + [60]))  # one gap in ten is what p=90 leaves
    assert not objective.is_good(make_slow_record([40] * 8 + [60] * 2))
    assert not objective.is_good(make_slow_record([40] * 10, ttft_ms=501))
    assert not parse_objective("tpot=39ms").is_good(make_slow_record([40] * 10))
    assert not parse_objective("e2e=0.4s").is_good(make_slow_record([40] * 10))


def test_an_objective_is_met_by_enough_good_requests_of_all():
    objective = parse_objective("ttft=1s")
    assert objective.is_met(99, 100)
    assert not objective.is_met(98, 99)
    assert not objective.is_met(0, 0)


@pytest.mark.parametrize("text", ["", "ttft", "ttft=5", "ttfb=5ms", "p=99", "ttft=1s,p=0", "ttft=1s,p=101"])
def test_what_is_no_objective_is_refused_with_an_example(text: str):
    with pytest.raises(UsageError, match="ttft=500ms,itl=50ms,p=99"):
        parse_objective(text)


async def test_errors_and_time_outs_count_against_the_objective():
    stub = StubServer(faults={0: "500", 1: "hang"})
    async with stub.serve():
        report = await run_against(stub.url, num_requests=4, timeout_s=0.3, slo="ttft=10s,p=60")
    assert (report.good_share, report.objective_met) == (0.5, False)
    assert report.goodput == pytest.approx(2 / report.duration_s)


def made_up_run(rate: float, capacity: float) -> Report:
    """Of a server that answers within the objective up to its capacity, and takes ever longer beyond."""
    e2e_s = 1 / max(0.01, 1 - rate / capacity / 1.1) if rate <= capacity else 100.0
    report = make_report_of([make_record()], LoadPlan(rate=rate, num_requests=1, slo="ttft=1s"))
    assert report.e2e_s is not None
    return dataclasses.replace(
        report,
        objective_met=rate <= capacity,
        request_throughput=min(rate, capacity),
        e2e_s=dataclasses.replace(report.e2e_s, mean=e2e_s),
    )


@pytest.mark.parametrize(("first", "capacity"), [(1.0, 37.0), (64.0, 37.0), (1.0, 0.3), (5.0, 5.0)])
async def test_the_search_ends_within_five_percent_of_what_the_server_can_do(first: float, capacity: float):
    rates = []

    async def run_at(rate: float) -> Report:
        rates.append(rate)
        return made_up_run(rate, capacity)

    found = await find_max_rate(run_at, first, lambda report: None)
    assert found.max_rate is not None
    assert capacity / 1.05 <= found.max_rate <= capacity
    assert len(rates) < 15
    assert [run.command.rate for run in found.runs] == sorted(rates)


async def test_a_search_that_finds_nothing_ends():
    async def run_at(rate: float) -> Report:
        return made_up_run(rate, capacity=1e-30)

    found = await find_max_rate(run_at, 1.0, lambda report: None)
    assert found.max_rate is None


async def test_a_run_that_the_client_held_back_does_not_count_as_met():
    async def run_at(rate: float) -> Report:
        report = made_up_run(rate, 1000.0)
        invalid = "it was busy" if rate > 10 else None
        return dataclasses.replace(report, client=dataclasses.replace(report.client, invalid=invalid))

    found = await find_max_rate(run_at, 1.0, lambda report: None)
    assert found.max_rate == pytest.approx(10, rel=0.06)


async def test_the_knee_is_where_throughput_over_latency_is_greatest():
    async def run_at(rate: float) -> Report:
        return made_up_run(rate, 10.0)

    found = await sweep(run_at, [1, 2, 4, 6, 8, 12, 16], lambda report: None)
    assert found.knee_rate == 6
    assert not found.interrupted
    assert (await sweep(run_at, [1, 2, 4], lambda report: None)).knee_rate is None  # it lies beyond


def test_a_search_is_asked_for_clearly():
    assert search_rates(LoadPlan(), "4,1,2", find_max=False) == [1, 2, 4]
    assert search_rates(LoadPlan(slo="ttft=1s"), None, find_max=True) == [1.0]
    for plan, text, find_max in (
        (LoadPlan(), "1,x", False), (LoadPlan(), None, True), (LoadPlan(concurrency=3), "1,2", False),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            search_rates(plan, text, find_max=find_max)


async def test_a_real_search_stops_where_requests_queue(tmp_path: Path):
    path = tmp_path / "search.json"
    stub = StubServer(ttft_s=0.05, one_at_a_time=True)  # 20/s at most, and with random arrivals a queue well before
    async with stub.serve():
        outcome = await gear_loadtest(
            stub.url, "--find-max-rate", "--rate", "12", "--arrivals", "constant", "--duration-s", "0.4",
            "--output-len", "1", "--input-len", "8", "--slo", "ttft=120ms,p=90", "--json", str(path),
        )  # fmt: skip
    result = orjson.loads(path.read_bytes())
    assert outcome.status == 0
    assert 12 <= result["max_rate"] <= 45
    assert "Highest rate that meets the objective" in outcome.stdout


def made_up_json(path: Path, slow_s: float, num_seconds: int = 30) -> Path:
    records = []
    for index in range(num_seconds * 5):
        at, late = 100.0 + index / 5, slow_s * (1 + 0.1 * (index % 7))
        records.append(RequestRecord(at, at, array("d", [at + late, at + late + 0.1]), at + late + 0.1, "length", 8, 2))
    report = make_report_of(records, LoadPlan(rate=5.0, num_requests=len(records)), duration_s=float(num_seconds))
    path.write_bytes(orjson.dumps(report, default=str))
    return path


def test_a_comparison_tells_what_differs_and_what_does_not(tmp_path: Path):
    a = read_run(made_up_json(tmp_path / "a.json", 0.1))
    b = read_run(made_up_json(tmp_path / "b.json", 0.2))
    ratios = {ratio.name: ratio for ratio in compare(a, b)}
    assert ratios["TTFT p50"].ratio == pytest.approx(2, rel=0.02)
    assert ratios["TTFT p50"].low > 1.8
    assert ratios["TTFT p50"].verdict == "worse"
    assert ratios["ITL p50"].ratio == pytest.approx(1, rel=0.02)
    assert ratios["requests/s"].verdict == "undecided"
    assert differences(a, b) == []
    assert all(ratio.ratio == 1 and ratio.low <= 1 <= ratio.high for ratio in compare(a, a))


def test_the_comparison_is_printed_and_what_is_no_report_refused(tmp_path: Path):
    a, b = made_up_json(tmp_path / "a.json", 0.2), made_up_json(tmp_path / "b.json", 0.1)
    outcome = CliRunner().invoke(app, ["--compare", str(a), str(b)])
    assert outcome.exit_code == 0
    line = next(line for line in outcome.stdout.splitlines() if "TTFT p50" in line)
    assert line.split()[-1] == "better"
    (tmp_path / "c.json").write_text("{}")
    outcome = CliRunner().invoke(app, ["--compare", str(a), str(tmp_path / "c.json")])
    assert outcome.exit_code == 2
    assert "name a file that --json wrote" in outcome.stderr
