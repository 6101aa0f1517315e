"""When pages run out a sequence's bytes go to host memory and come back as they were; without room it starts over."""

import hashlib

import pytest
from greedy import RecordingRunner, generate, parts_only_at_near_ties
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_steps import ScriptedRunner, engine, run, tokens
from test_prefix_cache import SYSTEM, ask, computed
from test_same_answers import ARCHITECTURES, PROMPTS, tiny_model

from gear_compression import PRESETS, layout_for
from gear_engine.engine import Engine, Limits
from gear_engine.model_loader import LoadedModel
from gear_engine.prefix_cache import Move, Page, PrefixCache, runs
from gear_engine.runner import ModelRunner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Sequence
from gear_engine.slots import SlotAllocator

SHORT = [prompt[:30] for prompt in PROMPTS]  # admitted while there is room, then each grows by a slot or two


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])


@pytest.mark.parametrize("preset", ["near-lossless", "gear-4bit", "none"])
def test_answers_do_not_depend_on_swapping(llama: LoadedModel, preset: str) -> None:
    squeeze = {"near-lossless": 15, "gear-4bit": 10, "none": 10}[preset]
    max_tokens = 200 if preset == "none" else 100
    texts, runner, roomy = generate(llama, SHORT, preset, max_tokens=max_tokens)
    assert roomy.num_swaps_out == 0
    for num_host_slots in (200, 3, 0):
        squeezed, _, scheduler = generate(
            llama, SHORT, preset, num_slots=squeeze, max_tokens=max_tokens, num_host_slots=num_host_slots
        )
        assert (scheduler.num_swaps_out > 0) == (num_host_slots > 0)
        assert (scheduler.num_preemptions > 0) == (num_host_slots < 200)
        for i, (a, b) in enumerate(zip(texts, squeezed, strict=True)):
            assert parts_only_at_near_ties(a, b, runner, str(i))


@pytest.mark.parametrize("preset", ["near-lossless", "none"])
def test_bytes_come_back_as_they_were(llama: LoadedModel, preset: str) -> None:
    layout = layout_for(PRESETS[preset], llama.num_layers, llama.num_kv_heads, llama.head_dim, 4)
    model = ModelRunner(llama, layout, 24, "cpu", 24)
    scheduler = Scheduler(
        SlotAllocator(24), layout, max_running=8, max_batch_tokens=512, eos_token_ids=[], num_host_slots=24
    )
    target = Engine(scheduler, RecordingRunner(model), Sampler(llama.vocab_size, []), Limits(512, llama.vocab_size))

    def checksum(sequence: Sequence) -> str:
        slots = [page.slot for page in sequence.pages] + sequence.open_slots
        return hashlib.sha256(model.slab[slots].numpy().tobytes()).hexdigest()

    ask(target, "late", SYSTEM, priority=9, max_tokens=40)
    while not target.step().outputs:
        pass
    (late,) = scheduler.running
    before, num_computed = checksum(late), late.num_computed
    scheduler._preempt(late)
    assert sorted(scheduler.cache.take(24) or []) == list(range(24))  # nothing of it stays in the pool
    scheduler.allocator.give_back(list(range(24)))
    scheduler.check_integrity()
    assert scheduler.stats(0).kv_swapped_bytes == scheduler.host.num_active * layout.page_bytes > 0
    assert scheduler.stats(0).num_swapped == 1
    batch = scheduler.schedule()
    model.slab[sorted(scheduler.allocator._free)] = 0
    model.move([move for move in batch.moves if move.out])
    model.slab[:] = 0
    model.move([move for move in batch.moves if not move.out])
    assert checksum(late) == before
    assert [item.start for item in batch.scheduled] == [late.num_computed] == [num_computed]
    assert (scheduler.num_swaps_out, scheduler.num_swaps_in, scheduler.num_preemptions) == (1, 1, 0)


def test_a_swapped_sequence_computes_nothing_twice() -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=10, num_host_slots=40)
    for i in range(3):
        ask(target, str(i), [i] * 30, max_tokens=300)
    outputs = run(target)
    stats = target.stats()
    assert stats.swaps_out_total == stats.swaps_in_total > 0
    assert stats.preemptions_total == 0
    for i in range(3):
        assert computed(runner, str(i)) == 30 + 300 - 1
        assert len(tokens(outputs[str(i)])) == 300


def test_an_aborted_sequence_leaves_host_memory() -> None:
    target = engine(ScriptedRunner(), num_slots=14, chunk=64, num_host_slots=40)
    ask(target, "late", [1] * 100, priority=5, max_tokens=200)
    while not target.step().outputs:
        pass
    target.scheduler._preempt(target.scheduler.running[0])
    assert target.scheduler.host.num_active > 0
    assert target.abort("late") is not None
    assert target.scheduler.host.num_active == 0
    target.scheduler.check_integrity()


def test_a_cached_prefix_outlives_the_pool_in_host_memory() -> None:
    runner = ScriptedRunner()
    target = engine(runner, num_slots=10, num_host_slots=40)
    for i, prompt in enumerate((SYSTEM, [5] * 390, [6] * 390, [9] * 390)):
        ask(target, str(i), prompt)
        run(target)
    assert len(runner.moves) >= 2
    assert all(move.out for move in runner.moves)
    ask(target, "second", SYSTEM)
    outputs = run(target)
    assert outputs["second"][0].num_cached_tokens == 256
    assert any(not move.out for move in runner.moves)


def test_host_memory_drops_the_longest_unused_first() -> None:
    allocator, host = SlotAllocator(1), SlotAllocator(2)
    cache = PrefixCache(allocator, host)
    for salt in "abcd":
        slots = cache.take(1)
        assert slots is not None
        cache.release([cache.add(None, salt, b"x", slots[0])])
        cache.check_integrity([])
    assert [len(cache.find(salt, [b"x"])) for salt in "abcd"] == [0, 1, 1, 1]
    (b,) = cache.find("b", [b"x"])
    assert cache.hold([b])  # its place in host memory is not given to what makes room for it
    assert [len(cache.find(salt, [b"x"])) for salt in "abcd"] == [0, 1, 0, 1]
    assert not b.in_host
    assert not cache.hold(cache.find("d", [b"x"]))
    cache.check_integrity([b])


def test_what_comes_in_waits_only_for_what_was_in_its_place() -> None:
    cache = PrefixCache(SlotAllocator(4), SlotAllocator(8))
    for salt in "ab":
        slots = cache.take(4)
        assert slots is not None
        pages: list[Page] = []
        for i, slot in enumerate(slots):
            pages.append(cache.add(pages[-1] if pages else None, salt, bytes([i]), slot))
        cache.release(pages)
    cache.moves.clear()
    assert cache.hold(cache.find("a", [bytes([i]) for i in range(4)]))
    moves = [move for move in cache.moves if isinstance(move, Move)]
    assert [run.after for run in runs(moves, 1) if not run.out] == [1, 2, 3, 4]


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=24),
    st.integers(1, 5),
    st.booleans(),
)
def test_both_directions_at_once_end_as_the_order_given_does(
    places: list[tuple[int, int, bool]], size: int, first: bool
) -> None:
    """Even if one direction runs ahead of the other as far as it may."""
    moves = [Move(*place) for place in places]

    def end(ordered: list[Move]) -> tuple[list[str], list[str]]:
        pool, host = [f"pool {i}" for i in range(4)], [f"host {i}" for i in range(4)]
        for move in ordered:
            if move.out:
                host[move.host_slot] = pool[move.slot]
            else:
                pool[move.slot] = host[move.host_slot]
        return pool, host

    waiting = {out: [run for run in runs(moves, size) if run.out == out] for out in (True, False)}
    over = {True: 0, False: 0}
    made: list[Move] = []
    while waiting[True] or waiting[False]:
        out = next(way for way in (first, not first) if waiting[way] and waiting[way][0].after <= over[not way])
        made += waiting[out].pop(0).moves
        over[out] += 1
    assert len(made) == len(moves)
    assert end(made) == end(moves)
