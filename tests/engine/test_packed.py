"""Packed weights: the same products in float32, rounded ones in bfloat16, counted bytes, and a choice that is said."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from gear_engine.config import EngineConfig
from gear_engine.model_loader import weights_bytes
from gear_engine.packed import FEW_ROWS, Products, fastest_products, pack_linears
from gear_engine.start import planned_memory, start_engine

SHAPE = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
FULL = Products(torch.float32, torch.float32)
HALF = Products(torch.bfloat16, torch.bfloat16)
MIXED = Products(torch.float32, torch.bfloat16)


def built(tie: bool = False) -> PreTrainedModel:
    """With biases on Q, K and V."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SHAPE, tie_word_embeddings=tie)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.requires_grad_(False)


def logits(model: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    return model(torch.arange(num_tokens)[None] * 7 % 200, use_cache=False).logits


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("num_tokens", [1, FEW_ROWS, FEW_ROWS + 1, 200])
@pytest.mark.parametrize(
    # bfloat16 has 8 bits: half a unit is 0.2 %, and two layers add a few of those up.
    ("products", "tolerance"),
    [(FULL, 1e-5), (HALF, 0.02)],
    ids=["float32", "bfloat16"],
)
def test_a_packed_model_computes_what_it_did(products, tolerance, num_tokens, tie):
    model = built(tie)
    before = logits(model, num_tokens)
    pack_linears(model, products)
    after = logits(model, num_tokens)
    assert after.dtype == torch.float32
    assert (after - before).norm() <= tolerance * before.norm()


def test_few_rows_and_many_may_multiply_in_different_dtypes():
    few, many = FEW_ROWS, FEW_ROWS + 1
    expected = {rows: logits(built(), rows) for rows in (few, many)}
    model = built()
    pack_linears(model, MIXED)
    errors = {rows: float((logits(model, rows) - expected[rows]).norm() / expected[rows].norm()) for rows in expected}
    assert errors[few] < 1e-5
    assert 1e-3 < errors[many] < 0.02


def test_a_bfloat16_model_stays_one():
    model = built().bfloat16()
    before = logits(model, 5)
    pack_linears(model, HALF)
    assert logits(model, 5).dtype == torch.bfloat16
    assert (logits(model, 5) - before).norm() <= 0.02 * before.norm()


def test_the_bytes_of_packed_weights_are_counted():
    linear_weights = sum(m.weight.numel() for m in built().modules() if isinstance(m, nn.Linear))
    embedding = 200 * 64 * 4
    for products, num_bytes in ((FULL, 4), (HALF, 2), (MIXED, 6)):
        model = built()
        assert pack_linears(model, products) == num_bytes * linear_weights
        assert embedding <= weights_bytes(model) < embedding + 8192  # biases, norms and rotary frequencies remain
    tied = built(tie=True)
    pack_linears(tied, FULL)
    assert tied.model.embed_tokens.weight.nbytes == embedding  # the packed output layer did not take it along


def test_a_layer_without_rows_gives_none():
    # as an expert that no token was sent to
    layer = nn.Sequential(nn.Linear(64, 32))
    pack_linears(layer, HALF)
    assert layer(torch.empty(0, 64)).shape == (0, 32)


def test_the_choice_follows_what_was_measured():
    products = fastest_products()
    for dtype, speedup in ((products.few_rows, products.few_speedup), (products.many_rows, products.many_speedup)):
        assert dtype in (torch.float32, torch.bfloat16)
        if speedup is None:  # no bfloat16 in this processor
            assert dtype == torch.float32
        else:
            assert (dtype == torch.bfloat16) == (speedup >= 1.2)
            assert f"{speedup:.1f}x" in str(products)


def test_starting_says_in_which_dtype_it_multiplies_and_plans_with_those_bytes(tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = {"model": str(tmp_path), "num_pages": 8, "max_model_len": 200}
    full = start_engine(EngineConfig(**config, dtype="float32")).info
    half = start_engine(EngineConfig(**config, dtype="bfloat16")).info
    plain = start_engine(EngineConfig(**config, dtype="float32", backend="reference")).info
    assert "products  float32 for decoding, float32 for prompts" in full.memory_table
    assert "products  bfloat16 for decoding, bfloat16 for prompts" in half.memory_table
    assert "products  of weights as PyTorch keeps them" in plain.memory_table
    weights = {row.kind: row.num_bytes for row in full.memory}["weights"]
    assert weights == planned_memory(EngineConfig(**config, dtype="float32")).weights_bytes
    assert weights == {row.kind: row.num_bytes for row in plain.memory}["weights"]
    measured = start_engine(EngineConfig(**config)).info  # auto
    assert "products  " in measured.memory_table
    assert measured.dtype == "float32"
