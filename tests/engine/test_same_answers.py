"""Page-faithful: what a request generates does not depend on how it was cut, batched, or preempted."""

from pathlib import Path

import pytest
import torch
from greedy import generate, parts_only_at_near_ties
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from gear_engine.model_loader import LoadedModel, load_model

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=40),
    "gemma3": Gemma3TextConfig(**SHAPE, sliding_window=40, layer_types=["sliding_attention", "full_attention"]),
    "phi3": Phi3Config(**SHAPE),
}
PROMPTS = [
    [(7 * i * i + 3 * i + s) % 125 + 3 for i in range(n)] for s, n in enumerate((200, 131, 5, 64, 128, 90, 33, 150))
]


def tiny_model(tmp_path: Path, config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # far from uniform logits, so that near-ties are rare
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    return load_model(tmp_path, "cpu", torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return tiny_model(tmp_path_factory.mktemp("llama"), ARCHITECTURES["llama"])


@pytest.mark.parametrize("preset", ["near-lossless", "max-compression", "gear-4bit", "none"])
def test_answers_do_not_depend_on_chunks_or_neighbours(llama: LoadedModel, preset: str) -> None:
    alone = [generate(llama, [prompt], preset) for prompt in PROMPTS]
    for chunk in (1, 7, 64, 512):
        together, _, _ = generate(llama, PROMPTS, preset, chunk=chunk)
        for (texts, runner, _), other in zip(alone, together, strict=True):
            assert parts_only_at_near_ties(texts[0], other, runner, "0")


def test_the_reference_gives_the_same_bits_however_a_prompt_is_cut(llama: LoadedModel, tmp_path: Path) -> None:
    own = tiny_model(tmp_path, ARCHITECTURES["llama"])  # its layers are changed to multiply one row at a time
    seen = []
    for chunk in (1, 7, 64, 512):
        texts, runner, _ = generate(own, PROMPTS[1:3], chunk=chunk, backend="reference", max_tokens=6)
        seen.append((texts, {key: row.tolist() for key, row in runner.logprobs.items()}))
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_a_pool_too_small_for_all_loses_nothing(llama: LoadedModel) -> None:
    short = [prompt[:30] for prompt in PROMPTS]  # admitted while there is room, then each grows by a slot or two
    texts, runner, _ = generate(llama, short, max_tokens=80)
    squeezed, _, scheduler = generate(llama, short, num_slots=15, max_tokens=80)
    assert scheduler.num_preemptions > 0
    for i, (a, b) in enumerate(zip(texts, squeezed, strict=True)):
        assert parts_only_at_near_ties(a, b, runner, str(i))


def test_reruns_are_bit_identical(llama: LoadedModel) -> None:
    first, second = (generate(llama, PROMPTS) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(row, second[1].logprobs[key]) for key, row in first[1].logprobs.items())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_compression_logits_match_plain_transformers(name: str, tmp_path: Path) -> None:
    loaded = tiny_model(tmp_path, ARCHITECTURES[name])
    texts, runner, _ = generate(loaded, PROMPTS[:2], "none", chunk=48)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for i, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=False)):
        with torch.no_grad():
            logits = plain(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        for position in range(len(text)):
            # float32 rounds to 6e-8 of logits around 10, and a few hundred such errors add up.
            assert torch.allclose(runner.logprobs[str(i), position], logits[position], atol=1e-4, rtol=0)
