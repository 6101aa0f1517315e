"""Slices, their bounded number and the steady window, from records written by hand."""

import pickle
from array import array

import pytest

from gear_loadtest.record import Failure, RequestRecord
from gear_loadtest.timeline import SteadyWindow, Tally, Timeline


def note(timeline: Timeline, at: float, length_s: float = 1.0, failure: Failure | None = None) -> None:
    """Sent when intended, two chunks, at half time and at the end."""
    end = at + length_s
    chunks = array("d", [at + length_s / 2, end])
    record = RequestRecord(at, at, chunks, end, "length", prompt_tokens=8, completion_tokens=4, failure=failure)
    timeline.note(record, end, is_good=failure is None)


def test_latencies_lie_where_a_request_began_and_tokens_where_they_arrived():
    timeline = Timeline(0.0, width_s=1.0)
    note(timeline, 0.5, length_s=2.0)
    assert [tally.num_ok for tally in timeline] == [1, 0, 0]
    assert [tally.output_tokens for tally in timeline] == [0, 2, 2]
    assert [tally.num_finished for tally in timeline] == [0, 0, 1]
    assert timeline.num_running() == pytest.approx([0.5, 1.0, 0.5])


def test_the_slices_of_a_day_are_few_and_lose_nothing():
    timeline = Timeline(0.0)
    for second in range(0, 86_400, 60):
        note(timeline, float(second))
    total = timeline.total()
    assert len(timeline.slices) <= 64
    assert (total.num_ok, total.num_finished, total.output_tokens) == (1440, 1440, 4 * 1440)
    assert total.busy_s == pytest.approx(1440)
    assert total.e2e_s.max == total.e2e_s.min == 1.0


def test_ten_times_the_requests_take_not_ten_times_the_memory():
    sizes = []
    for num in (2_000, 20_000):
        timeline = Timeline(0.0)
        for number in range(num):
            note(timeline, number / 100, length_s=0.5 + number % 97 / 100)
        sizes.append(len(pickle.dumps(timeline)))
    assert sizes[1] < 3 * sizes[0], sizes  # buckets fill up; what is kept of each request would be ten times as much


def test_a_warm_up_leaves_latencies_out_and_later_tokens_in():
    timeline = Timeline(10.0)
    note(timeline, 9.5)  # its chunks come at 10.0 and 10.5
    note(timeline, 8.0)
    total = timeline.total()
    assert (total.num_ok, total.e2e_s.num) == (0, 0)
    assert (total.num_finished, total.output_tokens) == (1, 4)


def test_errors_add_up_and_enter_no_latency():
    timeline = Timeline(0.0)
    note(timeline, 0.0, failure=Failure("timeout", ""))
    note(timeline, 0.0)
    total = timeline.total()
    assert (total.num_requests, total.num_ok, total.num_errors, total.e2e_s.num) == (2, 1, 1, 1)


def test_timelines_of_workers_join_whatever_their_widths():
    one, other, both = Timeline(0.0), Timeline(0.0), Timeline(0.0)
    for second in range(40):
        note(one if second < 3 else other, float(second))
        note(both, float(second))
    assert one.width_s != other.width_s
    one.merge(other)
    assert one.width_s == both.width_s
    assert [tally.num_ok for tally in one] == [tally.num_ok for tally in both]
    assert one.num_running() == pytest.approx(both.num_running())


def test_a_tally_survives_json():
    timeline = Timeline(0.0)
    note(timeline, 0.0)
    note(timeline, 0.0, failure=Failure("timeout", ""))
    assert Tally.decode(timeline.total().encode()) == timeline.total()


def test_the_steady_window_begins_when_the_load_has_built_up():
    timeline = Timeline(0.0)
    for tenth in range(400):
        note(timeline, tenth / 10, length_s=6.0)  # 60 under way once 6 s have passed
    found = timeline.steady_window()
    assert isinstance(found, SteadyWindow)
    assert 4.0 <= found.start_s <= 8.0
    assert 38.0 <= found.end_s <= 40.0
    assert found.num_running_mean == pytest.approx(60, rel=0.02)
    assert found.output_token_throughput == pytest.approx(40, rel=0.05)  # over the whole run: 4 * 400 / 46


def test_a_stall_in_the_middle_stays_in_the_steady_window():
    timeline = Timeline(0.0)
    for tenth in range(200):
        at = tenth / 10
        note(timeline, at, length_s=max(0.5, 12.0 - at) if at >= 10 else 0.5)  # nothing ends between 10 and 12 s
    found = timeline.steady_window()
    assert isinstance(found, SteadyWindow)
    assert found.start_s < 10
    assert found.ttft_p99_s is not None
    assert found.ttft_p99_s > 0.8


def test_a_server_that_falls_behind_has_no_steady_state():
    timeline = Timeline(0.0)
    for tenth in range(200):
        note(timeline, tenth / 10, length_s=0.2 + tenth / 10)
    assert "fell behind" in str(timeline.steady_window())


def test_a_short_run_has_none_and_says_so():
    timeline = Timeline(0.0)
    note(timeline, 0.0)
    assert "too short" in str(timeline.steady_window())
