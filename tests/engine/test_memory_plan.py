"""What fits is counted before it is taken, and what does not fit is refused with the flag that would make it fit."""

from unittest.mock import patch

import pytest
from transformers import LlamaConfig

from gear_compression import PRESETS, layout_for
from gear_engine import plan as plan_module
from gear_engine.plan import MemoryPlan, parse_memory, plan_memory
from gear_engine.protocol import EngineStartError

GIB = 2**30
LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64,
)  # fmt: skip


def planned(memory: str, **settings: int | str | None) -> MemoryPlan:
    layout = layout_for(PRESETS["near-lossless"], 16, 8, 64, 4)
    options = {"num_pages": None, "max_model_len": None, "max_running": 64, "max_batch_tokens": 512, **settings}
    with patch.object(plan_module, "host_bytes", return_value=64 * GIB):
        return plan_memory(
            LLAMA_1B,
            layout,
            runtime_bytes=GIB // 2,
            weights_bytes=5 * GIB,
            max_position=131072,
            memory=memory,
            **options,
        )  # type: ignore[arg-type]


def test_a_length_that_was_not_asked_for_shrinks_to_what_fits() -> None:
    small, large = planned("8GiB"), planned("32GiB")
    assert 1000 < small.max_model_len < large.max_model_len <= 131072
    assert small.headroom_bytes >= 0
    assert large.headroom_bytes >= 0


def test_every_byte_of_the_budget_is_in_a_row() -> None:
    plan = planned("16GiB", max_model_len=4096)
    assert sum(row.num_bytes for row in plan.rows()) == 16 * GIB
    assert plan.concurrency(1024) > 100
    assert plan.tokens_gear > 3 * plan.tokens_bf16


@pytest.mark.parametrize(("memory", "remedy"), [("5GiB", "raise --memory"), ("7GiB", "lower --max-model-len")])
def test_too_little_memory_names_the_flag(memory: str, remedy: str) -> None:
    with pytest.raises(EngineStartError, match=remedy):
        planned(memory, max_model_len=None if memory == "5GiB" else 131072)


def test_a_short_length_is_served_and_a_long_one_refused() -> None:
    assert planned("16GiB", max_model_len=3).max_model_len == 3
    with pytest.raises(EngineStartError, match="131072"):
        planned("16GiB", max_model_len=200_000)


def test_pages_that_were_asked_for_override_memory() -> None:
    assert planned("16GiB", num_pages=77).num_pages == 77
    with pytest.raises(EngineStartError, match="raise --num-pages"):
        planned("16GiB", num_pages=2)


def test_swap_space_is_of_the_budget_and_can_be_turned_off() -> None:
    auto, off, fixed = planned("16GiB"), planned("16GiB", swap_space="0"), planned("16GiB", swap_space="2GiB")
    room = auto.pages_bytes + auto.swap_bytes
    assert auto.swap_bytes == pytest.approx(room / 8, rel=0.01)
    assert off.swap_bytes == 0
    assert off.num_pages > auto.num_pages
    assert fixed.swap_bytes == pytest.approx(2 * GIB, rel=0.01)
    assert planned("64GiB", max_model_len=4096).swap_bytes <= 4 * GIB
    for wrong in ("much", "4", "-1GiB", "0.5"):
        with pytest.raises(EngineStartError, match="--swap-space"):
            planned("16GiB", swap_space=wrong)
    with pytest.raises(EngineStartError, match="lower --swap-space"):
        planned("16GiB", swap_space="15GiB")


def test_memory_is_a_fraction_or_a_size() -> None:
    assert parse_memory("0.25", 100 * GIB) == 25 * GIB
    assert parse_memory("8GiB", 100 * GIB) == 8 * GIB
    assert parse_memory("8 gb", 100 * GIB) == 8 * 10**9
    assert parse_memory("auto", 100 * GIB) == 50 * GIB
    for wrong in ("much", "8", "-1GiB", "200GiB", "nan"):
        with pytest.raises(EngineStartError, match="--memory"):
            parse_memory(wrong, 100 * GIB)
