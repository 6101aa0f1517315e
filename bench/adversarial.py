"""Keys as in Qwen2.5, whose large biases break per-token 4-bit caches: real weights with biases put on their keys.

    python bench/adversarial.py [--context 1024] [--json OUT]

SmolLM2's weights load into the Qwen2 architecture, which is the same but for biases on q, k and v. A bias on a pair of
channels that RoPE turns together is a vector of constant length in every key; a pair that turns slowly hardly changes
what the model says, a fast one changes it. Either way each cache is compared with the exact run of the same model.
What bf16 costs is the floor: the open page is bf16 in every cache. About four minutes.
"""

import argparse
import datetime
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from gear_engine.fidelity.subjects import exact_subject, subjects
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.fidelity.texts import cut
from gear_engine.model_files import model_folder, quiet_transformers
from gear_engine.model_loader import LoadedModel, load_model

CACHES = ["bf16", "fp8", "int4", "kivi-4", "near-lossless", "balanced", "gear-4bit", "max-compression"]
SLOW, FAST = (-1, -3), (8, 12)  # pairs, counted from the fastest of RoPE
BIASES = [(0.0, SLOW), (20.0, SLOW), (60.0, SLOW), (20.0, FAST)]


def with_key_biases(model: PreTrainedModel, bias: float, pairs: tuple[int, ...]) -> None:
    """Put ±`bias` on both channels of each pair, in every layer and KV head."""
    head_dim = model.model.layers[0].self_attn.head_dim
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.bias.data.view(-1, head_dim)
        for i, pair in enumerate(pairs):
            first = pair % (head_dim // 2)
            heads[:, first] = bias if i % 2 == 0 else -bias
            heads[:, first + head_dim // 2] = -0.7 * heads[:, first]


def as_qwen2(folder: Path) -> Qwen2ForCausalLM:
    """The Llama model in `folder` as a Qwen2 with biases of zero."""
    llama = AutoConfig.from_pretrained(folder, local_files_only=True)
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    model = Qwen2ForCausalLM.from_pretrained(
        folder, config=Qwen2Config(**{name: getattr(llama, name) for name in same}), dtype=torch.float32
    )
    for layer in model.model.layers:  # not in the file, so random
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.bias.data.zero_()
    return model


def biased(folder: Path, bias: float, pairs: tuple[int, ...]) -> LoadedModel:
    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        model = as_qwen2(folder)
        with_key_biases(model, bias, pairs)
        model.save_pretrained(scratch)
        return load_model(Path(scratch), "cpu", torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = model_folder(None)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = cut([], lambda text: tokenizer(text, verbose=False)["input_ids"], arguments.context, 1, page_size=128)
    rows = []
    for bias, pairs in BIASES:
        loaded = biased(folder, bias, pairs)
        measured = compare(exact_subject(loaded, "exact"), subjects(loaded, CACHES), texts, lambda name: None)
        summaries = {name: distances.summary() for name, distances in measured.items()}
        turn = "fast" if pairs == FAST else "slow"
        rows.append({"bias": bias, "turn": turn, "caches": summaries})
        print(f"\nbias ±{bias:g} on {turn} pairs; exact perplexity {summaries['exact']['perplexity']:.2f}")
        for name in CACHES:
            print(f"  {name:<16}KL {summaries[name]['kl_mean']:.4f}", flush=True)
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "model": "SmolLM2-135M-Instruct as Qwen2 with key biases",
            "command": f"python bench/adversarial.py --context {arguments.context}",
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
