"""Decode speed on a CPU beside transformers' own `generate`: same model, dtype and threads, one run.

    python bench/cpu.py [--context 512] [--new 48] [--json OUT]

Prints tokens/s at batch 1 and 16 for `generate`, for raw pages and for near-lossless pages; the ratios are the medians
of interleaved rounds. Decode counts from the first token of all sequences to the last; prefill is what comes before.
"""

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from gear_engine import LLM, SamplingParams
from gear_engine.protocol import AddRequest
from gear_engine.slots import num_slots_held

ROUNDS = 3
BATCHES = (1, 16)
PRESETS = ("near-lossless", "none")


def prompts(num: int, context: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(3, vocab_size, (num, context), generator=generator).tolist()


def engine_seconds(llm: LLM, tokens: list[list[int]], new: int) -> tuple[float, float]:
    """(seconds of the steps that decode all sequences, seconds before): read off the engine's own steps."""
    for i, prompt in enumerate(tokens):
        params = SamplingParams(max_tokens=new + 1, temperature=0.0, ignore_eos=True)
        llm.engine.add(AddRequest(f"bench-{i}", prompt, params))
    decode, prefill = 0.0, 0.0
    while llm.engine.has_work:
        start = time.perf_counter()
        report = llm.engine.step()
        elapsed = time.perf_counter() - start
        if report.batch_tokens == len(tokens):
            decode += elapsed
        else:
            prefill += elapsed
    return decode, prefill


class Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def generate_seconds(model: Any, tokens: list[list[int]], new: int) -> tuple[float, float]:
    """The same for `generate`."""
    ids, clock = torch.tensor(tokens), Clock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return clock.times[-1] - clock.times[0], clock.times[0] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    step = (
        max(BATCHES) * arguments.context
    )  # all prompts in one step, as `generate` does, so that decodes stay together
    engines = {
        preset: LLM(preset=preset, max_model_len=2048, max_running=max(BATCHES), max_batch_tokens=step)
        for preset in PRESETS
    }
    folder = engines[PRESETS[0]].info.model_path
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    vocab_size = engines[PRESETS[0]].info.vocab_size
    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5} {'who':<16}{'decode tok/s':>14}{'x generate':>12}{'prefill tok/s':>15}{'x generate':>12}")
    for batch in BATCHES:
        tokens = prompts(batch, arguments.context, vocab_size)
        decode: dict[str, list[float]] = {}
        prefill: dict[str, list[float]] = {}
        for _ in range(ROUNDS):  # interleaved, so that a neighbour's load falls on all alike
            for who in ("generate", *PRESETS):
                run = (
                    generate_seconds(plain, tokens, arguments.new)
                    if who == "generate"
                    else (engine_seconds(engines[who], tokens, arguments.new))
                )
                decode.setdefault(who, []).append(batch * arguments.new / run[0])
                prefill.setdefault(who, []).append(batch * arguments.context / run[1])
        for who in decode:
            ratio = statistics.median(a / b for a, b in zip(decode[who], decode["generate"], strict=True))
            prefill_ratio = statistics.median(a / b for a, b in zip(prefill[who], prefill["generate"], strict=True))
            row = {
                "batch": batch,
                "who": who,
                "decode_tok_s": round(statistics.median(decode[who]), 1),
                "decode_ratio": round(ratio, 3),
                "prefill_tok_s": round(statistics.median(prefill[who]), 1),
                "prefill_ratio": round(prefill_ratio, 3),
            }
            rows.append(row)
            print(
                f"{batch:>5} {who:<16}{row['decode_tok_s']:>14}{ratio:>12.2f}"
                f"{row['prefill_tok_s']:>15}{prefill_ratio:>12.2f}"
            )
    memory = []
    for preset, llm in engines.items():
        layout = llm.engine.scheduler.layout
        held = 16 * num_slots_held(layout, 1024) * layout.page_bytes
        worst = 16 * max(num_slots_held(layout, n) for n in range(1025 - layout.page_size, 1025)) * layout.page_bytes
        bf16 = 16 * 1024 * layout.token_bytes
        memory.append({"preset": preset, "held": held, "worst": worst, "bf16": bf16})
        print(
            f"KV of 16 x 1024 tokens, {preset}: {held / 2**20:.0f} MiB, {bf16 / held:.2f}x less than bf16 "
            f"({bf16 / worst:.2f}x with the fullest open pages)"
        )
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "context": arguments.context,
            "rows": rows,
            "memory": memory,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
