"""Sealed pages outlive their sequences and are shared: what is found, what is waited for, and what is evicted."""

from itertools import pairwise
from pathlib import Path

import pytest
from greedy import RecordingRunner, generate, parts_only_at_near_ties
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_steps import VOCAB, ScriptedRunner, engine, run, tokens
from test_same_answers import ARCHITECTURES, tiny_model

from gear_compression import PRESETS, layout_for
from gear_engine.engine import Engine, Limits
from gear_engine.model_loader import LoadedModel
from gear_engine.prefix_cache import PrefixCache
from gear_engine.protocol import AddRequest, RequestOutput, SamplingParams
from gear_engine.runner import ModelRunner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator, num_slots_for_one

SYSTEM = [(11 * i * i + i) % 90 + 3 for i in range(300)]  # 2 full pages of 128 tokens


def ask(target: Engine, name: str, token_ids: list[int], *, salt: str = "", priority: int = 0, **more: object) -> None:
    params = SamplingParams(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **more})  # type: ignore[arg-type]
    target.add(AddRequest(name, token_ids, params, priority, salt))


def computed(runner: ScriptedRunner, name: str) -> int:
    return sum(num_new for step in runner.steps for request, _, num_new in step if request == name)


def cached_tokens(outputs: list[RequestOutput]) -> int:
    assert len({output.num_cached_tokens for output in outputs}) == 1
    return outputs[0].num_cached_tokens


@pytest.mark.parametrize("preset", ["near-lossless", "gear-4bit", "none"])
def test_a_second_request_computes_only_what_is_past_the_last_full_page(preset: str) -> None:
    runner = ScriptedRunner()
    target = engine(runner, preset=preset)
    page_size = target.scheduler.layout.page_size
    ask(target, "first", [*SYSTEM, 1, 2])
    run(target)
    ask(target, "second", [*SYSTEM, 3, 4, 5])
    outputs = run(target)
    shared = 300 // page_size * page_size
    assert computed(runner, "first") == 302 + 4
    assert computed(runner, "second") == 303 - shared + 4
    assert cached_tokens(outputs["second"]) == shared
    assert tokens(outputs["second"]) == [n % VOCAB for n in range(303, 308)]
    stats = target.stats()
    assert (stats.prefix_hits_total, stats.cached_tokens_total, stats.prompt_tokens_total) == (1, shared, 605)
    assert (stats.pages_active, stats.kv_tokens) == (0, 0)
    assert stats.pages_cached == shared // page_size
    assert stats.pages_free + stats.pages_cached == target.scheduler.allocator.num_slots


def test_the_last_token_is_always_computed_and_answers_are_found_too() -> None:
    runner = ScriptedRunner()
    target = engine(runner)
    ask(target, "first", SYSTEM[:256], max_tokens=130)
    outputs = run(target)
    ask(target, "again", SYSTEM[:256])
    assert cached_tokens(run(target)["again"]) == 128
    ask(target, "next turn", SYSTEM[:256] + tokens(outputs["first"]) + [9, 9])
    assert cached_tokens(run(target)["next turn"]) == 384


def test_a_request_finds_the_pages_of_one_that_still_runs() -> None:
    runner = ScriptedRunner()
    target = engine(runner)
    ask(target, "first", SYSTEM, max_tokens=50)
    while not target.step().outputs:
        pass
    ask(target, "second", SYSTEM)
    outputs = run(target)
    assert cached_tokens(outputs["second"]) == 256
    assert len(tokens(outputs["first"])) == 49  # one came before


def test_what_arrives_at_the_same_time_is_computed_once() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=400)
    for i in range(4):
        ask(target, f"shared {i}", [*SYSTEM, i])
    ask(target, "other", [5] * 20)
    outputs = run(target)
    assert computed(runner, "shared 0") == 301 + 4
    for i in range(1, 4):
        assert computed(runner, f"shared {i}") == 301 - 256 + 4
    assert tokens(outputs["other"]) == [20, 21, 22, 23, 24]
    starts = {name: i for i, step in reversed(list(enumerate(runner.steps))) for name, _, _ in step}
    assert starts["other"] < starts["shared 1"] == starts["shared 2"]  # nobody else waits with them


def test_nobody_waits_for_a_request_of_lower_priority() -> None:
    runner = ScriptedRunner()
    target = engine(runner, chunk=8)
    ask(target, "late", SYSTEM, priority=1)
    target.step()
    ask(target, "early", SYSTEM, priority=0)
    target.step()
    assert [name for name, _, _ in runner.steps[1]] == ["late"]  # whose chunk had filled the step
    run(target)
    assert computed(runner, "early") + computed(runner, "late") >= 300 + 4 + 44 + 4


def test_a_request_that_was_waited_for_may_be_aborted_or_fail() -> None:
    for runner in (ScriptedRunner(), ScriptedRunner(poisoned="first")):
        target = engine(runner, chunk=200)
        ask(target, "first", SYSTEM)
        ask(target, "second", SYSTEM)
        target.step()
        if not runner.poisoned:
            target.abort("first")
        outputs = run(target)
        assert tokens(outputs["second"]) == [0, 1, 2, 3, 4]
        assert cached_tokens(outputs["second"]) == (0 if runner.poisoned else 128)


def test_salts_are_apart_and_the_switch_turns_all_off() -> None:
    target = engine(ScriptedRunner())
    ask(target, "a", SYSTEM, salt="a")
    ask(target, "b", SYSTEM, salt="b")
    ask(target, "none", SYSTEM)
    outputs = run(target)
    assert [cached_tokens(outputs[name]) for name in ("a", "b", "none")] == [0, 0, 0]
    ask(target, "a again", SYSTEM, salt="a")
    assert cached_tokens(run(target)["a again"]) == 256
    off = engine(ScriptedRunner(), prefix_cache=False)
    for name in "abc":
        ask(off, name, SYSTEM)
    assert all(cached_tokens(each) == 0 for each in run(off).values())
    assert off.scheduler.allocator.num_free == off.scheduler.allocator.num_slots


def test_two_that_seal_the_same_page_in_one_step_keep_one_of_them() -> None:
    target = engine(ScriptedRunner(), chunk=400)
    ask(target, "a", SYSTEM[:128])
    ask(target, "b", SYSTEM[:128])  # computes its page itself: its last token is in it
    target.step()
    a, b = target.scheduler.running
    assert a.pages == b.pages
    assert a.pages[0].num_holders == 2
    run(target)
    assert target.stats().pages_cached == 1


def test_the_longest_unused_goes_first_and_of_a_chain_the_end() -> None:
    allocator = SlotAllocator(4)
    cache = PrefixCache(allocator, SlotAllocator(0))

    def chain(salt: str, *pages: bytes) -> None:
        held = cache.find(salt, pages)
        cache.hold(held)
        for tokens_ in pages[len(held) :]:
            slots = cache.take(1)
            assert slots is not None
            held.append(cache.add(held[-1] if held else None, salt, tokens_, slots[0]))
        cache.release(held)
        cache.check_integrity([])
        allocator.check_integrity()

    chain("", b"a", b"b", b"c")
    chain("", b"d")
    chain("", b"a")  # used again
    chain("", b"e", b"f")
    assert len(cache.find("", [b"a", b"b", b"c"])) == 1  # its end made room, then "b"
    assert len(cache.find("", [b"d"])) == 1
    assert len(cache.find("", [b"e", b"f"])) == 2
    chain("", b"g")
    assert cache.find("", [b"d"]) == []
    cache.hold(cache.find("", [b"e", b"f"]))
    assert cache.take(3) is None
    assert len(cache.find("", [b"a"])) == 1  # for nothing, nothing is evicted


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=40, chunk=64)
    ask(target, "late", SYSTEM, priority=5, max_tokens=40)
    while not target.step().outputs:
        pass
    target.scheduler._preempt(target.scheduler.running[0])
    target.scheduler.check_integrity()
    assert len(tokens(run(target)["late"])) == 39
    assert computed(runner, "late") == 300 + 39 + (300 - 256)
    assert target.stats().prefix_hits_total == 0  # what it finds of its own is no hit


def test_a_thousand_short_requests_pass_through_64_slots() -> None:
    target = engine(ScriptedRunner(), num_slots=64, chunk=512, max_running=32)
    for i in range(1000):
        ask(target, str(i), [i % 7] * 128 + [i % 50, i // 50, 3], max_tokens=3 + i % 9)
    outputs = run(target, max_steps=20_000)
    assert all(len(tokens(outputs[str(i)])) == 3 + i % 9 for i in range(1000))
    stats = target.stats()
    assert stats.pages_free + stats.pages_cached == 64
    assert stats.prefix_hits_total >= 990


prompt = st.builds(
    lambda parts: [token for part in parts for token in [part] * 50], st.lists(st.integers(1, 2), max_size=7)
)
requests = st.lists(st.tuples(prompt, st.integers(1, 60), st.integers(0, 2), st.sampled_from("ab")), max_size=9)


@settings(max_examples=60, deadline=None)
@given(requests, st.sampled_from(["near-lossless", "gear-4bit", "none"]), st.integers(4, 200), st.integers(0, 12))
def test_no_token_is_lost_or_repeated_whoever_shares_what(
    wanted: list[tuple[list[int], int, int, str]], preset: str, chunk: int, spare: int
) -> None:
    layout = layout_for(PRESETS[preset], 1, 1, 16, 4)
    runner = ScriptedRunner()
    target = engine(runner, num_slots_for_one(layout, 420) + spare, chunk, preset)
    for i, (token_ids, max_tokens, priority, salt) in enumerate(wanted):
        if i == len(wanted) // 2:
            for _ in range(3):
                target.step()
        ask(target, str(i), [8, *token_ids][-300:], salt=salt, priority=priority, max_tokens=max_tokens)
    run(target)
    for i, (token_ids, max_tokens, _, _) in enumerate(wanted):
        chunks = [(start, num) for step in runner.steps for name, start, num in step if name == str(i)]
        assert chunks[-1][0] + chunks[-1][1] == len([8, *token_ids][-300:]) + max_tokens - 1
        for (start, num), (following, _) in pairwise(chunks):
            assert following == start + num or following % layout.page_size == 0  # goes on, or was preempted


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])


def served(loaded: LoadedModel, preset: str, num_slots: int = 200) -> tuple[Engine, RecordingRunner]:
    layout = layout_for(PRESETS[preset], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 4)
    runner = RecordingRunner(ModelRunner(loaded, layout, num_slots, "cpu"))
    scheduler = Scheduler(SlotAllocator(num_slots), layout, max_running=8, max_batch_tokens=512, eos_token_ids=[])
    return Engine(scheduler, runner, Sampler(loaded.vocab_size, []), Limits(512, loaded.vocab_size)), runner


@pytest.mark.parametrize("preset", ["near-lossless", "max-compression", "gear-4bit", "none"])
def test_answers_do_not_depend_on_hits(llama: LoadedModel, preset: str) -> None:
    prompts = [SYSTEM + [60 + i] * (i + 1) for i in range(4)]
    alone = [generate(llama, [prompt], preset) for prompt in prompts]
    target, _ = served(llama, preset)
    for round_ in range(2):
        for i, prompt in enumerate(prompts):
            ask(target, str(i), prompt, max_tokens=24)
        outputs = run(target)
        assert sum(cached_tokens(each) > 0 for each in outputs.values()) == (4 if round_ else 3)
        for i, (texts, runner, _) in enumerate(alone):
            assert parts_only_at_near_ties(texts[0], tokens(outputs[str(i)]), runner, "0")


def test_a_hit_in_the_same_batch_gives_the_same_bits(llama: LoadedModel, tmp_path: Path) -> None:
    target, runner = served(llama, "near-lossless")
    seen = []
    for _ in range(3):
        ask(target, "0", SYSTEM, max_tokens=12)
        outputs = run(target)
        seen.append((tokens(outputs["0"]), {key: row.tolist() for key, row in runner.logprobs.items()}))
        runner.logprobs.clear()
    assert seen[1] == seen[2]
    assert cached_tokens(outputs["0"]) == 256


def test_n_answers_share_their_prompt_and_do_not_depend_on_each_other(llama: LoadedModel) -> None:
    def drawn(seeds: list[int]) -> list[list[int]]:
        target, _ = served(llama, "none")
        for seed in seeds:
            ask(target, str(seed), SYSTEM, max_tokens=12, temperature=1.0, seed=seed)
        while not all(s.num_output for s in target.scheduler.running) or target.scheduler.waiting:
            target.step()
        if len(seeds) > 1:  # all hold the same two pages
            assert {tuple(s.pages[:2]) for s in target.scheduler.running} == {
                tuple(target.scheduler.running[0].pages[:2])
            }
            assert target.scheduler.running[0].pages[0].num_holders == len(seeds)
        texts = {s.request_id: s.token_ids for s in target.scheduler.running}
        run(target)
        return [texts[str(seed)][300:] for seed in seeds]

    together = drawn([1, 2, 3, 4])
    assert together == [drawn([seed])[0] for seed in (1, 2, 3, 4)]
    assert len({tuple(text) for text in together}) > 1
