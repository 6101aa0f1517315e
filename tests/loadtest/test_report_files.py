"""The page, the plots, the spreadsheet and the live view."""

import csv
import dataclasses
import io
import re
from pathlib import Path

from rich.console import Console
from stub_openai_server import StubServer
from test_loadtest_cli import gear_loadtest
from test_report_table import PLAN, make_record, make_report_of

from gear_loadtest.csv_report import to_csv
from gear_loadtest.html_report import run_page, sweep_page
from gear_loadtest.plan import LoadPlan
from gear_loadtest.progress import LiveView
from gear_loadtest.record import Failure, RequestRecord
from gear_loadtest.run_log import RunLog
from gear_loadtest.search import Sweep
from gear_loadtest.timeline import Timeline

PNG = b"\x89PNG\r\n"


def assert_self_contained(page: str) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|<[^>]*\bsrc=|\burl\((?!#)", page)
    assert not re.search(r'href="(?!#)', page)
    assert "default-src 'none'" in page


def test_a_page_fetches_nothing_and_escapes_what_a_server_sent():
    failed = RequestRecord(100.0, failure=Failure("error_event", "<script>alert(1)</script>"))
    page = run_page(make_report_of([make_record(), failed], model="<img src=x>"))
    assert_self_contained(page)
    assert "&lt;script&gt;alert(1)" in page
    assert "TTFT" in page
    assert "<svg" in page


def test_a_page_says_invalid_first():
    page = run_page(make_report_of([make_record(late_s=0.5)]))
    assert page.index("INVALID: it sent 500 ms late") < page.index("Latency")


def test_a_sweep_has_a_page_with_every_run_even_one_in_which_all_failed():
    failed = RequestRecord(100.0, failure=Failure("connect", "refused"))
    runs = [
        make_report_of([record], LoadPlan(rate=rate, num_requests=1))
        for rate, record in ((2, make_record()), (4, failed))
    ]
    page = sweep_page(Sweep(runs, 2.0, None, interrupted=False))
    assert_self_contained(page)
    assert page.count("<svg") == 3
    assert "knee" in page.lower()


def test_a_spreadsheet_has_a_row_a_run_and_no_formulas():
    report = dataclasses.replace(make_report_of([make_record()]), model="=HYPERLINK(1)")
    rows = list(csv.DictReader(io.StringIO(to_csv([report, report]))))
    assert len(rows) == 2
    assert (rows[0]["rate"], rows[0]["ttft_p50_s"], rows[0]["e2e_max_s"]) == ("2.0", "1.0", "1.5")
    assert rows[0]["model"] == "'=HYPERLINK(1)"


async def test_all_files_are_written_by_one_run(tmp_path: Path):
    paths = {kind: tmp_path / f"report.{kind}" for kind in ("json", "csv", "html", "png")}
    stub = StubServer(ttft_s=0.01)
    async with stub.serve():
        outcome = await gear_loadtest(
            stub.url, "--num-requests", "3", "--output-len", "3", "--input-len", "8",
            *(argument for kind, path in paths.items() for argument in (f"--{kind}", str(path))),
        )  # fmt: skip
    assert (outcome.status, outcome.stderr) == (0, "")
    assert paths["png"].read_bytes().startswith(PNG)
    assert "</html>" in paths["html"].read_text()
    assert len(paths["csv"].read_text().splitlines()) == 2


def test_the_live_view_shows_progress_load_and_recent_latency():
    log = RunLog(Timeline(90.0, width_s=2.0))
    log.end(make_record())
    log.num_ended, log.num_failed = 2, 1
    output = io.StringIO()
    Console(file=output, width=80, force_terminal=True).print(LiveView(PLAN, 10).draw(log.glance()))
    text = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    assert "2/10 1 failed" in text
    assert "p50 1,000.0, p99 1,000.0 ms · p50 500.0" in text
    assert max(len(line) for line in text.splitlines()) <= 80
