"""A request whose grammar is being compiled makes nobody wait, and can be aborted meanwhile."""

import threading

import pytest
from llguidance import LLMatcher

from gear_engine.engine import Engine
from gear_engine.process import COMPILE_CHECK_MS, _Arrivals
from gear_engine.protocol import AbortRequest, AddRequest, RequestError, RequestOutput, SamplingParams


class SlowGrammars:
    """Compiles when it is told to."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def matcher(self, grammar: str) -> LLMatcher:
        assert self.go_on.wait(10)
        raise RequestError("no such grammar", "structured_outputs")


class NotingEngine:
    """Takes note of what is added."""

    has_work = False

    def __init__(self) -> None:
        self.grammars = SlowGrammars()
        self.added: list[str] = []

    def add(self, request: AddRequest) -> None:
        self.added.append(request.request_id)
        if request.params.grammar:
            self.grammars.matcher(request.params.grammar)

    def abort(self, request_id: str) -> RequestOutput | None:
        return None


@pytest.fixture
def engine() -> NotingEngine:
    return NotingEngine()


@pytest.fixture
def arrivals(engine: NotingEngine) -> _Arrivals:
    fake: Engine = engine  # type: ignore[assignment]
    return _Arrivals(fake)


def ask(name: str, grammar: str = "") -> AddRequest:
    return AddRequest(name, [1], SamplingParams(max_tokens=1, grammar=grammar))


def until_compiled(arrivals: _Arrivals) -> list[RequestOutput]:
    for _ in range(1000):
        if outputs := arrivals.compiled():
            return outputs
        threading.Event().wait(0.005)
    raise AssertionError("it never compiled")


def test_others_pass_one_that_is_being_compiled(engine: NotingEngine, arrivals: _Arrivals) -> None:
    assert arrivals.wait_ms is None
    assert arrivals.take(ask("slow", "x")) == []
    assert arrivals.take(ask("quick")) == []
    assert arrivals.compiled() == []
    assert engine.added == ["quick"]
    assert arrivals.wait_ms == COMPILE_CHECK_MS
    engine.grammars.go_on.set()
    (output,) = until_compiled(arrivals)
    assert (output.request_id, output.finish_reason, output.error) == ("slow", "error", "no such grammar")
    assert arrivals.wait_ms is None


def test_one_that_is_aborted_meanwhile_never_runs(engine: NotingEngine, arrivals: _Arrivals) -> None:
    arrivals.take(ask("slow", "x"))
    (output,) = arrivals.take(AbortRequest("slow"))
    assert (output.request_id, output.finish_reason) == ("slow", "abort")
    engine.grammars.go_on.set()
    assert arrivals.compiled() == []
    assert engine.added == []
    assert arrivals.take(AbortRequest("slow")) == []
