"""Large key biases, as Qwen2.5 has them, break per-token INT4; the shipped formats must hold."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from gear_engine.fidelity.subjects import exact_subject, subjects
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.model_loader import LoadedModel, load_model

SHAPE = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
HALF = 16  # channels i and i + HALF are a pair that RoPE turns together
SLOW, FAST = (15, 13), (4, 6)  # pairs: a fraction of a turn in a page, and several turns
CACHES = ["int4", "near-lossless", "balanced", "gear-4bit"]
TEXT = [(7 * i * i + 3 * i) % 125 + 3 for i in range(600)]


def kl_with_biases(folder: Path, bias: float, pairs: tuple[int, ...]) -> dict[str, float]:
    """Mean KL of each cache on a small Qwen2 whose keys have ±bias on the channels of `pairs`."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05 if "q_proj" in name else 0.15)
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.bias.data.view(-1, 2 * HALF)
        for i, pair in enumerate(pairs):
            heads[:, pair], heads[:, pair + HALF] = (bias, -0.7 * bias) if i % 2 else (-bias, 0.7 * bias)
    model.save_pretrained(folder)
    loaded: LoadedModel = load_model(folder, "cpu", torch.float32)
    measured = compare(exact_subject(loaded, "exact"), subjects(loaded, CACHES), [TEXT], lambda name: None)
    return {name: float(measured[name].summary()["kl_mean"]) for name in CACHES}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return kl_with_biases(tmp_path_factory.mktemp("none"), 0.0, SLOW)


@pytest.mark.parametrize("bias", [20.0, 60.0])
def test_biases_that_turn_slowly_break_int4_alone(bias: float, without: dict[str, float], tmp_path: Path) -> None:
    kl = kl_with_biases(tmp_path, bias, SLOW)
    assert kl["int4"] > 8 * without["int4"]
    for name in ("near-lossless", "balanced", "gear-4bit"):
        assert kl[name] < 1.2 * without[name]
    if bias == 60.0:
        assert kl["int4"] > 10 * max(kl["near-lossless"], kl["balanced"], kl["gear-4bit"])


def test_low_rank_takes_up_biases_that_turn_fast(without: dict[str, float], tmp_path: Path) -> None:
    """Their channels run through ±bias in every page. Factors without a code for 0 gave five times the KL here."""
    kl = kl_with_biases(tmp_path, 60.0, FAST)
    assert kl["near-lossless"] < 2.5 * without["near-lossless"]
    assert kl["int4"] > 20 * kl["near-lossless"]
