"""What Prometheus reads: every promised name, from the engine's numbers and the server's clock."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine

from gear_engine.protocol import EngineStats, PageError
from gear_server.metric_docs import VLLM_NAMES, markdown
from gear_server.metric_table import METRICS

# As in DESIGN.md, "Metrics": dashboards rely on them.
PROMISED = [
    "gear_requests_running",
    "gear_requests_waiting",
    "gear_requests_swapped",
    "gear_requests_total",
    "gear_prompt_tokens_total",
    "gear_cached_tokens_total",
    "gear_generation_tokens_total",
    "gear_time_to_first_token_seconds",
    "gear_inter_token_latency_seconds",
    "gear_request_latency_seconds",
    "gear_queue_time_seconds",
    "gear_step_seconds",
    "gear_batch_tokens",
    "gear_pages",
    "gear_prefix_hits_total",
    "gear_swaps_total",
    "gear_kv_compression_ratio",
    "gear_kv_tokens",
    "gear_kv_bytes",
    "gear_kv_saved_bytes",
    "gear_kv_peak_bytes",
    "gear_peak_memory_bytes",
    "gear_memory_bytes",
    "gear_page_error_ratio",
    "gear_build_info",
]


async def scrape(client: httpx.AsyncClient) -> dict[tuple[str, ...], float]:
    """(name, label values without the model's, in the order of their names) -> value."""
    text = (await client.get("/metrics")).text
    samples: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["model"] == "small"
            labels = [value for label, value in sorted(sample.labels.items()) if label != "model"]
            samples[(sample.name, *labels)] = sample.value
    return samples


async def complete(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "Once", "max_tokens": 50} | body)


def test_the_table_has_every_promised_name_once() -> None:
    names = [spec.name for spec in METRICS]
    assert len(names) == len(set(names))
    assert set(PROMISED) <= set(names)


def test_names_carry_base_units_and_counters_end_in_total() -> None:
    for spec in METRICS:
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert bool(spec.buckets) == (spec.kind == "histogram")
        assert not spec.name.endswith(("_ms", "_milliseconds", "_mb", "_percent"))


async def test_every_metric_is_scraped_and_outcomes_begin_at_zero(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.report(page_errors=[PageError(0, "keys", 0.03)])
    samples = await scrape(client)
    names = {sample[0].removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for sample in samples}
    assert names == {spec.name for spec in METRICS}
    for outcome in ("stop", "length", "abort", "error", "rejected"):
        assert samples["gear_requests_total", outcome] == 0


async def test_a_scrape_says_the_type_of_every_metric(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.report(page_errors=[PageError(0, "keys", 0.03)])
    lines = (await client.get("/metrics")).text.splitlines()
    types = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    assert types == {spec.name: spec.kind for spec in METRICS}


async def test_states_and_totals_are_the_engines(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.stats = EngineStats(
        num_running=3, num_waiting=2, num_swapped=1, pages_free=5, pages_active=4, pages_cached=1, kv_tokens=100,
        kv_sealed_bytes=2000, kv_open_bytes=1000, kv_swapped_bytes=50, kv_peak_bytes=4000, peak_memory_bytes=9,
        prompt_tokens_total=70, cached_tokens_total=30, generation_tokens_total=60, prefix_hits_total=6,
        swaps_out_total=2, swaps_in_total=1, preemptions_total=4,
    )  # fmt: skip
    expected: dict[tuple[str, ...], float] = {
        ("gear_requests_running",): 3, ("gear_requests_waiting",): 2, ("gear_requests_swapped",): 1,
        ("gear_pages", "free"): 5, ("gear_pages", "active"): 4, ("gear_pages", "cached"): 1,
        ("gear_kv_tokens",): 100, ("gear_kv_bytes", "sealed"): 2000, ("gear_kv_bytes", "open"): 1000,
        ("gear_kv_bytes", "swapped"): 50, ("gear_kv_peak_bytes",): 4000, ("gear_peak_memory_bytes",): 9,
        ("gear_kv_saved_bytes",): 100 * 100 - 3000, ("gear_kv_compression_ratio",): 3.2,
        ("gear_prompt_tokens_total",): 70, ("gear_cached_tokens_total",): 30, ("gear_generation_tokens_total",): 60,
        ("gear_prefix_hits_total",): 6, ("gear_swaps_total", "out"): 2, ("gear_swaps_total", "in"): 1,
        ("gear_preemptions_total",): 4, ("gear_memory_bytes", "weights"): 500, ("gear_memory_bytes", "pages"): 10_000,
    }  # fmt: skip
    samples = await scrape(client)
    assert {key: samples[key] for key in expected} == expected


async def test_saved_bytes_may_be_negative(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.stats = EngineStats(kv_tokens=1, kv_open_bytes=1000)
    assert (await scrape(client))["gear_kv_saved_bytes",] == -900


async def test_steps_queue_times_and_page_errors_come_from_reports(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.report(
        step_s=0.0055, batch_tokens=70, queue_times_s={"a": 0.1, "b": 0.2}, page_errors=[PageError(1, "values", 0.04)]
    )
    engine.report(page_errors=[PageError(1, "values", 0.02)])
    samples = await scrape(client)
    assert samples["gear_step_seconds_count",] == 2
    assert samples["gear_step_seconds_bucket", "0.006"] - samples["gear_step_seconds_bucket", "0.005"] == 1
    assert samples["gear_batch_tokens_sum",] == 70
    assert samples["gear_queue_time_seconds_count",] == 2
    assert samples["gear_queue_time_seconds_sum",] == pytest.approx(0.3)
    assert samples["gear_page_error_ratio", "1", "values"] == 0.02


async def test_every_ended_sequence_is_counted_by_its_reason(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(client, n=2)
    await complete(client, max_tokens=1)
    await complete(client, stop="wor")
    await complete(client, temperature=-1)
    await complete(client, prompt=[5] * 1000)
    await complete(client, model="nobody")
    engine.max_requests = 0
    await complete(client)
    engine.max_requests = 10
    engine.error_after = 0
    await complete(client)
    samples = await scrape(client)
    counts = {outcome: samples["gear_requests_total", outcome] for outcome in ("stop", "length", "error", "rejected")}
    assert counts == {"stop": 3, "length": 1, "error": 1, "rejected": 4}
    assert samples["gear_requests_total", "abort"] == 0
    assert samples["gear_requests_arrived_total",] == sum(counts.values())


async def test_latencies_are_measured_where_the_client_feels_them(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    engine.step_s = 0.02
    engine.answer = [5, 5, 5]  # and the end: four tokens
    await complete(client)
    samples = await scrape(client)
    assert samples["gear_time_to_first_token_seconds_count",] == 1
    assert samples["gear_time_to_first_token_seconds_sum",] >= 0.02
    assert samples["gear_inter_token_latency_seconds_count",] == 3
    assert samples["gear_inter_token_latency_seconds_sum",] >= 0.06
    assert samples["gear_request_latency_seconds_count",] == 1
    assert samples["gear_request_latency_seconds_sum",] >= 0.08


async def test_a_dead_engine_counts_its_requests_as_errors(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.pause_after = 0
    asking = asyncio.create_task(complete(client, n=2))
    await engine.until(lambda: engine.num_requests == 2)
    assert (await scrape(client))["gear_requests_arrived_total",] == 2, "counted before they end"
    assert (await scrape(client))["gear_engine_up",] == 1
    engine.die()
    await asking
    samples = await scrape(client)
    assert samples["gear_engine_up",] == 0
    assert samples["gear_requests_total", "error"] == 2
    assert samples["gear_requests_total", "rejected"] == 0


async def test_openmetrics_is_spoken_to_who_asks_for_it(client: httpx.AsyncClient) -> None:
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    open_metrics = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


def test_the_page_of_metrics_is_the_tables() -> None:
    page = Path(__file__).parents[2] / "docs/metrics.md"
    assert page.read_text() == markdown(), "python -m gear_server.metric_docs > docs/metrics.md"
    assert set(VLLM_NAMES) <= {spec.name for spec in METRICS}


async def test_what_the_pool_holds_is_known_before_the_first_step(client: httpx.AsyncClient) -> None:
    lines = (await client.get("/metrics")).text.splitlines()
    assert 'gear_kv_capacity_tokens{format="gear",model="small"} 160.0' in lines  # 10 pages of 16 tokens
    assert 'gear_kv_capacity_tokens{format="bf16",model="small"} 100.0' in lines  # 10 000 bytes, 100 a token
    assert 'gear_pages{model="small",state="free"} 10.0' in lines


def test_buckets_tell_5_ms_from_4_between_tokens_and_100_s_from_80_of_an_answer() -> None:
    bounds = {spec.name: spec.buckets for spec in METRICS}
    assert {0.004, 0.005, 0.006} <= set(bounds["gear_inter_token_latency_seconds"])
    assert {80.0, 100.0, 120.0} <= set(bounds["gear_request_latency_seconds"])


async def test_histograms_count_a_value_on_a_bound_below_it_and_one_beyond_all_in_the_last(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for step_s in (0.001, 0.0011, 99.0):
        engine.report(step_s=step_s)
    samples = await scrape(client)
    buckets = {bound: samples["gear_step_seconds_bucket", bound] for bound in ("0.001", "0.002", "2.5", "+Inf")}
    assert buckets == {"0.001": 1, "0.002": 2, "2.5": 2, "+Inf": 3}
    assert samples["gear_step_seconds_sum",] == pytest.approx(99.0021)


async def test_what_clients_send_makes_no_new_series(client: httpx.AsyncClient) -> None:
    await complete(client)
    before = set(await scrape(client))
    await complete(client, model="nobody-knows-it", stop="never seen", user="somebody", priority=7)
    await client.get("/no/such/route", headers={"X-Request-Id": "mine"})
    assert set(await scrape(client)) == before
