"""A small Llama with random weights, as the loader would hand it over."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gear_engine.attention_trial import ATTENTION_NAME, register_attention, verify_attention
from gear_engine.model_loader import LoadedModel


def tiny_llama(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> LoadedModel:
    """Two layers, 4 query and 2 KV heads; peaked enough that greedy texts are no coin tosses."""
    register_attention()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=1024, initializer_range=0.1,
        attn_implementation=ATTENTION_NAME,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        config=config,
        layers=verify_attention(model),
        num_layers=2,
        num_query_heads=4,
        num_kv_heads=2,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        eos_token_ids=(),
        weights_bytes=0,
    )
