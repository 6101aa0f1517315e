"""The engine's decisions with a scripted runner: no model, so every step is known beforehand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_compression import PRESETS, layout_for
from gear_compression.layout import Layout
from gear_engine.engine import Engine, Limits
from gear_engine.page_store import PageStore
from gear_engine.prefix_cache import Move
from gear_engine.protocol import AddRequest, PromptTooLong, RequestError, RequestOutput, SamplingParams
from gear_engine.runner import RunResult
from gear_engine.sampler import Sampler
from gear_engine.scheduler import MIN_CHUNK, Scheduler
from gear_engine.sequence import Scheduled, Sequence
from gear_engine.slots import SlotAllocator, num_slots_for_one

VOCAB, EOS = 100, 7


class ScriptedRunner:
    """The next token is the position it is computed at, modulo the vocabulary; some requests go wrong."""

    overlaps = False

    def __init__(self, poisoned: str = "", too_large: int = 10**9) -> None:
        self.poisoned = poisoned
        self.too_large = too_large  # tokens in a step that memory does not suffice for
        self.steps: list[list[tuple[str, int, int]]] = []
        self.moves: list[Move] = []
        self.loaded: list[int] = []

    def move(self, moves: list[Move]) -> None:
        self.moves += moves

    def read_page(self, slot: int, *, in_host: bool) -> bytes:
        return bytes(4)

    def write_page(self, slot: int, data: bytes) -> None:
        self.loaded.append(slot)

    def peak_memory_bytes(self) -> int:
        return 0

    def run(self, scheduled: list[Scheduled]) -> RunResult:
        if sum(item.num_new for item in scheduled) >= self.too_large:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        self.steps.append([(item.sequence.request_id, item.start, item.num_new) for item in scheduled])
        rows = [item for item in scheduled if item.samples]
        logits = torch.zeros(len(rows), VOCAB)
        for row, item in zip(logits, rows, strict=True):
            row[(item.start + item.num_new) % VOCAB] = 5.0
        return RunResult(logits, [], torch.tensor([item.sequence.request_id == self.poisoned for item in scheduled]))

    def keep_drawn(self, sequences: list[Sequence], tokens: list[torch.Tensor]) -> None:
        pass


def tiny_layout(preset: str) -> Layout:
    return layout_for(PRESETS[preset], 1, 1, 16, 4)


def engine(
    runner: ScriptedRunner,
    num_slots: int = 60,
    chunk: int = 64,
    preset: str = "near-lossless",
    *,
    max_running: int = 4,
    prefix_cache: bool = True,
    num_host_slots: int = 0,
    store: PageStore | None = None,
    chunk_tokens: int | None = None,
    far_tokens: int | None = None,
    max_model_len: int = 400,
) -> Engine:
    scheduler = Scheduler(
        SlotAllocator(num_slots),
        tiny_layout(preset),
        max_running=max_running,
        max_batch_tokens=chunk,
        eos_token_ids=[EOS],
        prefix_cache=prefix_cache,
        num_host_slots=num_host_slots,
        store=store,
        chunk_tokens=chunk_tokens,
        far_tokens=far_tokens,
    )
    return Engine(scheduler, runner, Sampler(VOCAB, [EOS]), Limits(max_model_len, VOCAB))


def add(target: Engine, name: str, num_prompt: int, priority: int = 0, **params: object) -> None:
    settings_ = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **params})  # type: ignore[arg-type]
    target.add(AddRequest(name, [1] * num_prompt, settings_, priority))


def run(target: Engine, max_steps: int = 2000) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(max_steps):
        if not target.has_work:
            break
        for output in target.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        target.scheduler.check_integrity()
    assert not target.has_work, "it never ends"
    assert target.scheduler.allocator.num_active == 0
    return outputs


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_decodes_go_first_and_prompts_fill_what_the_budget_leaves() -> None:
    runner = ScriptedRunner()
    target = engine(runner)
    add(target, "a", 10)
    target.step()
    add(target, "b", 100)
    target.step()
    target.step()
    assert runner.steps == [[("a", 0, 10)], [("a", 10, 1), ("b", 0, 63)], [("a", 11, 1), ("b", 63, 37)]]


def test_a_prompt_that_arrives_beside_decodes_comes_in_chunks_that_shrink_behind_what_it_has() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=1000, chunk_tokens=48, far_tokens=500, max_model_len=4000)
    add(target, "a", 100, max_tokens=100)
    add(target, "b", 50, max_tokens=100)
    target.step()
    add(target, "long", 2800)
    run(target)
    assert runner.steps[0] == [("a", 0, 100), ("b", 0, 50)]  # nobody decodes yet
    beside = [step[2] for step in runner.steps[1:] if len(step) == 3]
    assert beside[0] == ("long", 0, 50)  # and one for each that decodes
    assert all(num_new == max(50 * 500 // (500 + start), MIN_CHUNK) for _, start, num_new in beside)
    assert beside[-1][2] == MIN_CHUNK
    start = beside[-1][1] + MIN_CHUNK
    assert runner.steps[len(beside) + 1] == [("long", start, 2800 - start)]  # nobody decodes any more


def test_two_prompts_beside_decodes_share_one_bound() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=1000, chunk_tokens=47, far_tokens=500, max_model_len=4000)
    add(target, "a", 100, max_tokens=3)
    target.step()
    add(target, "b", 20)
    add(target, "c", 100)
    run(target)
    assert runner.steps[1] == [("a", 100, 1), ("b", 0, 20), ("c", 0, 28)]


def test_a_smaller_priority_number_runs_first() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=8)
    add(target, "late", 8, priority=1)
    add(target, "early", 8, priority=0)
    target.step()
    assert runner.steps == [[("early", 0, 8)]]


def test_a_poisoned_request_fails_alone() -> None:
    target = engine(ScriptedRunner(poisoned="bad"))
    for name in ("good", "bad", "fine"):
        add(target, name, 10)
    outputs = run(target)
    assert [output.finish_reason for output in outputs["bad"]] == ["error"]
    assert "NaN" in (outputs["bad"][0].error or "")
    assert tokens(outputs["good"]) == tokens(outputs["fine"]) == [10, 11, 12, 13, 14]


def test_out_of_memory_halves_the_batch_and_then_gives_up_one_request() -> None:
    target = engine(ScriptedRunner(too_large=20))
    add(target, "small", 10)
    add(target, "small too", 10)
    add(target, "large", 30)
    outputs = run(target)
    assert tokens(outputs["small"]) == tokens(outputs["small too"]) == [10, 11, 12, 13, 14]
    assert outputs["large"][-1].finish_reason == "error"
    assert "out of memory" in (outputs["large"][-1].error or "")


def test_any_other_failure_of_the_runner_is_not_swallowed() -> None:
    class Broken(ScriptedRunner):
        def run(self, scheduled: list[Scheduled]) -> RunResult:
            raise RuntimeError("a bug")

    target = engine(Broken())
    add(target, "a", 3)
    with pytest.raises(RuntimeError, match="a bug"):
        target.step()


def test_requests_end_as_asked() -> None:
    target = engine(ScriptedRunner())
    add(target, "eos", 5, ignore_eos=False)
    add(target, "not before three", 5, ignore_eos=False, min_tokens=3)
    add(target, "stop token", 5, stop_token_ids=(6,))
    add(target, "length", 5)
    outputs = run(target)
    assert tokens(outputs["eos"]) == [5, 6, EOS]
    assert outputs["eos"][-1].finish_reason == "stop"
    assert outputs["eos"][-1].stop_token_id == EOS
    assert len(tokens(outputs["not before three"])) >= 3
    assert tokens(outputs["stop token"]) == [5, 6]
    assert tokens(outputs["length"]) == [5, 6, 7, 8, 9]
    assert outputs["length"][-1].finish_reason == "length"


@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_abort_frees_everything_in_any_phase(num_steps: int) -> None:
    target = engine(ScriptedRunner())
    add(target, "a", 100, max_tokens=50)
    for _ in range(num_steps):
        target.step()
    output = target.abort("a")
    assert output is not None
    assert output.finish_reason == "abort"
    assert not target.has_work
    assert target.scheduler.allocator.num_active == 0
    assert target.abort("a") is None


def test_what_cannot_run_as_asked_is_refused_with_both_numbers() -> None:
    target = engine(ScriptedRunner())
    with pytest.raises(PromptTooLong, match=r"390 tokens.*20.*410.*400"):
        add(target, "long", 390, max_tokens=20)
    for wrong in ({"temperature": float("nan")}, {"top_p": 0.0}, {"max_tokens": 0}, {"logit_bias": {VOCAB: 1.0}}):
        with pytest.raises(RequestError) as refused:
            add(target, "wrong", 3, **wrong)
        assert refused.value.param == next(iter(wrong))
    assert not target.has_work


requests = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(requests, st.sampled_from(["near-lossless", "gear-4bit", "none"]), st.integers(4, 200), st.integers(0, 12))
def test_no_token_is_lost_or_repeated_however_small_the_pool(
    wanted: list[tuple[int, int, int]], preset: str, chunk: int, spare: int
) -> None:
    num_slots = num_slots_for_one(tiny_layout(preset), 400) + spare
    target = engine(ScriptedRunner(), num_slots, chunk, preset)
    for i, (num_prompt, max_tokens, priority) in enumerate(wanted):
        add(target, str(i), num_prompt, priority, max_tokens=max_tokens)
    outputs = run(target)
    for i, (num_prompt, max_tokens, _) in enumerate(wanted):
        assert tokens(outputs[str(i)]) == [n % VOCAB for n in range(num_prompt, num_prompt + max_tokens)]


def test_a_long_prompt_waits_until_all_of_it_fits_instead_of_starting_over() -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=24, chunk=64)
    for name in "abc":
        add(target, name, 100, max_tokens=100)
    for _ in range(8):
        target.step()
    add(target, "long", 390, max_tokens=5)
    outputs = run(target)
    assert len(tokens(outputs["long"])) == 5
    computed = sum(num_new for step in runner.steps for name, _, num_new in step if name == "long")
    assert computed < 2 * 395


def test_slots_are_taken_from_the_lowest_priority_even_if_it_is_scheduled_already() -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=14, chunk=64)
    add(target, "late", 100, priority=5, max_tokens=200)
    for _ in range(3):
        target.step()
    add(target, "early", 300, priority=0, max_tokens=50)
    outputs = run(target)
    last_step = {name: i for i, step in enumerate(runner.steps) for name, _, _ in step}
    assert last_step["early"] < last_step["late"]
    computed = sum(num_new for step in runner.steps for name, _, num_new in step if name == "early")
    assert computed == 300 + 50 - 1  # never thrown out
    assert len(tokens(outputs["late"])) == 200 - 2  # two came before


def test_a_request_id_in_use_is_refused() -> None:
    target = engine(ScriptedRunner())
    add(target, "a", 3)
    with pytest.raises(RequestError, match="in use"):
        add(target, "a", 3)


def test_the_allocator_takes_all_or_nothing() -> None:
    allocator = SlotAllocator(5)
    first = allocator.take(3)
    assert first == [0, 1, 2]
    assert allocator.take(3) is None
    assert allocator.num_free == 2
    allocator.give_back(first)
    assert allocator.num_free == 5
    assert allocator.peak_active == 3
    with pytest.raises(AssertionError, match="free already"):
        allocator.give_back([0])
