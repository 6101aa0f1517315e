"""What the table says, from records written by hand."""

import io
from array import array
from datetime import UTC, datetime

from rich.console import Console

from gear_loadtest.plan import LoadPlan
from gear_loadtest.record import Failure, RequestRecord
from gear_loadtest.report import Report, make_report
from gear_loadtest.run_log import RunLog
from gear_loadtest.server_metrics import ServerReport
from gear_loadtest.table import render
from gear_loadtest.target import parse_target
from gear_loadtest.timeline import Timeline

PLAN = LoadPlan(rate=2.0, num_requests=2, input_len="8", output_len="2")


def make_report_of(
    records: list[RequestRecord], plan: LoadPlan = PLAN, model: str = "stub", duration_s: float = 2.0
) -> Report:
    log = RunLog(Timeline(90.0, width_s=2.0 if len(records) < 10 else 0.125))
    for record in records:
        log.end(record)
    return make_report(
        log,
        plan=plan,
        target=parse_target("http://localhost:1"),
        model=model,
        date=datetime(2026, 1, 1, tzinfo=UTC),
        duration_s=duration_s,
        interrupted=False,
        server=ServerReport(problem="not asked"),
    )


def printed(records: list[RequestRecord], model: str = "stub") -> str:
    output = io.StringIO()
    Console(file=output, width=80).print(render(make_report_of(records, model=model)))
    return output.getvalue()


def make_record(late_s: float = 0.0, num_chunks: int = 2, completion_tokens: int | None = 2) -> RequestRecord:
    """Sent at 100, first chunk a second later, then one every half second."""
    return RequestRecord(
        intended_at=100.0 - late_s,
        sent_at=100.0,
        chunk_times=array("d", [101.0 + 0.5 * index for index in range(num_chunks)]),
        finished_at=101.0 + 0.5 * (num_chunks - 1),
        finish_reason="length",
        prompt_tokens=8 if completion_tokens is not None else None,
        completion_tokens=completion_tokens,
    )


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_a_clean_run_needs_no_notes():
    text = printed([make_record(), make_record()])
    assert row(text, "requests")[:2] == ["requests", "1.00"]
    assert row(text, "total")[:3] == ["total", "tokens", "10.0"]
    assert row(text, "TTFT")[3:] == ["1,000.0"] * 5
    assert row(text, "ITL")[3:] == row(text, "TPOT")[3:] == ["500.0"] * 5
    assert row(text, "E2E")[3:] == ["1,500.0"] * 5
    assert text.rstrip().splitlines()[-1].strip() == "No server-side view: not asked."
    assert text.rstrip().splitlines()[-3].strip() == "Too short to find a steady state (10.0 s of load)."


def test_a_client_that_sent_late_owns_up():
    assert "INVALID The client was the bottleneck: it sent 250 ms late on average" in printed(
        [make_record(late_s=0.5), make_record()]
    )


def test_chunks_that_are_not_tokens_are_noted():
    assert "1 of 2 requests had more or fewer chunks" in printed([make_record(completion_tokens=4), make_record()])


def test_missing_usage_is_noted_and_not_printed_as_a_number():
    text = printed([make_record(completion_tokens=None)])
    assert "1 of 1 requests came without usage" in text
    assert row(text, "total") == ["total", "tokens", "–"]


def test_a_run_in_which_all_failed_prints_errors_and_no_latencies():
    failed = RequestRecord(100.0, failure=Failure("http_503", "no " * 60))
    text = printed([failed, failed])
    assert row(text, "http_503")[1] == "2"
    assert "TTFT" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_what_a_server_sends_is_not_markup():
    failed = RequestRecord(100.0, failure=Failure("error_event", "[red]no[/] pages"))
    text = printed([failed], model="[bold]org/model[/]")
    assert "[red]no[/] pages" in text
    assert "[bold]org/model[/]" in text
