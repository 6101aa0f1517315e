"""Decode speed on a CPU beside transformers' own `generate`: same model and threads, one run.

    python bench/cpu.py [--context 512] [--new 48] [--rounds 3] [--cpu-time] [--json OUT]

Prints tokens/s at batch 1 and 16 for `generate` in float32, for near-lossless and raw pages in float32, and for
near-lossless pages with the dtype that `--dtype auto` finds; the ratios are the medians of interleaved rounds. Decode
counts from the first token of all sequences to the last; prefill is what comes before. Last, the time to the first
token of a prompt of 1000. `--cpu-time` counts this process's CPU time instead of the clock's, for a machine that others
use too (set OMP_NUM_THREADS=1 and NUMBA_NUM_THREADS=1 with it).
"""

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from gear_engine import LLM, SamplingParams
from gear_engine.protocol import AddRequest
from gear_engine.slots import num_slots_held

BATCHES = (1, 16)
ENGINES = {  # preset and dtype
    "near-lossless": ("near-lossless", "float32"),
    "none": ("none", "float32"),
    "near-lossless auto": ("near-lossless", "auto"),
}


def prompts(num: int, context: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(num)
    return torch.randint(3, vocab_size, (num, context), generator=generator).tolist()


def engine_seconds(
    llm: LLM, tokens: list[list[int]], new: int, clock: Callable[[], float]
) -> tuple[float, float, float]:
    """(seconds of the steps that decode all sequences, seconds before, bf16 bytes ÷ bytes held by all their tokens).

    Read off the engine's own steps and statistics, the last at the step before the end.
    """
    for i, prompt in enumerate(tokens):
        params = SamplingParams(max_tokens=new + 1, temperature=0.0, ignore_eos=True)
        llm.engine.add(AddRequest(f"bench-{i}", prompt, params))
    decode, prefill, smaller = 0.0, 0.0, 0.0
    while llm.engine.has_work:
        start = clock()
        report = llm.engine.step()
        elapsed = clock() - start
        stats = report.stats
        if stats.kv_tokens:
            held = stats.kv_sealed_bytes + stats.kv_open_bytes
            smaller = stats.kv_tokens * llm.info.bf16_token_bytes / held
        if report.batch_tokens == len(tokens):
            decode += elapsed
        else:
            prefill += elapsed
    return decode, prefill, smaller


class Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        self.times.append(self.clock())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@torch.inference_mode()
def generate_seconds(model: Any, tokens: list[list[int]], new: int, clock: Callable[[], float]) -> tuple[float, ...]:
    """The same for `generate`."""
    ids, noted = torch.tensor(tokens), Clock(clock)
    start = clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new + 1,
        min_new_tokens=new + 1,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([noted]),
    )
    return noted.times[-1] - noted.times[0], noted.times[0] - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    step = (
        max(BATCHES) * arguments.context
    )  # all prompts in one step, as `generate` does, so that decodes stay together
    engines = {
        who: LLM(
            preset=preset,
            dtype=dtype,
            max_model_len=2048,
            max_running=max(BATCHES),
            max_batch_tokens=step,
            prefix_cache=False,
        )
        for who, (preset, dtype) in ENGINES.items()
    }
    for who, llm in engines.items():
        print(f"{who}: {llm.info.memory_table.splitlines()[-1]}")
    folder = engines["none"].info.model_path
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    vocab_size = engines["none"].info.vocab_size
    rows: list[dict[str, Any]] = []
    print(f"{'batch':>5} {'who':<20}{'decode tok/s':>14}{'x generate':>12}{'prefill tok/s':>15}{'x generate':>12}")
    for batch in BATCHES:
        tokens = prompts(batch, arguments.context, vocab_size)
        decode: dict[str, list[float]] = {}
        prefill: dict[str, list[float]] = {}
        smaller: dict[str, float] = {}
        for _ in range(arguments.rounds):  # interleaved, so that a neighbour's load falls on all alike
            for who in ("generate", *ENGINES):
                run = (
                    generate_seconds(plain, tokens, arguments.new, clock)
                    if who == "generate"
                    else engine_seconds(engines[who], tokens, arguments.new, clock)
                )
                decode.setdefault(who, []).append(batch * arguments.new / run[0])
                prefill.setdefault(who, []).append(batch * arguments.context / run[1])
                smaller.update({who: run[2]} if len(run) > 2 else {})
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
                "kv_smaller_than_bf16": round(smaller[who], 3) if who in smaller else None,
            }
            rows.append(row)
            print(
                f"{batch:>5} {who:<20}{row['decode_tok_s']:>14}{ratio:>12.2f}"
                f"{row['prefill_tok_s']:>15}{prefill_ratio:>12.2f}",
                flush=True,
            )
    ttft_ms = {}
    for who, llm in engines.items():
        seconds = [engine_seconds(llm, prompts(1, 1000, vocab_size), 1, clock)[1] for _ in range(arguments.rounds)]
        ttft_ms[who] = round(1000 * statistics.median(seconds))
        print(f"first token of a prompt of 1000, {who}: {ttft_ms[who]} ms")
    memory = []
    for preset in ("near-lossless", "none"):
        llm = engines[preset]
        layout = llm.engine.scheduler.layout
        bf16, held = (16 * n for n in (1024 * layout.token_bytes, num_slots_held(layout, 1024) * layout.page_bytes))
        worst = min(
            n * layout.token_bytes / (num_slots_held(layout, n) * layout.page_bytes)
            for n in range(1025 - layout.page_size, 1025)
        )
        memory.append({"preset": preset, "held_bytes": held, "bf16_bytes": bf16, "worst_ratio": round(worst, 3)})
        print(
            f"KV of 16 x 1024 tokens, {preset}: {held / 2**20:.0f} MiB, {bf16 / held:.2f}x less than bf16 "
            f"({worst:.2f}x at the worst length up to it, with the fullest open pages)"
        )
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "clock": "cpu" if arguments.cpu_time else "wall",
            "context": arguments.context,
            "new_tokens": arguments.new,
            "rounds": arguments.rounds,
            "load_average": [round(load, 1) for load in os.getloadavg()],
            "products": {who: llm.info.memory_table.splitlines()[-1] for who, llm in engines.items()},
            "rows": rows,
            "ttft_1000_ms": ttft_ms,
            "memory": memory,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
