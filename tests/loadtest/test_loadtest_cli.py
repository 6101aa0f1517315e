"""The command as a user runs it: a process, its exit status, what it prints and writes."""

import asyncio
import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from stub_openai_server import MODEL, StubServer
from typer.testing import CliRunner

from gear_loadtest.cli import app

KEYS = (
    "url model date command interrupted num_requests num_ok num_errors num_cancelled num_warm_up errors "
    "error_examples duration_s request_throughput output_token_throughput total_token_throughput input_tokens_mean "
    "output_tokens_mean chunks ttft_s itl_s tpot_s e2e_s service_ttft_s service_e2e_s objective_met "
    "good_share goodput good_token_throughput client server steady not_steady slice_width_s slices"
)


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gear_loadtest.cli", *arguments,
        env=os.environ | {"COLUMNS": "80", "NO_COLOR": "1"},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def outcome_of(process: asyncio.subprocess.Process) -> Outcome:
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, stdout.decode(), stderr.decode())


async def gear_loadtest(*arguments: str) -> Outcome:
    return await outcome_of(await start(*arguments))


async def test_a_run_prints_a_table_and_writes_json(tmp_path: Path):
    path = tmp_path / "report.json"
    stub = StubServer(ttft_s=0.2, itl_s=0.02, tokens_per_word=1)
    async with stub.serve():
        outcome = await gear_loadtest(
            stub.url, "--concurrency", "3", "--num-requests", "6", "--input-len", "1200", "--output-len", "5",
            "--seed", "9", "--json", str(path),
        )  # fmt: skip
    assert (outcome.status, outcome.stderr) == (0, "")
    assert all(len(line) <= 80 for line in outcome.stdout.splitlines())
    rows = {line.split()[0]: line.split() for line in outcome.stdout.splitlines() if line.strip()}
    assert rows["6"] == ["6", "ok,", "0", "failed"]
    assert rows["requests"][2:] == ["prompt", "1,200.0", "1,200"]
    assert rows["Latency"] == ["Latency", "milliseconds", "mean", "p50", "p90", "p99", "max"]
    assert 200 <= float(rows["TTFT"][4]) < 300
    assert 280 <= float(rows["E2E"][4]) < 380

    report = json.loads(path.read_text())
    assert list(report) == KEYS.split()
    assert (report["url"], report["model"], report["interrupted"]) == (stub.url, MODEL, False)
    assert report["command"] == {
        "model": None, "rate": None, "concurrency": 3, "trace": None, "arrivals": "poisson", "num_requests": 6,
        "duration_s": None, "warmup_s": 0.0, "input_len": "1200", "output_len": "5", "dataset": None, "prefix_len": 0,
        "turns": 1, "slo": None, "seed": 9, "timeout_s": 600.0, "workers": 1, "metrics_url": None,
    }  # fmt: skip
    assert (report["num_requests"], report["num_ok"], report["num_errors"], report["errors"]) == (6, 6, 0, {})
    assert (report["input_tokens_mean"], report["output_tokens_mean"]) == (1200, 5)
    for metric in ("ttft_s", "itl_s", "tpot_s", "e2e_s", "service_ttft_s", "service_e2e_s"):
        assert list(report[metric]) == ["mean", "p50", "p90", "p95", "p99", "max"]
    assert 0.2 <= report["ttft_s"]["p50"] < 0.3


async def test_a_failed_request_makes_the_status_1_and_is_explained():
    stub = StubServer(faults={1: "429"})
    async with stub.serve():
        outcome = await gear_loadtest(stub.url, "--num-requests", "3", "--output-len", "2")
    assert outcome.status == 1
    assert "2 ok, 1 failed" in outcome.stdout
    row = next(line for line in outcome.stdout.splitlines() if "http_429" in line)
    assert row.split() == ["http_429", "1", "refused", "with", "429"]


async def test_ctrl_c_still_prints_and_writes_the_report(tmp_path: Path):
    path = tmp_path / "report.json"
    stub = StubServer(ttft_s=0.3)
    async with stub.serve():
        process = await start(stub.url, "--num-requests", "50", "--json", str(path))
        await stub.has_received(3)  # two have ended
        process.send_signal(signal.SIGINT)
        outcome = await outcome_of(process)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "2 ok, 0 failed, 1 cut off · interrupted, 50 were planned" in outcome.stdout
    report = json.loads(path.read_text())
    assert (report["interrupted"], report["num_ok"], report["num_cancelled"]) == (True, 2, 1)


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["http://127.0.0.1:9", "--rate", "1", "--concurrency", "1"], 2, "--rate and --concurrency exclude each other"),
        (["http://127.0.0.1:9", "--rate", "0"], 2, "--rate is 0: give a number above 0"),
        (["127.0.0.1:9"], 2, "give a base such as http://127.0.0.1:8000"),
        (["http://127.0.0.1:9", "--find-max-rate"], 2, "add --slo"),
        (["http://192.0.2.1", "--find-max-rate", "--slo", "ttft=1s"], 2, "add --i-own-this-target if you may do that"),
        (["http://127.0.0.1:9", "--rate", "1", "--slo", "ttft"], 2, "write it like ttft=500ms"),
        (["http://127.0.0.1:9", "--trace", "/no/such"], 2, "name a CSV or JSONL file"),
        (["http://192.0.2.1", "--rate", "100"], 2, "add --i-own-this-target if you may do that"),
        (["http://127.0.0.1:9", "--json", "/no/such/folder/x.json"], 2, "name a file in an existing folder"),
        (["http://127.0.0.1:9"], 1, "cannot reach http://127.0.0.1:9"),
    ],
)
def test_what_cannot_run_is_refused_in_one_sentence(arguments: list[str], status: int, sentence: str):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == status
    assert sentence in outcome.stderr
    assert outcome.stderr.startswith("gear-loadtest: ")
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


def test_a_run_that_never_began_leaves_no_file(tmp_path: Path):
    path = tmp_path / "report.json"
    assert CliRunner().invoke(app, ["http://127.0.0.1:9", "--json", str(path)]).exit_code == 1
    assert not path.exists()


async def test_help_imports_nothing_slow():
    probe = "import sys, gear_loadtest.cli; print({'aiohttp', 'numpy', 'orjson'} & sys.modules.keys())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", probe, stdout=asyncio.subprocess.PIPE)
    stdout, _ = await process.communicate()
    assert stdout.decode().strip() == "set()"
