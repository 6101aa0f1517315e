"""Priorities age, so that nobody starves, and a request that was given a time ends when it is over."""

import math
import time

import pytest
from test_engine_steps import ScriptedRunner, add, engine, run, tokens
from test_prefix_cache import ask

from gear_engine.engine import Engine
from gear_engine.protocol import AddRequest, RequestError, SamplingParams
from gear_engine.scheduler import ARRIVALS_PER_PRIORITY, service_order


def test_a_stream_of_urgent_requests_overtakes_a_patient_one_a_bounded_number_of_times() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=8, max_running=1)
    add(target, "first", 8, max_tokens=1)
    add(target, "patient", 8, priority=1, max_tokens=1)
    for i in range(2 * ARRIVALS_PER_PRIORITY):  # one more for every step, so that there is never room for all
        add(target, str(i), 8, priority=0, max_tokens=1)
        target.step()
        if not any(s.request_id == "patient" for s in target.scheduler.waiting):
            break
    served = [name for step in runner.steps for name, _, _ in step]
    assert served[-1] == "patient"
    assert served.index("patient") == ARRIVALS_PER_PRIORITY  # after the one that was first and 999 later ones
    target.scheduler.check_integrity()


def test_an_old_request_of_low_priority_is_no_longer_preempted_for_a_new_one() -> None:
    for num_between, survivors in ((1, ["new", "older"]), (ARRIVALS_PER_PRIORITY, ["older", "old"])):
        target = engine(ScriptedRunner(), num_slots=10, chunk=64)
        for name in ("older", "old"):
            add(target, name, 30, priority=1, max_tokens=300)
        target.step()
        target._num_arrivals += num_between
        add(target, "new", 30, priority=0, max_tokens=300)
        while target.has_work and not target.stats().preemptions_total:
            target.step()
        assert [s.request_id for s in target.scheduler.running] == survivors


def test_equal_priorities_run_in_the_order_of_arrival() -> None:
    assert sorted([service_order(0, 3), service_order(0, 1), service_order(0, 2)]) == [(1, 1), (2, 2), (3, 3)]
    assert service_order(1, 1) > service_order(0, 1000) > service_order(-1, 1999)
    assert service_order(1, 1) < service_order(0, 1001)


def limited(target: Engine, name: str, num_prompt: int, timeout_s: float) -> None:
    params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    target.add(AddRequest(name, [1] * num_prompt, params, timeout_s=timeout_s))


def test_a_request_ends_as_it_is_when_its_time_is_over_in_any_phase() -> None:
    target = engine(ScriptedRunner(), num_slots=60, chunk=64, max_running=2, num_host_slots=20)
    limited(target, "decodes", 30, 3600)
    limited(target, "in its prompt", 190, 3600)
    limited(target, "waits", 30, 3600)
    limited(target, "swapped out", 31, 3600)
    add(target, "unlimited", 10, max_tokens=100)
    for _ in range(3):
        target.step()
    target.scheduler._preempt(target.scheduler.running[0])
    target.step()
    for sequence in [*target.scheduler.running, *target.scheduler.waiting]:
        if sequence.deadline_s is not None:
            sequence.deadline_s = time.monotonic()
    target._deadlines = [(time.monotonic(), number, sequence) for _, number, sequence in target._deadlines]
    outputs = run(target)
    ended = {name: [output.finish_reason for output in each][-1] for name, each in outputs.items()}
    assert ended.pop("unlimited") == "length"
    assert set(ended.values()) == {"abort"}
    assert len(ended) == 4
    assert target.stats().pages_active == target.scheduler.host.num_active == target.stats().num_swapped == 0


def test_a_deadline_is_of_one_request_and_not_of_its_name() -> None:
    target = engine(ScriptedRunner())
    limited(target, "a", 5, 0.02)
    assert target.abort("a") is not None
    ask(target, "a", [1] * 5, max_tokens=3)
    time.sleep(0.03)
    assert run(target)["a"][-1].finish_reason == "length"


def test_time_runs_out_while_a_request_decodes() -> None:
    target = engine(ScriptedRunner())
    limited(target, "a", 5, 0.05)
    while target.has_work:
        outputs = target.step().outputs
        time.sleep(0.01)
    assert [output.finish_reason for output in outputs] == ["abort"]
    assert tokens(outputs) == []
    assert 0 < target.stats().generation_tokens_total < 200
    assert target.stats().pages_active == 0


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
def test_no_time_at_all_is_refused(timeout_s: float) -> None:
    with pytest.raises(RequestError, match="timeout") as refused:
        limited(engine(ScriptedRunner()), "a", 5, timeout_s)
    assert refused.value.param == "timeout"
