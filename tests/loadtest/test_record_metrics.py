from array import array

import numpy as np
import pytest
from numpy.typing import ArrayLike

from gear_loadtest.distribution import Distribution, Histogram
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


def distribution(values: ArrayLike) -> Distribution | None:
    histogram = Histogram()
    histogram.add_many(values)
    return histogram.distribution()


def test_a_distribution_of_a_hundred_and_one_numbers_is_read_off_them():
    found = distribution(array("d", reversed(range(101))))
    assert found is not None
    assert (found.mean, found.max) == (50, 100)
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx((50, 90, 95, 99), rel=0.0025)


def test_a_distribution_interpolates_and_admits_to_having_nothing():
    found = distribution([1.0, 2.0])
    assert found is not None
    assert (found.p50, found.p90) == pytest.approx((1.5, 1.9))
    assert distribution([]) is None


def test_a_histogram_keeps_percentiles_to_a_quarter_of_a_percent():
    values = np.random.default_rng(1).lognormal(mean=-3, sigma=1.5, size=20_000)
    found = distribution(values)
    assert found is not None
    expected = np.percentile(values, [50, 90, 95, 99])
    assert (found.p50, found.p90, found.p95, found.p99) == pytest.approx(tuple(expected), rel=0.003)
    assert found.mean == pytest.approx(values.mean())


def test_histograms_add_up_and_survive_json():
    whole, part = Histogram(), Histogram()
    whole.add_many([0.0, 0.1, 0.2])
    part.add(0.3)
    whole.merge(Histogram.decode(part.encode()))
    whole.merge(Histogram.decode(Histogram().encode()))
    assert (whole.num, whole.min, whole.max, sum(whole.buckets.values())) == (4, 0.0, 0.3, 4)
    assert Histogram.decode(whole.encode()) == whole
