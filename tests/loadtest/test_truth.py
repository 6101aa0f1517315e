"""Every statistic of a run against the stub's own clock, to 2 % or 2 ms, also when the server or the client stalls."""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import fields
from time import perf_counter

import numpy as np
import pytest
from stub_openai_server import StubServer
from test_load_run import run_against

from gear_loadtest.arrival import Pattern, offsets
from gear_loadtest.distribution import Distribution
from gear_loadtest.report import Report

# Few at once: the stub shares the event loop, so what it writes in a burst is read a little later.
RATE, NUM_REQUESTS, NUM_TOKENS, SEED, STALL_S = 14.0, 30, 6, 5, 2.0


def truth(values: list[float]) -> Distribution:
    return Distribution(float(np.mean(values)), *np.percentile(values, [50, 90, 95, 99, 100]).tolist())


def assert_close(found: Distribution | None, values: list[float]) -> None:
    assert found is not None
    expected = truth(values)
    for one in fields(Distribution):
        measured, true = getattr(found, one.name), getattr(expected, one.name)
        assert measured == pytest.approx(true, rel=0.02, abs=0.002), one.name


def assert_true_from_the_schedule(report: Report, stub: StubServer) -> None:
    """The stub knows of the schedule's start only when its first request came."""
    start = stub.answers[0].arrived_at
    due = [start + offset for offset in itertools.islice(offsets(Pattern(), RATE, SEED), NUM_REQUESTS)]
    assert_close(report.ttft_s, [a.chunk_times[0] - at for a, at in zip(stub.answers, due, strict=True)])
    assert_close(report.e2e_s, [a.chunk_times[-1] - at for a, at in zip(stub.answers, due, strict=True)])


def assert_true_from_the_send(report: Report, stub: StubServer) -> None:
    answers = stub.answers
    assert_close(report.service_ttft_s, [a.chunk_times[0] - a.arrived_at for a in answers])
    assert_close(report.service_e2e_s, [a.chunk_times[-1] - a.arrived_at for a in answers])
    assert_close(report.tpot_s, [(a.chunk_times[-1] - a.chunk_times[0]) / (NUM_TOKENS - 1) for a in answers])
    assert_close(report.itl_s, [late - early for a in answers for early, late in itertools.pairwise(a.chunk_times)])


async def measure(stall: Callable[[StubServer], None] | None) -> tuple[Report, StubServer]:
    stub = StubServer(ttft_s=0.3, itl_s=0.05)
    async with stub.serve():
        running = asyncio.create_task(
            run_against(stub.url, rate=RATE, num_requests=NUM_REQUESTS, output_len=NUM_TOKENS, seed=SEED)
        )
        await stub.has_received(5)
        if stall is not None:
            stall(stub)
        return await running, stub


async def test_every_statistic_is_true():
    report, stub = await measure(None)
    assert_true_from_the_schedule(report, stub)
    assert_true_from_the_send(report, stub)
    assert report.client.invalid is None


async def test_a_stalled_server_shows_in_every_statistic():
    def stall(stub: StubServer) -> None:
        stub.stalled_until, stub.stall_s = perf_counter() + STALL_S, STALL_S

    report, stub = await measure(stall)
    assert_true_from_the_schedule(report, stub)
    assert_true_from_the_send(report, stub)
    assert report.ttft_s is not None
    assert report.ttft_s.p90 > 1.0
    assert report.client.invalid is None


async def test_a_stall_that_keeps_requests_from_being_sent_shows_from_the_intended_start():
    report, stub = await measure(lambda _: asyncio.get_running_loop().call_soon(time.sleep, STALL_S))
    assert_true_from_the_schedule(report, stub)
    assert report.ttft_s is not None
    assert report.service_ttft_s is not None
    assert report.ttft_s.p90 > 1.0
    assert report.service_ttft_s.p50 < 0.4  # by the send alone, half the requests saw nothing
    assert report.client.invalid is not None
    assert "late on average" in report.client.invalid
