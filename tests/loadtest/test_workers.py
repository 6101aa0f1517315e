"""Several processes send one load and make one report."""

import json
import signal
from pathlib import Path

import pytest
from stub_openai_server import StubServer
from test_loadtest_cli import gear_loadtest, outcome_of, start


async def test_workers_send_one_load_together_on_schedule(tmp_path: Path):
    stub = StubServer(ttft_s=0.1, itl_s=0.02)
    async with stub.serve():
        outcome = await gear_loadtest(
            stub.url, "--workers", "2", "--rate", "40", "--arrivals", "constant", "--num-requests", "20",
            "--input-len", "16", "--output-len", "4", "--json", str(tmp_path / "report.json"),
        )  # fmt: skip
    assert (outcome.status, outcome.stderr) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["num_ok"], len({body["prompt"] for body in stub.bodies})) == (20, 20)
    assert report["ttft_s"]["p50"] == pytest.approx(0.1, abs=0.02)
    arrived = sorted(answer.arrived_at for answer in stub.answers)
    assert arrived[-1] - arrived[0] == pytest.approx(19 / 40, abs=0.1)


async def test_ctrl_c_stops_workers_and_reports_what_they_measured():
    stub = StubServer(ttft_s=0.2)
    async with stub.serve():
        process = await start(stub.url, "--workers", "2", "--concurrency", "2", "--num-requests", "90")
        await stub.has_received(6)
        process.send_signal(signal.SIGINT)
        outcome = await outcome_of(process)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert "2 cut off · interrupted, 90 were planned" in outcome.stdout
