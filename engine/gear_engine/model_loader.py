"""From a model folder to a model on the device whose attention is ours, or to one sentence that says why not.
It knows Hugging Face configs and classes; it refuses to know where the folder came from, and pages and requests.

Three nets, each for what the one before cannot see: the config (before any weight is read), the loading report (a
weight that is missing would be random), and a trial run (what the attention of every layer really asks for).
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from gear_engine.model_files import first_line, quiet_transformers, read_json
from gear_engine.protocol import EngineStartError

ATTENTION_NAME = "gear_paged"
REMEDY = (
    "choose a decoder with plain causal attention in every layer (Llama, Qwen, Mistral, Gemma 3, Phi and their kin)"
)
NUM_TRIAL_TOKENS = 5

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

# Arguments that reach the attention and change nothing in it. Any other, unless None or False, is refused by name.
HARMLESS_ARGUMENTS = {"is_causal", "position_ids", "cache_position", "logits_to_keep", "return_dict"}


class AttentionTarget(Protocol):
    """What `model(..., gear_batch=target)` brings to every attention layer: it takes the new K and V, and attends."""

    def attend(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q: [T, Q, D], k and v: [T, H, D], strided views -> [T, Q, D], contiguous.

        softmax(cap(scaling * q k)) v, where cap(x) = softcap * tanh(x / softcap); a sliding window of n tokens is the
        token itself and the n - 1 before it.
        """


@dataclass(slots=True, frozen=True)
class LayerAttention:
    """What one layer asks of its attention, as seen in the trial run."""

    scaling: float
    sliding_window: int | None
    softcap: float | None
    num_query_heads: int
    num_kv_heads: int
    head_dim: int


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
    folder: Path, device: torch.device | str, dtype: torch.dtype, attn_implementation: str = ATTENTION_NAME
) -> LoadedModel:
    """Raises EngineStartError, in one sentence, for a model that would not be served as its authors meant it.

    Another attention, such as "sdpa", is for comparisons: the model passes the same checks first.
    """
    config = read_config(folder)
    model = _read_weights(folder, config, torch.device(device), dtype)
    layers = verify_attention(model)
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
        weights_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """The config, if nothing in it speaks against serving the model. Reads no weight, runs no code of the folder."""
    raw = read_json(folder / "config.json", "pass the folder that a model was saved to")
    name = raw.get("model_type", "unknown")
    if name not in CONFIG_MAPPING:
        theirs = ", and code that comes with weights is never run" if "auto_map" in raw else ""
        raise _refusal(name, f"transformers {transformers_version} does not know this model type{theirs}")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            text = config.get_text_config(decoder=True)
    except Exception as error:  # whatever a config class finds wrong with its values
        raise EngineStartError(f"{folder / 'config.json'} is no valid {name} config: {first_line(error)}") from error
    for reason in _reasons_against(config, text):
        raise _refusal(name, reason)
    return config


def _refusal(name: str, reason: str) -> EngineStartError:
    return EngineStartError(f"the model (type {name}) cannot be served: {reason}; {REMEDY}")


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


def register_attention() -> None:
    """Make ATTENTION_NAME an attention implementation that transformers knows; harmless when repeated.

    It is not registered as a mask function: transformers then builds no mask, whatever is packed into a batch.
    """
    AttentionInterface.register(ATTENTION_NAME, _gear_attention)


class _Unsupported(Exception):
    """Why a layer's attention cannot be ours."""


def _gear_attention(
    module: nn.Module,
    query: Tensor,  # [1, Q, T, D]
    key: Tensor,  # [1, H, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    gear_batch: AttentionTarget | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **arguments: object,
) -> tuple[Tensor, None]:
    if gear_batch is None:
        raise _Unsupported("its code in transformers does not hand further arguments down to the attention")
    if isinstance(gear_batch, _TrialBatch):
        gear_batch.inspect(module, query, key, value, {**arguments, "attention_mask": attention_mask})
    output = gear_batch.attend(
        module.layer_idx,  # type: ignore[arg-type]
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return output[None], None  # [1, T, Q, D]


@dataclass(slots=True)
class _TrialBatch:
    """Attends plainly within runs of NUM_TRIAL_TOKENS tokens, and keeps what every layer asked for."""

    layers: dict[int, LayerAttention] = field(default_factory=dict)

    def inspect(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
        for name, argument in arguments.items():
            if argument is not None and argument is not False and name not in HARMLESS_ARGUMENTS:
                raise _Unsupported(f"its attention takes {name}, which ours does not know")
        if arguments.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise _Unsupported("its attention is not causal")
        widths = [tensor.shape[-1] for tensor in (query, key, value)]
        if len({*widths}) > 1 or key.shape != value.shape:
            raise _Unsupported(f"its queries, keys and values are {widths} wide, and one width is served")
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise _Unsupported("its attention does not know which layer it is in")
        if module.layer_idx in self.layers:
            raise _Unsupported("a layer of it attends more than once")

    def attend(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        (T, Q, D), H = q.shape, k.shape[1]
        self.layers[layer_idx] = LayerAttention(scaling, sliding_window, softcap, Q, H, D)
        position = torch.arange(T, device=q.device)
        distance = position[:, None] - position
        visible = (distance >= 0) & (position[:, None] // NUM_TRIAL_TOKENS == position // NUM_TRIAL_TOKENS)
        if sliding_window is not None:
            visible &= distance < sliding_window
        scores = torch.einsum("tqd,uqd->qtu", q.float(), k.float().repeat_interleave(Q // H, 1)) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
        return torch.einsum("qtu,uqd->tqd", weights, v.float().repeat_interleave(Q // H, 1)).to(q.dtype).contiguous()


@torch.no_grad()
def verify_attention(model: PreTrainedModel) -> list[LayerAttention]:
    """What every layer asks of its attention, from a run of a few tokens, called as the engine will call the model.

    They are packed twice into one batch; EngineStartError if what comes out is not the same both times, or not what
    the model's own attention makes of them.
    """
    name = model.config.model_type
    T = NUM_TRIAL_TOKENS
    tokens = torch.arange(1, T + 1, device=model.device) * 7919 % model.config.get_text_config(decoder=True).vocab_size
    position = torch.arange(T, device=model.device)
    batch = _TrialBatch()
    try:
        packed = _logits(model, tokens.repeat(2), position.repeat(2), torch.arange(2 * T), gear_batch=batch)
        model.set_attn_implementation("eager")
        own = _logits(model, tokens, position, torch.arange(1, T))
    except _Unsupported as error:
        raise _refusal(name, str(error)) from None
    except Exception as error:  # the code of a hundred architectures
        raise _refusal(name, f"a trial run failed ({first_line(error)})") from error
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    for reason in _reasons_in_trial(model, batch.layers, packed, own):
        raise _refusal(name, reason)
    return [batch.layers[i] for i in range(len(batch.layers))]


def _logits(model: PreTrainedModel, tokens: Tensor, position: Tensor, asked: Tensor, **arguments: object) -> Tensor:
    """[number asked, V]"""
    output = model(
        input_ids=tokens[None],
        position_ids=position[None],
        use_cache=False,
        logits_to_keep=asked.to(tokens.device),
        **arguments,
    )
    if output.logits.shape[1] != len(asked):
        raise _Unsupported("it computes logits for tokens that were not asked for (logits_to_keep)")
    return output.logits[0].float()


def _reasons_in_trial(
    model: PreTrainedModel, seen: dict[int, LayerAttention], packed: Tensor, own: Tensor
) -> Iterator[str]:
    """packed: [2 T, V], own: [T - 1, V], without the first token, which sees only itself whatever the attention does"""
    text = model.config.get_text_config(decoder=True)
    if sorted(seen) != list(range(text.num_hidden_layers)):
        yield f"only {len(seen)} of its {text.num_hidden_layers} layers use an attention that ours can replace"
    if len({(layer.num_query_heads, layer.num_kv_heads, layer.head_dim) for layer in seen.values()}) != 1:
        yield "its attention differs from layer to layer"
    if seen[0].head_dim % 16:
        yield f"its heads are {seen[0].head_dim} wide, which is no multiple of 16"
    if _hides_a_window(model, text, seen):
        yield "it keeps its sliding window in a mask, where our attention does not see it"
    first, second = packed.chunk(2)
    # A wrong attention is off by tens of percent; bf16 rounds to 0.4 %, and every layer adds to that.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not _distances(second, first).max() <= tolerance:
        yield "sequences in one batch change each other (it ignores position_ids, or mixes neighbouring tokens)"
    # The median token: in a mixture of experts rounding may send one token elsewhere.
    if not _distances(first[1:], own).median() <= tolerance:
        yield "its own attention computes something else than ours"


def _hides_a_window(model: PreTrainedModel, text: PreTrainedConfig, seen: dict[int, LayerAttention]) -> bool:
    """Whether a layer has a sliding window and does not hand it to its attention. The trial is too short to tell."""
    if layer_types := getattr(text, "layer_types", None):
        return any(t == "sliding_attention" and seen[i].sliding_window is None for i, t in enumerate(layer_types))
    window = getattr(text, "sliding_window", None)
    makes_masks = hasattr(sys.modules[type(model).__module__], "create_sliding_window_causal_mask")
    handed_on = any(layer.sliding_window is not None for layer in seen.values())
    return isinstance(window, int) and window < text.max_position_embeddings and makes_masks and not handed_on


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[T]: of each token, relative."""
    return (a - b).norm(dim=-1) / b.norm(dim=-1)
