"""8-bit weights: the product that the codes stand for, who keeps bf16, counted bytes, one compiled code, refusals."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gear_engine.config import EngineConfig
from gear_engine.cuda_runner import decoder_layers
from gear_engine.model_loader import load_model, weights_bytes
from gear_engine.protocol import EngineStartError
from gear_engine.quantized import FP8, check_device, quantize_linears, quantize_rows
from gear_engine.runner import compute_rows_alone
from gear_engine.start import planned_memory, start_engine

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 208,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
CPU = torch.device("cpu")
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def built(model_type: str = "qwen2", dtype: torch.dtype = torch.bfloat16, **changes: object) -> PreTrainedModel:
    """Qwen2 has biases on Q, K and V."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**SHAPE, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype).eval().requires_grad_(False)


def saved(folder: Path, model_type: str = "llama", **changes: object) -> Path:
    built(model_type, **changes).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def exact(linear: nn.Linear, x: Tensor) -> Tensor:
    """What a layer's codes and scales, and those of its input, stand for."""
    codes, scales = quantize_rows(x)
    assert isinstance(linear.weight_scale, Tensor)
    y = (codes.double() * scales) @ (linear.weight.double() * linear.weight_scale[:, None]).T
    return y if linear.bias is None else y + linear.bias


def test_rows_are_rounded_to_three_bits_of_mantissa():
    x = torch.randn(20, 64) * torch.logspace(-6, 6, 20)[:, None]
    codes, scale = quantize_rows(x)
    assert codes.dtype == FP8
    assert (codes.float().abs().amax(-1) == 448).all()
    # Half a unit in the last place, and near zero half of the smallest number.
    assert ((codes.float() * scale - x).abs() <= torch.maximum(x.abs() / 16, scale * 2**-10) * 1.0001).all()


def test_zeros_stay_zeros_and_what_is_not_finite_poisons_its_row_alone():
    x = torch.zeros(4, 64)
    x[1, 5], x[2, 5], x[3] = torch.nan, torch.inf, 1.0
    codes, scale = quantize_rows(x)
    rows = codes.float() * scale
    assert (rows[0] == 0).all()
    assert not rows[1:3].isfinite().all(-1).any()
    assert (rows[3] == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 37])
def test_every_projection_is_the_product_that_its_codes_stand_for(num_rows: int, dtype: torch.dtype) -> None:
    model = built(dtype=dtype)
    quantize_linears(model, CPU)
    layer = model.model.layers[1]
    for parent, names in ((layer.self_attn, ("v_proj", "q_proj", "k_proj", "o_proj")), (layer.mlp, ("up_proj",))):
        x = torch.randn(1, num_rows, 64, dtype=dtype)
        for name in names:
            linear = getattr(parent, name)
            y = linear(x)
            assert (y.dtype, y.shape) == (dtype, (1, num_rows, linear.out_features))
            # Rounded to bf16 once, and once more with a bias; what cancels in a sum is rounded as its terms are.
            want = exact(linear, x[0])
            assert (y[0] - want).norm() <= 2**-7 * want.norm()


def test_logits_stay_near_those_of_the_whole_weights():
    model = built()
    before = model(TOKENS, use_cache=False).logits.float()
    assert quantize_linears(model, CPU) == 3 * 7
    after = model(TOKENS, use_cache=False).logits.float()
    # A product of two roundings is 3 to 4 % off, whose squares add up over three layers.
    assert 0.01 < (after - before).norm() / before.norm() < 0.15


def test_weights_are_held_once_in_eight_bits_and_let_go_of_before():
    model = built()
    layer = model.model.layers[0]
    names = {name for name, _ in model.named_parameters()}
    linears = [x for x in model.modules() if isinstance(x, nn.Linear) and x is not model.lm_head]
    num_weights, num_rows = (sum(f(x) for x in linears) for f in (lambda x: x.weight.numel(), lambda x: x.out_features))
    rest = weights_bytes(model) - 2 * num_weights
    old = [weakref.ref(x.weight) for x in linears]
    quantize_linears(model, CPU)
    assert not any(reference() for reference in old)
    assert weights_bytes(model) == rest + num_weights + 4 * num_rows
    assert {name for name, _ in model.named_parameters()} == names
    assert {x.weight.dtype for x in linears} == {FP8}
    stacked = {getattr(layer.self_attn, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "v_proj")}
    assert len(stacked) == 1
    assert layer.self_attn.o_proj.weight.untyped_storage().nbytes() == layer.self_attn.o_proj.weight.numel()


@pytest.mark.parametrize("tie", [False, True])
def test_embeddings_and_logits_stay_whole(tie: bool) -> None:
    model = built("llama", tie_word_embeddings=tie)
    quantize_linears(model, CPU)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_routers_and_shapes_that_the_product_does_not_take_stay_whole():
    model = built("llama", intermediate_size=100)
    mlp = model.model.layers[0].mlp
    mlp.gate = nn.Linear(64, 16, dtype=torch.bfloat16)
    before = mlp(torch.ones(2, 64, dtype=torch.bfloat16))
    assert quantize_linears(model, CPU) == 3 * 4  # attention
    assert {x.weight.dtype for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.gate)} == {torch.bfloat16}
    torch.testing.assert_close(mlp(torch.ones(2, 64, dtype=torch.bfloat16)), before)


def test_quantising_again_changes_nothing():
    model = built()
    quantize_linears(model, CPU)
    before = model(TOKENS, use_cache=False).logits
    assert quantize_linears(model, CPU) == 0
    assert torch.equal(model(TOKENS, use_cache=False).logits, before)


def test_layers_are_compiled_once_for_all_and_for_any_number_of_tokens():
    model = built()
    quantize_linears(model, CPU)
    expected = [model(tokens, use_cache=False).logits for tokens in (TOKENS, TOKENS[:, :5])]
    graphs: list[Callable] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True, dynamic=True)  # type: ignore
    with torch.inference_mode():
        for tokens, want in zip((TOKENS, TOKENS[:, :5]), expected, strict=True):
            torch.testing.assert_close(model(tokens, use_cache=False).logits, want)
    assert len(graphs) == 1
    assert sum("_scaled_mm" in str(node.target) for node in graphs[0].graph.nodes) == 4  # QKV, O, gate and up, down


def test_a_model_is_loaded_in_eight_bits_and_counted_so(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    whole = load_model(folder, "cpu", torch.bfloat16)
    half = load_model(folder, "cpu", torch.bfloat16, quantization="fp8")
    assert half.layers == whole.layers
    assert half.weights_bytes == weights_bytes(half.model) < 0.75 * whole.weights_bytes  # a third is embeddings
    compute_rows_alone(half.model)  # leaves them alone
    logits = [loaded.model(TOKENS, use_cache=False, gear_batch=Plain()).logits.float() for loaded in (whole, half)]
    assert (logits[1] - logits[0]).norm() < 0.15 * logits[0].norm()


class Plain:
    """Attends to each token itself alone."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, **arguments: object) -> Tensor:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).contiguous()


def refusal(start: Callable[[], object]) -> str:
    with pytest.raises(EngineStartError) as caught:
        start()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def test_a_cpu_is_refused_and_so_are_other_names(tmp_path: Path) -> None:
    for start in (start_engine, planned_memory):
        config = EngineConfig(model=str(tmp_path), device="cpu", quantization="fp8")
        assert "for a GPU" in refusal(lambda config=config, start=start: start(config))
        config = EngineConfig(model=str(tmp_path), device="cpu", quantization="int4")
        assert "choose one of none, fp8" in refusal(lambda config=config, start=start: start(config))


def test_a_layer_that_cannot_be_compiled_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(prepared: object) -> None:
        raise EngineStartError("a layer of the model cannot be compiled (because): use --eager")

    monkeypatch.setattr("gear_engine.start._runner", runner)
    config = EngineConfig(model=str(saved(tmp_path)), device="cpu", dtype="float32", num_pages=8, max_model_len=100)
    assert "use --eager" in refusal(lambda: start_engine(config))


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "gpt2", n_embd=64, n_layer=2, n_head=4)
    assert "no linear layer" in refusal(lambda: load_model(folder, "cpu", torch.bfloat16, quantization="fp8"))


def quantized_already(folder: Path, **quantization: object) -> Path:
    raw = json.loads((saved(folder) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("quantization", "device", "remedy"),
    [
        ({"quant_method": "fp8", "weight_block_size": [16, 16]}, "cuda", "pip install kernels"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "cpu", "pip install optimum gptqmodel"),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, "cpu", "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "cpu", "pip install compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "cpu", "pip install bitsandbytes"),
        ({"quant_method": "hqq"}, "cpu", "need a package"),
        ({"quant_method": "abacus"}, "cpu", "choose another copy"),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else "",
)
def test_a_quantised_checkpoint_names_what_it_needs(
    quantization: dict, device: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # wherever some of them are installed
    folder = quantized_already(tmp_path, **quantization)
    message = refusal(lambda: load_model(folder, device, torch.bfloat16))
    assert remedy in message
    assert str(folder) in message
    method = quantization["quant_method"]
    both = refusal(lambda: load_model(folder, device, torch.bfloat16, quantization="fp8"))
    assert f"quantised already ({method})" in both


def test_an_fp8_checkpoint_runs_on_a_cpu_as_what_its_codes_stand_for(tmp_path: Path) -> None:
    folder = quantized_already(tmp_path, quant_method="fp8", weight_block_size=[16, 16], activation_scheme="dynamic")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "_proj" in name]:
        blocks = weights[name].float().unflatten(1, (-1, 16)).unflatten(0, (-1, 16))  # [O / 16, 16, I / 16, 16]
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(FP8)
        weights[name], weights[f"{name}_scale_inv"] = codes.flatten(2, 3).flatten(0, 1), scale
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder, "cpu", torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    scale = weights[f"{name}_scale_inv"].repeat_interleave(16, 0).repeat_interleave(16, 1)
    weight = loaded.model.get_parameter(name)
    torch.testing.assert_close(weight.float(), weights[name].float() * scale, rtol=2**-8, atol=0)
    assert loaded.weights_bytes == sum(x.nbytes for x in (*loaded.model.parameters(), *loaded.model.buffers()))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 16, 300])
def test_the_product_on_a_gpu_captured_too(num_rows: int) -> None:
    check_device("cuda")
    model = built(hidden_size=256, intermediate_size=512, head_dim=64)
    quantize_linears(model, torch.device("cuda"))
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, num_rows, 256, dtype=torch.bfloat16, device="cuda")
    want = exact(attention.q_proj, x[0])
    assert (attention.q_proj(x)[0] - want).norm() <= 2**-7 * want.norm()
    graph = torch.cuda.CUDAGraph()
    attention.o_proj(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = attention.o_proj(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    want = exact(attention.o_proj, x[0])
    assert (y[0] - want).norm() <= 2**-7 * want.norm()


@pytest.mark.gpu
def test_starting_on_a_gpu_never_holds_the_whole_weights_there(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 16}
    folder = saved(tmp_path, **shape, num_key_value_heads=16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_model(folder, "cuda", torch.bfloat16, quantization="fp8")
    peak = torch.cuda.max_memory_allocated() - before
    matrix = 1024 * 2048
    # Beside what stays, one matrix at a time: in bf16, twice in float32, and its codes.
    assert loaded.weights_bytes <= torch.cuda.memory_allocated() - before <= 1.05 * loaded.weights_bytes
    assert peak < 1.05 * loaded.weights_bytes + 12 * matrix
    whole = 2 * sum(parameter.numel() for parameter in loaded.model.parameters())
    assert peak < whole
    del loaded
    config = {"model": str(folder), "device": "cuda", "num_pages": 16, "max_model_len": 120, "eager": True}
    started = start_engine(EngineConfig(**config, quantization="fp8"))
    started.engine.close()
    assert "FP8" in started.info.memory_table
    weights = {row.kind: row.num_bytes for row in started.info.memory}["weights"]
    assert weights == planned_memory(EngineConfig(**config, quantization="fp8")).weights_bytes < 0.6 * whole
