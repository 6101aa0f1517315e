"""A prefix that comes back from host memory beside one that is computed again, on one GPU.

    python bench/restore.py [--shape 8b] [--tokens 6000] [--preset near-lossless …] [--json bench/results/restore.json]

The pool holds one such prefix and not two: each request's pages push those of the one before out to host memory. Times
are from the request to its first token, medians of rounds. The yardstick: at least five times faster.
"""

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from engine import SHAPES, random_model

from gear_compression import PRESETS, layout_for
from gear_engine.cuda_runner import CudaRunner
from gear_engine.engine import Engine, Limits
from gear_engine.model_loader import LoadedModel
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator, num_slots_for_one

ROUNDS = 5


def first_token(engine: Engine, name: str, tokens: list[int]) -> tuple[float, int]:
    """(seconds until it is there, tokens of the prompt that were found)"""
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.add(AddRequest(name, tokens, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)))
    cached = 0
    while engine.has_work:
        for output in engine.step().outputs:
            cached = output.num_cached_tokens
    return time.perf_counter() - start, cached


def restore(loaded: LoadedModel, preset: str, num_tokens: int) -> dict[str, Any]:
    layout = layout_for(PRESETS[preset], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 2, "tiles")
    num_slots = num_slots_for_one(layout, num_tokens + 1) + 1
    runner = CudaRunner(
        loaded, layout, num_slots, max_running=2, max_batch_tokens=4096, max_model_len=num_tokens + 1,
        num_host_slots=3 * num_slots,
    )  # fmt: skip
    runner.warm_up()
    scheduler = Scheduler(
        SlotAllocator(num_slots), layout, max_running=2, max_batch_tokens=4096, eos_token_ids=[],
        num_host_slots=3 * num_slots,
    )  # fmt: skip
    engine = Engine(scheduler, runner, Sampler(loaded.vocab_size, []), Limits(num_tokens + 1, loaded.vocab_size))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(loaded.vocab_size, (2, num_tokens), generator=generator).tolist()
    computed = []
    for i in range(ROUNDS):
        seconds, cached = first_token(engine, f"new {i}", [i, *prompts[0][1:]])
        assert not cached
        computed.append(seconds)
    for i, prompt in enumerate(prompts):
        first_token(engine, f"warm {i}", prompt)
    restored = []
    for i in range(ROUNDS):
        seconds, cached = first_token(engine, f"again {i}", prompts[i % 2])
        assert cached > num_tokens - 2 * layout.page_size, cached
        restored.append(seconds)
    moved = cached // layout.page_size * layout.page_bytes
    runner.close()
    computed_s, restored_s = statistics.median(computed[1:]), statistics.median(restored)
    return {
        "preset": preset,
        "tokens": num_tokens,
        "computed_s": computed_s,
        "restored_s": restored_s,
        "speedup": computed_s / restored_s,
        "gb_s": 2 * moved / restored_s / 1e9,  # as much goes out meanwhile
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--preset", action="append", choices=list(PRESETS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    loaded = random_model(options.shape, "none")
    rows = []
    for preset in options.preset or ["none", "near-lossless"]:
        row = restore(loaded, preset, options.tokens)
        rows.append(row)
        print(
            f"{preset:<16}{row['tokens']} tokens: computed in {1e3 * row['computed_s']:.0f} ms, back in "
            f"{1e3 * row['restored_s']:.0f} ms: {row['speedup']:.1f}x, {row['gb_s']:.0f} GB/s both ways",
            flush=True,
        )
    if options.json:
        result = {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name()}
        options.json.write_text(
            json.dumps(result | {"command": "python bench/restore.py", "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
