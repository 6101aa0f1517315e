"""Whole runs against a stub of known latency, in one event loop: what is measured is compared with what it did."""

import asyncio
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stub_openai_server import MODEL, StubServer

from gear_loadtest.arrival import Pattern, offsets
from gear_loadtest.errors import ServerUnusable
from gear_loadtest.plan import LoadPlan
from gear_loadtest.report import Report
from gear_loadtest.rows import Row
from gear_loadtest.run import run_load_test
from gear_loadtest.target import parse_target

NO_TERMINAL = Console(force_terminal=False)


async def run_against(url: str, **changes: Any) -> Report:
    """Lengths may be numbers; `rows` are those of a trace or data set."""
    rows = changes.pop("rows", None)
    options = {"concurrency": 1, "num_requests": 1, "input_len": 16, "output_len": 4, "seed": 7, "timeout_s": 20.0}
    options |= changes
    options |= {name: str(options[name]) for name in ("input_len", "output_len")}
    if options.get("rate") or options.get("trace"):
        options["concurrency"] = None
    return await run_load_test(LoadPlan(**options), parse_target(url), NO_TERMINAL, rows)


async def test_latencies_are_those_of_the_server():
    stub = StubServer(ttft_s=0.2, itl_s=0.02)
    async with stub.serve():
        report = await run_against(stub.url, concurrency=3, num_requests=9, output_len=20)
    assert report.ttft_s is not None
    assert report.itl_s is not None
    assert report.tpot_s is not None
    assert report.e2e_s is not None
    # Medians, against the stub's own clock: a busy machine delays both ends of a connection, but not half of them.
    assert report.ttft_s.p50 == pytest.approx(statistics.median(stub.ttfts_s), rel=0.02, abs=0.005)
    assert report.itl_s.p50 == pytest.approx(statistics.median(stub.itls_s), rel=0.02, abs=0.005)
    assert report.itl_s.p50 == pytest.approx(0.02, abs=0.005)
    assert report.tpot_s.p50 == pytest.approx(0.02, abs=0.005)
    assert report.e2e_s.p50 == pytest.approx(0.2 + 19 * 0.02, abs=0.05)
    assert report.ttft_s.p50 >= 0.2


async def test_throughput_is_what_succeeded_over_the_time_it_took():
    stub = StubServer(ttft_s=0.2, tokens_per_word=1, faults={0: "500"})
    async with stub.serve():
        report = await run_against(stub.url, concurrency=2, num_requests=5, output_len=3)
    assert report.num_ok == 4
    assert 0.4 <= report.duration_s < 0.8  # two at a time: one after another would take 0.8
    assert report.request_throughput == pytest.approx(4 / report.duration_s)
    assert report.output_token_throughput == pytest.approx(4 * 3 / report.duration_s)
    assert report.total_token_throughput == pytest.approx(4 * (16 + 3) / report.duration_s)


async def test_each_way_to_fail_is_counted_by_its_kind_with_an_example():
    faults = ["500", "429", "error_event", "drop", "truncate", "garbage", "abort", "429", "307", "no_done", "no_reason"]
    stub = StubServer(ttft_s=0.05, faults=dict(enumerate(faults, start=1)))
    async with stub.serve():
        report = await run_against(stub.url, num_requests=14)
    assert report.errors == {
        "http_429": 2,
        "http_500": 1,
        "http_307": 1,  # not followed: it would lead the load elsewhere
        "error_event": 1,
        "disconnected": 1,
        "truncated": 3,
        "bad_event": 1,
        "aborted": 1,
    }
    assert (report.num_requests, report.num_ok, report.num_errors) == (14, 3, 11)
    assert report.error_examples["http_429"] == "refused with 429"
    assert report.error_examples["error_event"] == "out of [31m pages"  # the escape character is gone
    assert "after 1 chunks without finish reason" in report.error_examples["truncated"]


async def test_a_failed_request_does_not_enter_the_latencies():
    stub = StubServer(ttft_s=0.1, itl_s=0.1, faults={0: "500", 1: "truncate"})  # both quick
    async with stub.serve():
        report = await run_against(stub.url, num_requests=3)
    assert report.e2e_s is not None
    assert report.e2e_s.mean == report.e2e_s.max >= 0.4


async def test_a_hanging_request_is_a_timeout():
    stub = StubServer(faults={0: "hang"})
    async with stub.serve():
        report = await run_against(stub.url, num_requests=2, timeout_s=0.5)
    assert report.errors == {"timeout": 1}
    assert "--timeout-s" in report.error_examples["timeout"]
    assert report.num_ok == 1


async def test_a_server_that_goes_away_is_a_connect_error():
    stub = StubServer(ttft_s=0.1)
    async with stub.serve():
        running = asyncio.create_task(run_against(stub.url, num_requests=10, output_len=1))
        await stub.has_received(2)
    report = await running
    assert report.num_ok >= 1
    assert report.errors["connect"] >= 7


async def test_an_open_loop_measures_the_queue_that_a_closed_loop_hides():
    num_requests, rate, seed = 10, 40.0, 3
    due = list(itertools.islice(offsets(Pattern(), rate, seed), num_requests))
    shape: dict[str, Any] = {"num_requests": num_requests, "output_len": 1, "seed": seed}
    stub = StubServer(ttft_s=0.1, one_at_a_time=True)
    async with stub.serve():
        opened = await run_against(stub.url, rate=rate, **shape)
        assert stub.max_running > 3
        closed = await run_against(stub.url, concurrency=1, **shape)
    assert opened.e2e_s is not None
    assert closed.e2e_s is not None
    waited_s = num_requests * 0.1 - due[-1]  # the last: after nine others, which it could not know of
    assert waited_s > 0.5
    assert waited_s - 0.005 <= opened.e2e_s.max < waited_s + 0.3
    assert closed.e2e_s.p50 < 0.2


async def test_a_stalled_client_counts_its_delay_in_e2e_and_not_in_service():
    stub = StubServer(ttft_s=0.05)
    async with stub.serve():
        running = asyncio.create_task(run_against(stub.url, rate=50.0, num_requests=20, output_len=1))
        await stub.has_received(1)
        asyncio.get_running_loop().call_soon(time.sleep, 0.4)  # this machine stalls, the event loop with it
        report = await running
    assert report.e2e_s is not None
    assert report.service_e2e_s is not None
    assert report.e2e_s.mean - report.service_e2e_s.mean > 0.05


async def test_prompts_have_the_tokens_asked_for_when_the_server_can_count():
    stub = StubServer(tokens_per_word=3)
    async with stub.serve():
        report = await run_against(stub.url, num_requests=4, input_len=100)
    assert report.input_tokens_mean == 1 + 3 * 33
    assert len({body["prompt"] for body in stub.bodies}) == 4


async def test_a_conversation_sends_again_what_was_said_and_waits_for_answers():
    stub = StubServer(ttft_s=0.02)
    async with stub.serve():
        report = await run_against(stub.url, rate=50.0, num_requests=6, turns=3, output_len=2)
    assert report.num_ok == 6
    prompts = sorted((body["prompt"] for body in stub.bodies), key=len)
    assert [len(prompt.split()) for prompt in prompts] == [16, 16, 34, 34, 52, 52]  # an answer has two words
    for early, late in ((0, 2), (2, 4)):
        assert any(late_prompt.startswith(prompts[early] + " word word") for late_prompt in prompts[late : late + 2])


async def test_a_trace_is_replayed_with_its_times_and_lengths():
    rows = [Row(None, 10 + index, 1 + index, time_s=0.2 * index) for index in range(4)]
    stub = StubServer()
    async with stub.serve():
        report = await run_against(stub.url, trace=Path("trace.csv"), rows=rows, num_requests=None)
    assert report.num_ok == 4
    gaps = [late.arrived_at - early.arrived_at for early, late in itertools.pairwise(stub.answers)]
    assert gaps == pytest.approx([0.2] * 3, abs=0.05)
    assert [body["max_tokens"] for body in stub.bodies] == [1, 2, 3, 4]
    assert [len(body["prompt"].split()) for body in stub.bodies] == [10, 11, 12, 13]


async def test_a_warm_up_is_sent_and_not_measured():
    stub = StubServer(ttft_s=0.05, faults={0: "500"})
    async with stub.serve():
        report = await run_against(
            stub.url, rate=20.0, arrivals="constant", num_requests=None, duration_s=1.0, warmup_s=0.475, output_len=1
        )
    assert len(stub.bodies) == 20
    assert (report.num_warm_up, report.num_ok, report.num_errors) == (10, 10, 0)
    assert report.duration_s < 0.9


async def test_a_closed_loop_may_end_by_time():
    stub = StubServer(ttft_s=0.1)
    async with stub.serve():
        report = await run_against(stub.url, concurrency=2, num_requests=None, duration_s=0.45, output_len=1)
    assert 6 <= report.num_ok <= 10


async def test_without_a_tokenizer_the_true_length_is_still_reported():
    stub = StubServer()
    async with stub.serve():
        report = await run_against(stub.url, input_len=100)
    assert report.input_tokens_mean == 101  # 100 words and a special token


async def test_requests_ask_for_exact_lengths_and_usage():
    stub = StubServer()
    async with stub.serve():
        report = await run_against(stub.url, output_len=6)
    body = stub.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"], body["temperature"]) == (MODEL, 6, True, 0)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert report.output_tokens_mean == 6


async def test_tokens_come_from_usage_and_differing_chunks_are_told():
    stub = StubServer(tokens_per_chunk=2)
    async with stub.serve():
        report = await run_against(stub.url, num_requests=3, output_len=8)
    assert report.output_tokens_mean == 8
    assert (report.chunks.total, report.chunks.num_requests_differing) == (12, 3)
    assert report.chunks.num_requests_without_usage == 0


async def test_without_usage_chunks_count_as_tokens_and_the_prompt_is_unknown():
    stub = StubServer(sends_usage=False)
    async with stub.serve():
        report = await run_against(stub.url, num_requests=2)
    assert report.output_tokens_mean == 4
    assert report.input_tokens_mean is None
    assert report.total_token_throughput is None
    assert report.chunks.num_requests_without_usage == 2


async def test_an_interrupted_run_reports_what_it_measured():
    stub = StubServer(ttft_s=0.2)
    async with stub.serve():
        running = asyncio.create_task(run_against(stub.url, num_requests=100))
        await stub.has_received(4)  # three have ended
        running.cancel()
        report = await running
    assert report.interrupted
    assert report.num_ok == report.num_requests == 3
    assert report.num_cancelled == 1
    assert report.num_errors == 0
    assert report.duration_s < 2


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GEAR_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "openai-key")
    stub = StubServer(api_key="gear-key")
    async with stub.serve():
        with pytest.raises(ServerUnusable, match=r"401 .*a key is needed.*GEAR_API_KEY"):
            await run_against(stub.url)
        monkeypatch.setenv("GEAR_API_KEY", "gear-key")
        await run_against(stub.url)
    assert stub.keys == ["Bearer gear-key"]


async def test_a_wrong_path_names_the_remedy():
    stub = StubServer()
    async with stub.serve():
        with pytest.raises(ServerUnusable, match="404: give the server's base URL, such as"):
            await run_against(stub.url + "/api")


async def test_a_model_may_be_named_where_none_is_listed():
    stub = StubServer()
    async with stub.serve():
        report = await run_against(stub.url, model="another")
    assert report.model == stub.bodies[0]["model"] == "another"
