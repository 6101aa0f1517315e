from array import array

import pytest

from gear_loadtest.distribution import distribution
from gear_loadtest.record import RequestRecord


def make_record(**changes: object) -> RequestRecord:
    values = {
        "intended_at": 10.0,
        "sent_at": 10.5,
        "chunk_times": array("d", [11.0, 11.2, 11.6]),
        "finished_at": 11.8,
        "completion_tokens": 5,
    }
    return RequestRecord(**(values | changes))  # type: ignore[arg-type]


def test_latencies_count_from_the_intended_start_and_service_from_the_send():
    record = make_record()
    assert record.ttft_s == pytest.approx(1.0)
    assert record.e2e_s == pytest.approx(1.8)
    assert record.service_ttft_s == pytest.approx(0.5)
    assert record.service_e2e_s == pytest.approx(1.3)


def test_itl_is_per_chunk_and_tpot_per_token_after_the_first():
    record = make_record()
    assert list(record.itls_s) == pytest.approx([0.2, 0.4])
    assert record.tpot_s == pytest.approx((11.8 - 11.0) / (5 - 1))


def test_chunks_stand_in_for_tokens_when_there_is_no_usage():
    record = make_record(completion_tokens=None)
    assert record.output_tokens == 3
    assert record.tpot_s == pytest.approx((11.8 - 11.0) / (3 - 1))


def test_what_was_not_measured_is_none_and_not_zero():
    assert make_record(completion_tokens=1).tpot_s is None
    silent = make_record(chunk_times=array("d"))
    assert silent.ttft_s is None
    assert silent.service_ttft_s is None
    assert silent.tpot_s is None
    assert len(silent.itls_s) == 0


def test_a_distribution_of_a_hundred_and_one_numbers_is_read_off_them():
    found = distribution(array("d", reversed(range(101))))
    assert found is not None
    assert (found.mean, found.p50, found.p90, found.p95, found.p99, found.max) == (50, 50, 90, 95, 99, 100)


def test_a_distribution_interpolates_and_admits_to_having_nothing():
    found = distribution([1.0, 2.0])
    assert found is not None
    assert (found.p50, found.p90) == pytest.approx((1.5, 1.9))
    assert distribution([]) is None
