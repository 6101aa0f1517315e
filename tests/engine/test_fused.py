"""Fused projections: the same logits, the same weights under the same names, and hands off what is not known."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gear_engine.fused import fuse_projections

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def built(model_type: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**TINY, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {"head_dim": 16}), ("gemma2", {"head_dim": 16})],
)
def test_logits_stay_what_they_were(model_type, changes, dtype):
    model = built(model_type, **changes).to(dtype)
    before = model(TOKENS, use_cache=False).logits.float()
    assert fuse_projections(model) == 2 * (3 + 2)
    after = model(TOKENS, use_cache=False).logits.float()
    # The same products in another order of summation: a few units in the last place of the dtype, over two layers.
    assert (after - before).norm() <= before.norm() * 16 * torch.finfo(dtype).eps
    assert torch.equal(model(TOKENS, use_cache=False).logits.float(), after)


def test_weights_keep_their_names_values_and_bytes():
    model = built("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    fuse_projections(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(parameter.nbytes for parameter in model.parameters()) == num_bytes
    attention = model.model.layers[0].self_attn
    storages = {layer.weight.untyped_storage().data_ptr() for layer in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1  # views of the stacked weights: nothing is held twice


def test_fusing_again_changes_nothing():
    model = built("llama")
    fuse_projections(model)
    assert fuse_projections(model) == 0


def test_parts_may_be_asked_for_in_any_order_and_of_any_input():
    model = built("llama")
    attention = model.model.layers[0].self_attn
    x, y = torch.randn(2, 1, 5, 64)
    expected = [(layer(x), layer(y)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    fuse_projections(model)
    for i, layer in reversed([*enumerate((attention.q_proj, attention.k_proj, attention.v_proj))]):
        for input_, want in zip((x, y, y, x), (*expected[i], *reversed(expected[i])), strict=True):
            torch.testing.assert_close(layer(input_), want)


class Twice(nn.Linear):
    """A linear layer of another class, as those of quantisation packages are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_a_group_with_a_layer_of_another_class_is_left_alone(name):
    model = built("llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    plain = getattr(attention, name)
    setattr(attention, name, Twice(plain.in_features, plain.out_features, bias=False))
    before = model(TOKENS, use_cache=False).logits
    assert fuse_projections(model) == 2  # gate and up
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, before)


def test_names_that_are_not_known_are_left_alone():
    torch.manual_seed(0)
    gpt2 = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](n_embd=64, n_layer=2, n_head=4, vocab_size=200))
    assert fuse_projections(gpt2) == 0
