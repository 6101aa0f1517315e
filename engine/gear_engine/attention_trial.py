"""The attention that transformers calls in place of its own, and the trial run that shows whether it may.
It knows what a layer asks of its attention; it refuses to know folders, configs before loading, and pages.

A model is run on a few tokens, called as the engine will call it, and compared with its own attention: what no field of
a config gives away (arguments that are swallowed, masks that hide a window, layers that attend twice) shows here.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from gear_engine.model_files import first_line
from gear_engine.protocol import EngineStartError

ATTENTION_NAME = "gear_paged"
REMEDY = (
    "choose a decoder with plain causal attention in every layer (Llama, Qwen, Mistral, Gemma 3, Phi and their kin)"
)
NUM_TRIAL_TOKENS = 5

# Arguments that reach the attention and change nothing in it. Any other, unless None or False, is refused by name.
HARMLESS_ARGUMENTS = {"is_causal", "position_ids", "cache_position", "logits_to_keep", "return_dict"}


class AttentionTarget(Protocol):
    """What `model(..., gear_batch=target)` brings to every attention layer: it takes the new K and V, and attends."""

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """q: [T, Q, D], k and v: [T, H, D], strided views -> [T, Q, D], contiguous; `module.layer_idx` names the layer.

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


def refusal(name: str, reason: str) -> EngineStartError:
    return EngineStartError(f"the model (type {name}) cannot be served: {reason}; {REMEDY}")


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
        module,
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
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> Tensor:
        (T, Q, D), H = q.shape, k.shape[1]
        assert isinstance(module.layer_idx, int)
        self.layers[module.layer_idx] = LayerAttention(scaling, sliding_window, softcap, Q, H, D)
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
        raise refusal(name, str(error)) from None
    except Exception as error:  # the code of a hundred architectures
        raise refusal(name, f"a trial run failed ({first_line(error)})") from error
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    for reason in _reasons_in_trial(model, batch.layers, packed, own):
        raise refusal(name, reason)
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
    # A wrong attention is off by tens of percent; bf16 rounds to 0.4 %, quantised activations to 3 %, and every layer
    # adds to that.
    exact = model.dtype == torch.float32 and getattr(model, "hf_quantizer", None) is None
    tolerance = 1e-3 if exact else 0.1
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
