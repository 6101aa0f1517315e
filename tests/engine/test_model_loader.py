"""Models that our attention serves exactly are loaded with the right facts; all others are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gear_engine.attention_trial import ATTENTION_NAME, LayerAttention, register_attention, verify_attention
from gear_engine.model_loader import load_model, read_config
from gear_engine.protocol import EngineStartError

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # so large that attention matters to the logits
}
FULL = LayerAttention(scaling=0.25, sliding_window=None, softcap=None, num_query_heads=4, num_kv_heads=2, head_dim=16)
SLIDING = LayerAttention(0.25, 8, None, 4, 2, 16)


def config(model_type: str, **changes: object) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**{**TINY, **changes})


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def loaded(config: PreTrainedConfig, folder: Path):
    return load_model(saved(config, folder), "cpu", torch.float32)


def built(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    register_attention()
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME).eval()


def only_config(folder: Path, **fields: object) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(EngineStartError) as caught:
        read_config(folder)
    return one_sentence(caught)


def one_sentence(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (config("llama"), [FULL, FULL]),
        (config("qwen2"), [FULL, FULL]),
        (config("qwen3", head_dim=32), [LayerAttention(32**-0.5, None, None, 4, 2, 32)] * 2),
        (
            config("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16),
            [FULL, FULL],
        ),
        (config("mistral", sliding_window=8), [SLIDING, SLIDING]),
        (config("phi3", sliding_window=None), [FULL, FULL]),
        (
            config("gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=64, attn_logit_softcapping=50.0),
            [LayerAttention(0.125, 8, 50.0, 4, 2, 16), LayerAttention(0.125, None, 50.0, 4, 2, 16)],
        ),
        (
            config(
                "gemma3_text",
                head_dim=16,
                sliding_window=8,
                query_pre_attn_scalar=16,
                layer_types=["sliding_attention", "full_attention"],
            ),
            [SLIDING, FULL],
        ),
        (
            CONFIG_MAPPING["gpt2"](n_embd=64, n_layer=2, n_head=4, vocab_size=200),
            [LayerAttention(0.25, None, None, 4, 4, 16)] * 2,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_served_model_says_what_each_layer_asks_of_its_attention(config, layers, tmp_path):
    model = loaded(config, tmp_path)
    assert model.layers == layers
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads, model.head_dim) == (
        2,
        4,
        layers[0].num_kv_heads,
        layers[0].head_dim,
    )


def test_a_loaded_model_is_ready_to_serve_and_says_its_size(tmp_path):
    model = loaded(config("llama", eos_token_id=[2, 5], tie_word_embeddings=True), tmp_path)
    assert (model.vocab_size, model.max_position, model.eos_token_ids) == (200, 128, (2, 5))
    assert model.model.config._attn_implementation == ATTENTION_NAME
    assert not model.model.training
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    on_disk = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    rotary = 16 // 2 * 4  # inverse frequencies, not saved
    assert on_disk + rotary <= model.weights_bytes <= on_disk + 2 * rotary


def test_weights_come_in_the_dtype_that_is_asked_for(tmp_path):
    folder = saved(config("llama"), tmp_path)
    wide, narrow = (load_model(folder, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert narrow.model.dtype == torch.bfloat16
    assert wide.layers == narrow.layers
    weight = wide.model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(narrow.model.model.layers[0].mlp.up_proj.weight, weight.bfloat16())


def test_another_attention_can_be_chosen_for_comparison(tmp_path):
    model = load_model(saved(config("llama"), tmp_path), "cpu", torch.float32, "sdpa")
    assert model.layers == [FULL, FULL]
    assert model.model(input_ids=torch.tensor([[3, 4]])).logits.shape == (1, 2, 200)


def test_a_wrapper_is_served_by_its_text_model(tmp_path):
    text = config("gemma3_text", head_dim=16, sliding_window=8, query_pre_attn_scalar=16).to_dict()
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    wrapper = CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = loaded(wrapper, tmp_path)
    assert model.config.model_type == "gemma3_text"
    assert model.layers == [SLIDING, SLIDING]
    assert model.vocab_size == 200


def test_long_rope_is_served_up_to_its_original_length(tmp_path):
    rope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 10000.0}
    long = config("phi3", original_max_position_embeddings=32, rope_parameters=rope, sliding_window=None)
    assert loaded(long, tmp_path).max_position == 32


class Spy:
    """Answers with zeros, and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def attend(self, module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor:
        self.calls.append((module.layer_idx, q, k, v, arguments))
        return torch.zeros_like(q, memory_format=torch.contiguous_format)


def test_every_layer_brings_its_queries_keys_and_values_to_the_batch():
    model, spy = built(config("gemma2", head_dim=16, sliding_window=8)), Spy()
    model(
        input_ids=torch.arange(7)[None],
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 9]]),
        use_cache=False,
        logits_to_keep=torch.tensor([2, 4]),
        gear_batch=spy,
    )
    assert [call[0] for call in spy.calls] == [0, 1]
    for layer, q, k, v, arguments in spy.calls:
        assert (q.shape, k.shape, v.shape) == ((7, 4, 16), (7, 2, 16), (7, 2, 16))
        assert arguments == {"scaling": 256**-0.5, "sliding_window": [8, None][layer], "softcap": 50.0}


def test_without_a_batch_nothing_is_attended():
    with pytest.raises(Exception, match="does not hand further arguments"):
        built(config("llama"))(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize("make_mask", [create_causal_mask, create_sliding_window_causal_mask])
def test_no_mask_is_made_for_packed_sequences(make_mask):
    model = built(config("mistral", sliding_window=2))
    mask = make_mask(
        model.config,
        torch.zeros(1, 7, 64),
        None,  # attention_mask
        None,  # the cache, which goes by another name from one version of transformers to the next
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 9]]),
    )
    assert mask is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bart"}, "encoder-decoder"),
        ({"model_type": "deepseek_v3"}, "MLA"),
        ({"model_type": "minicpm3"}, "MLA"),
        ({"model_type": "mamba"}, "linear_attention"),
        ({"model_type": "falcon_mamba"}, "linear_attention"),
        ({"model_type": "jamba"}, "linear_attention"),
        ({"model_type": "bamba"}, "linear_attention"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba"] * 32}, "linear_attention"),
        ({"model_type": "qwen3_next"}, "linear_attention"),
        ({"model_type": "lfm2", "layer_types": ["conv"] * 32}, "conv"),
        ({"model_type": "falcon_h1"}, "hybrid"),
        ({"model_type": "recurrent_gemma"}, "recurrent"),
        ({"model_type": "rwkv"}, "recurrent"),
        ({"model_type": "llama4_text"}, "chunked_attention"),
        ({"model_type": "llama4"}, "chunked_attention"),
        ({"model_type": "gemma3n_text"}, "share the keys and values"),
        ({"model_type": "gemma4_text"}, "differs from layer to layer"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "mpt"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "gpt_neo"}, "does not let another attention"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"model_type": "llama", **TINY, "head_dim": 24}, "24 wide"),
        ({"model_type": "llama", **TINY, "hidden_size": 32}, "8 wide"),
        ({"model_type": "openelm"}, "does not know this model type"),
        (
            {"model_type": "newest", "auto_map": {"AutoConfig": "code.Config"}},
            "code that comes with weights is never run",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_the_config_alone_refuses_what_cannot_be_served(fields, reason, tmp_path):
    message = refusal(only_config(tmp_path, **fields))
    assert reason in message
    assert fields["model_type"] in message
    assert "choose a decoder" in message


def test_code_that_comes_with_a_known_model_is_not_run(tmp_path):
    (tmp_path / "code.py").write_text("raise SystemExit('the code was run')")
    only_config(tmp_path, model_type="llama", **TINY, auto_map={"AutoConfig": "code.Config"})
    assert read_config(tmp_path).model_type == "llama"


def test_a_config_that_contradicts_itself_is_refused_with_what_is_wrong(tmp_path):
    message = refusal(only_config(tmp_path, model_type="llama", **{**TINY, "hidden_size": "sixty-four"}))
    assert "no valid llama config" in message


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "cannot be read"), ("[]", "no JSON object"), ("{}", "type unknown")]
)
def test_a_broken_config_file_is_refused(content, reason, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert reason in refusal(tmp_path)


def trial_refusal(model: PreTrainedModel) -> str:
    with pytest.raises(EngineStartError) as caught:
        verify_attention(model)
    assert model.config.model_type in str(caught.value)
    return one_sentence(caught)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config("stablelm"), "does not hand further arguments"),
        (config("diffllama"), "attends more than once"),
        (config("doge"), "attention_mask"),
        (config("bert"), "not causal"),
        (config("mimo_v2_flash", head_dim=16, v_head_dim=32, n_routed_experts=4), "one width is served"),
        (config("phimoe", sliding_window=8, num_local_experts=4), "sliding window in a mask"),
        (
            config("qwen2_moe", use_sliding_window=True, sliding_window=8, max_window_layers=2, num_experts=4),
            "sliding window in a mask",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_the_trial_run_refuses_what_the_config_does_not_show(config, reason):
    assert reason in trial_refusal(built(config))


class MixesNeighbours(nn.Module):
    """What a convolution or a token shift does: each token gets something of the one before it in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def test_a_layer_that_mixes_packed_sequences_is_refused():
    model = built(config("llama"))
    model.model.layers[1].mlp = MixesNeighbours()
    assert "change each other" in trial_refusal(model)


class IgnoresPositions(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(x, torch.arange(x.shape[1])[None] ** 2)


def test_a_model_that_counts_positions_itself_is_refused():
    model = built(config("llama"))
    model.model.rotary_emb = IgnoresPositions(model.model.rotary_emb)
    assert "ignores position_ids" in trial_refusal(model)


def test_a_model_whose_own_attention_does_something_else_is_refused():
    model = built(config("llama"))

    def scaled_in_secret(module: nn.Module, args: tuple, output: tuple) -> tuple:
        eager = module.config._attn_implementation == "eager"
        return (output[0] * 1.2, *output[1:]) if eager else output

    model.model.layers[0].self_attn.register_forward_hook(scaled_in_secret)
    assert "something else than ours" in trial_refusal(model)


def test_the_trial_leaves_our_attention_in_place_even_when_it_refuses():
    model = built(config("diffllama"))
    trial_refusal(model)
    assert model.config._attn_implementation == ATTENTION_NAME


def weight_refusal(folder: Path) -> str:
    with pytest.raises(EngineStartError) as caught:
        load_model(folder, "cpu", torch.float32)
    assert str(folder) in str(caught.value)
    return one_sentence(caught)


def edited(folder: Path, edit) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_weight_is_refused_and_never_random(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    folder = edited(saved(config("llama"), tmp_path), lambda weights: weights.pop(name))
    message = weight_refusal(folder)
    assert "1 in all" in message
    assert name in message


def test_a_weight_of_another_shape_is_refused(tmp_path):
    def widen(weights: dict[str, Tensor]) -> None:
        weights["model.norm.weight"] = torch.zeros(65)

    assert "cannot read the weights" in weight_refusal(edited(saved(config("llama"), tmp_path), widen))


@pytest.mark.parametrize("keep_bytes", [0, 5, 1000, -100])
def test_a_truncated_weights_file_is_refused(keep_bytes, tmp_path):
    file = saved(config("llama"), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    assert "cannot read the weights" in weight_refusal(tmp_path)


def test_weights_in_pickle_are_not_read(tmp_path):
    folder = saved(config("llama"), tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "cannot read the weights" in weight_refusal(folder)
