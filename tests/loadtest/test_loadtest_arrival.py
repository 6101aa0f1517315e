import asyncio
import itertools
import statistics
import time
from time import perf_counter

import pytest

from gear_loadtest.arrival import Pattern, closed_loop, offsets, open_loop, parse_pattern


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential():
    due = itertools.islice(offsets(Pattern(), rate=8.0, seed=1), 20_001)
    gaps = [after - before for before, after in itertools.pairwise(due)]
    # The standard error of both is 0.7 % of 1/8 with 20 000 gaps; for a fixed interval the spread would be 0.
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.05)


def gaps_of(text: str, num: int = 20_000) -> list[float]:
    due = itertools.islice(offsets(parse_pattern(text), rate=8.0, seed=1), num + 1)
    return [after - before for before, after in itertools.pairwise(due)]


def test_gamma_gaps_are_as_bursty_as_asked_and_constant_ones_equal():
    bursty = gaps_of("gamma:0.25")
    assert statistics.mean(bursty) == pytest.approx(1 / 8, rel=0.05)
    assert statistics.stdev(bursty) == pytest.approx(2 / 8, rel=0.05)  # 1/√0.25
    assert gaps_of("constant", 5) == [1 / 8] * 5


def test_a_ramp_rises_evenly_and_then_stays():
    due = list(itertools.takewhile(lambda at: at < 15, offsets(parse_pattern("ramp:2"), 20.0, seed=1, ramp_s=10.0)))
    counts = [sum(first <= at < first + 5 for at in due) for first in (0, 5, 10)]
    # The rate averages 6.5, 15.5 and 20 a second; the standard deviation of a count is its root, at most 10.
    assert counts == pytest.approx([32.5, 77.5, 100], abs=30)
    assert counts[0] < counts[1] < counts[2]


def test_the_seed_decides_the_schedule():
    def schedule(seed: int) -> list[float]:
        return list(itertools.islice(offsets(Pattern(), 2.0, seed), 5))

    assert schedule(1) == schedule(1)
    assert schedule(1) != schedule(2)
    assert schedule(1)[0] == 0


async def test_an_open_loop_does_not_wait_for_answers():
    running = 0
    peak = 0

    async def send(index: int, intended_at: float) -> None:
        nonlocal running, peak
        assert 0 <= perf_counter() - intended_at < 0.2
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.3)
        running -= 1

    await open_loop(send, [(index, 0.01 * index) for index in range(6)], perf_counter())
    assert peak == 6
    assert running == 0


async def test_a_late_wake_up_leaves_the_intended_times_on_schedule():
    intended, sent = [], []

    async def send(index: int, intended_at: float) -> None:
        intended.append(intended_at)
        sent.append(perf_counter())
        if index == 0:
            time.sleep(0.4)  # noqa: ASYNC251 - this machine stalls, the event loop with it

    await open_loop(send, enumerate([0.0, 0.05, 0.1, 0.15]), perf_counter())
    assert [at - intended[0] for at in intended] == pytest.approx([0.0, 0.05, 0.1, 0.15])
    assert all(at - due > 0.2 for at, due in zip(sent[1:], intended[1:], strict=True))


async def test_a_closed_loop_keeps_exactly_its_concurrency_running():
    running: set[int] = set()
    peaks, done = [], []

    async def send(index: int, intended_at: float) -> None:
        assert intended_at == pytest.approx(perf_counter(), abs=0.05)  # it is intended for now
        running.add(index)
        peaks.append(len(running))
        await asyncio.sleep(0.001 * (1 + index % 3))
        running.remove(index)
        done.append(index)

    await closed_loop(send, range(20), concurrency=3)
    assert sorted(done) == list(range(20))
    assert peaks == [1, 2] + [3] * 18
