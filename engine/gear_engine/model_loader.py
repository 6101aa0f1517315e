"""From a model folder to a model on the device whose attention is ours, or to one sentence that says why not.
It knows Hugging Face configs and classes; it refuses to know where the folder came from, and pages and requests.

Three nets, each for what the one before cannot see: the config (before any weight is read), the loading report (a
weight that is missing would be random), and a trial run (what the attention of every layer really asks for).
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from gear_engine.attention_trial import ATTENTION_NAME, LayerAttention, refusal, register_attention, verify_attention
from gear_engine.model_files import first_line, quiet_transformers, read_json
from gear_engine.protocol import EngineStartError
from gear_engine.quantized import quantize_linears

# Attention that no field of the config gives away.
REFUSED_TYPES = {
    "gpt_oss": "its attention has sinks, which a compressed page does not hold",
    "bloom": "its attention has position biases (ALiBi)",
    "mpt": "its attention has position biases (ALiBi)",
    "rwkv": "its layers are recurrent and have no keys and values",
    "xlstm": "its layers are recurrent and have no keys and values",
    "recurrent_gemma": "some of its layers are recurrent and have no keys and values",
    "openelm": "its attention differs from layer to layer",
}
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}

# What transformers runs quantised checkpoints with, by their quant_method; others it names itself.
PACKAGES = {
    "awq": ("gptqmodel",),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed-tensors",),
    "fp8": ("kernels",),
    "gptq": ("optimum", "gptqmodel"),
}


@dataclass(slots=True)
class LoadedModel:
    """A model that is ready to run; `layers` is what its attention asks for, the same shape in every layer."""

    model: PreTrainedModel  # in eval mode, without gradients
    config: PreTrainedConfig  # that of the text model where a wrapper holds one
    layers: list[LayerAttention]
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int  # tokens
    eos_token_ids: tuple[int, ...]
    weights_bytes: int


def load_model(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    attn_implementation: str = ATTENTION_NAME,
    quantization: str = "none",
) -> LoadedModel:
    """Raises EngineStartError, in one sentence, for a model that would not be served as its authors meant it.

    Another attention, such as "sdpa", is for comparisons: the model passes the same checks first. What is to be
    quantised is read and checked on the CPU, where it may be mapped from its files, and goes to the device in 8 bits.
    """
    config = read_config(folder)
    device = torch.device(device)
    _check_quantized(folder, config, device, quantization)
    model = _read_weights(folder, config, device if quantization == "none" else torch.device("cpu"), dtype)
    layers = verify_attention(model)
    if quantization != "none" and not quantize_linears(model, device):
        raise EngineStartError(f"--quantization {quantization} finds no linear layer in {folder}: leave it out")
    if attn_implementation != ATTENTION_NAME:
        model.set_attn_implementation(attn_implementation)
    text = config.get_text_config(decoder=True)
    return LoadedModel(
        model=model,
        config=text,
        layers=layers,
        num_layers=len(layers),
        num_query_heads=layers[0].num_query_heads,
        num_kv_heads=layers[0].num_kv_heads,
        head_dim=layers[0].head_dim,
        vocab_size=text.vocab_size,
        max_position=_max_position(text),
        eos_token_ids=_eos_token_ids(model),
        weights_bytes=weights_bytes(model),
    )


def weights_bytes(model: PreTrainedModel) -> int:
    """Of all parameters and buffers as they are in memory."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def read_config(folder: Path) -> PreTrainedConfig:
    """The config, if nothing in it speaks against serving the model. Reads no weight, runs no code of the folder."""
    raw = read_json(folder / "config.json", "pass the folder that a model was saved to")
    name = raw.get("model_type", "unknown")
    if name not in CONFIG_MAPPING:
        theirs = ", and code that comes with weights is never run" if "auto_map" in raw else ""
        raise refusal(name, f"transformers {transformers_version} does not know this model type{theirs}")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            text = config.get_text_config(decoder=True)
    except Exception as error:  # whatever a config class finds wrong with its values
        raise EngineStartError(f"{folder / 'config.json'} is no valid {name} config: {first_line(error)}") from error
    for reason in _reasons_against(config, text):
        raise refusal(name, reason)
    return config


def _check_quantized(folder: Path, config: PreTrainedConfig, device: torch.device, quantization: str) -> None:
    """Raises EngineStartError if the checkpoint is quantised and that cannot be run here."""
    quantized = getattr(config, "quantization_config", None)
    if not quantized:
        return
    method = (quantized if isinstance(quantized, dict) else quantized.to_dict()).get("quant_method", "unknown")
    if quantization != "none":
        raise EngineStartError(f"{folder} is quantised already ({method}): leave out --quantization")
    if method != "bitsandbytes" and method not in AUTO_QUANTIZER_MAPPING:
        raise EngineStartError(
            f"{folder} is quantised in a way ({method}) that transformers {transformers_version} does not know: "
            "choose another copy of the model"
        )
    if method == "fp8" and device.type == "cpu":
        return  # is made bfloat16
    packages = PACKAGES.get(method, ())
    if any(importlib.util.find_spec(package.replace("-", "_")) is None for package in packages):
        raise EngineStartError(
            f"{folder} is quantised ({method}), which transformers runs with what is not installed: "
            f"pip install {' '.join(packages)}"
        )


def _reasons_against(config: PreTrainedConfig, text: PreTrainedConfig) -> Iterator[str]:
    if config.is_encoder_decoder or text.is_encoder_decoder:
        yield "it is an encoder-decoder"
    for known in (config.model_type, text.model_type):
        if known in REFUSED_TYPES:
            yield REFUSED_TYPES[known]
    for layer_type in sorted({*(getattr(text, "layer_types", None) or ())} - SERVED_LAYER_TYPES):
        yield f"it has layers of type {layer_type}, and only full and sliding attention are served"
    yield from _reasons_in_heads(text)
    if getattr(text, "num_kv_shared_layers", None):
        yield "some of its layers share the keys and values of others"
    if getattr(text, "alibi", False):
        yield "its attention has position biases (ALiBi)"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "transformers has no causal language model for this type"
    elif text is config and not _uses_attention_interface(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
        yield "its code in transformers does not let another attention take the place of its own"
    if not isinstance(getattr(text, "max_position_embeddings", None), int):
        yield "its config does not say how many tokens it can hold (max_position_embeddings)"


def _reasons_in_heads(text: PreTrainedConfig) -> Iterator[str]:
    layers = [text]
    if getattr(text, "is_heterogeneous", False):  # reading such a field from the config as a whole would raise
        layers = [text.per_layer_config[i] for i in range(text.num_hidden_layers)]
    if any(getattr(layer, "kv_lora_rank", None) for layer in layers):
        yield "it caches latents instead of keys and values (multi-head latent attention, MLA)"
    shapes = [_heads(layer) for layer in layers]
    if any(shape != shapes[0] for shape in shapes) or any(isinstance(n, list | tuple) for n in shapes[0]):
        yield "its attention differs from layer to layer"
    head_dim = shapes[0][2]
    if isinstance(head_dim, int) and head_dim % 16:
        yield f"its heads are {head_dim} wide, which is no multiple of 16"


def _heads(config: PreTrainedConfig) -> tuple[Any, Any, Any]:
    """(query heads, KV heads, head_dim) as the config states them; None where it does not."""
    num_heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and isinstance(num_heads, int) and num_heads:
        head_dim = config.hidden_size // num_heads
    return num_heads, getattr(config, "num_key_value_heads", None), head_dim


def _uses_attention_interface(model_class: type) -> bool:
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def _read_weights(folder: Path, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    register_attention()
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                device_map=None if device.type == "cpu" else {"": device},  # a GPU needs no second copy on the host
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except ImportError as error:
        raise EngineStartError(f"the weights in {folder} need a package: {first_line(error)}") from error
    except Exception as error:  # safetensors, transformers and quantisation packages each raise their own
        raise EngineStartError(
            f"cannot read the weights in {folder}: {first_line(error)}; check that the download is complete"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(
            f"{folder} lacks weights that would be random then ({', '.join(missing[:3])}; {len(missing)} in all): "
            "check that the download is complete and that config.json belongs to it"
        )
    return model.eval().requires_grad_(False)


def _max_position(text: PreTrainedConfig) -> int:
    """Tokens that a sequence may hold.

    LongRoPE turns all positions of a batch another way once one of them is beyond the original length; keys in the
    cache and neighbours in the batch would go wrong, so such a model is served up to that length.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        return original or getattr(text, "original_max_position_embeddings", text.max_position_embeddings)
    return text.max_position_embeddings


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)
