"""The server's own view: read from its metrics, and missing without harm."""

import io

from rich.console import Console
from stub_openai_server import StubServer
from test_load_run import run_against

from gear_loadtest import server_metrics
from gear_loadtest.report import Report
from gear_loadtest.server_metrics import COUNTERS, GAUGES, parse_metrics
from gear_loadtest.table import render
from gear_server.metric_table import METRICS

SCRAPE = """# HELP gear_pages Page slots by state: free, active, cached.
# TYPE gear_pages gauge
gear_pages{model="a b, c",state="free"} 90.0
gear_pages{model="m",state="active"} %d
gear_peak_memory_bytes{model="m"} 3.5e+09
gear_kv_compression_ratio{model="m"} 3.31
gear_swaps_total{direction="out",model="m"} %d
gear_step_seconds_bucket{le="0.001",model="m"} 7.0
other 1
gear_kv_tokens{model="m"} nonsense
"""


def printed(report: Report) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=80).print(render(report))
    return output.getvalue().splitlines()


async def test_the_servers_view_stands_in_the_report():
    stub = StubServer(ttft_s=0.1, metrics=[SCRAPE % (5, 2), SCRAPE % (1, 9)])
    async with stub.serve():
        report = await run_against(stub.url, num_requests=2)
    view = report.server.gauges['gear_pages{state="active"}']
    assert (view.before, view.lowest, view.highest, view.after) == (5, 1, 5, 1)
    assert report.server.counters == {'gear_swaps_total{direction="out"}': 7}
    assert "gear_kv_tokens" in report.server.absent
    assert report.server.problem is None
    rows = printed(report)
    assert any(row.split() == ["pages,", "active", "5", "1", "5", "1"] for row in rows)
    assert any(row.split()[:2] == ["peak", "memory"] and row.split()[-2:] == ["3.26", "GiB"] for row in rows)
    assert any(row.split() == ["compression", "ratio", *["3.31×"] * 4] for row in rows)
    assert any(row.split() == ["swaps", "out", "+7"] for row in rows)
    assert any("Absent from its metrics" in row for row in rows)


async def test_peaks_are_seen_during_the_run():
    stub = StubServer(ttft_s=1.5, metrics=[SCRAPE % (1, 0), SCRAPE % (8, 0), SCRAPE % (2, 0)])
    async with stub.serve():
        report = await run_against(stub.url)
    assert report.server.gauges['gear_pages{state="active"}'].highest == 8
    assert report.server.num_scrapes == 3


async def test_a_run_before_is_not_counted():
    """Requests that it cancelled are under way for a moment, and what they add is not this run's."""
    running = 'gear_requests_running{model="m"} %d\n'
    stub = StubServer(metrics=[SCRAPE % (5, 2) + running % 3, SCRAPE % (5, 6) + running % 0, SCRAPE % (1, 9)])
    async with stub.serve():
        report = await run_against(stub.url)
    assert report.server.counters == {'gear_swaps_total{direction="out"}': 3}


async def test_a_server_that_others_keep_busy_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(server_metrics, "_IDLE_WITHIN_S", 0.3)
    stub = StubServer(metrics=[SCRAPE % (5, 2) + 'gear_requests_waiting{model="m"} 7\n'])
    async with stub.serve():
        report = await run_against(stub.url)
    assert report.server.gauges["gear_requests_waiting"].before == 7


async def test_metrics_may_lie_on_a_port_of_their_own():
    private = StubServer(metrics=[SCRAPE % (5, 2)])
    async with private.serve(), (stub := StubServer()).serve():
        report = await run_against(stub.url, metrics_url=f"{private.url}/metrics")
    assert report.server.problem is None
    assert report.server.gauges['gear_pages{state="active"}'].highest == 5


async def test_a_server_without_metrics_is_told_and_no_error():
    stub = StubServer()
    async with stub.serve():
        report = await run_against(stub.url)
    assert report.server.problem == f"{stub.url}/metrics answered 404"
    assert any("No server-side view" in row for row in printed(report))


def test_names_are_those_that_gearserve_exports():
    exported = {spec.name for spec in METRICS}
    assert {name.partition("{")[0] for name, _ in (*GAUGES, *COUNTERS)} <= exported


def test_labels_in_any_order_and_models_with_any_name_are_read():
    values = parse_metrics(SCRAPE % (5, 2))
    assert values["gear_peak_memory_bytes"] == 3.5e9
    assert values['gear_pages{state="free"}'] == 90
    assert "gear_kv_tokens" not in values
    assert values['gear_swaps_total{direction="out"}'] == 2
