"""What streams feel of others: the gaps of 16 running ones while a long prompt arrives, and what a shared prompt saves.

    python bench/pressure.py [--cpu-time] [--chunk-tokens N] [--json OUT]

The yardsticks: p99 of the gaps at most 2.5 times the quiet p99; the second request of a shared 1000-token prompt has
its first token in at most 0.2 times the first one's time. `--cpu-time` counts this process's CPU time instead of the
clock's, for a machine that others use too (set OMP_NUM_THREADS=1 and NUMBA_NUM_THREADS=1 with it).
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gear_engine import LLM, SamplingParams
from gear_engine.protocol import AddRequest

STREAMS = 16
QUIET_STEPS = 64  # half of the streams fill a page
PROMPT = 4096
SHARED = 1000


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(3, 40_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def add(llm: LLM, name: str, token_ids: list[int], max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    llm.engine.add(AddRequest(name, token_ids, params))


def until_first_token(llm: LLM, name: str, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Seconds until `name` has its first token, and those of each step until then."""
    steps: list[float] = []
    while True:
        start = clock()
        outputs = llm.engine.step().outputs
        steps.append(clock() - start)
        if any(output.request_id == name for output in outputs):
            return sum(steps), steps


def gaps(llm: LLM, clock: Callable[[], float]) -> dict[str, float]:
    """Every step gives each stream a token: its length is their gap."""
    for i in range(STREAMS):  # of unequal length, so that they do not all fill a page in the same step
        add(llm, f"stream {i}", prompt(i, 256 + 8 * i), 2000)
    until_first_token(llm, f"stream {STREAMS - 1}", clock)
    quiet = []
    for _ in range(QUIET_STEPS):
        start = clock()
        llm.engine.step()
        quiet.append(clock() - start)
    add(llm, "long", prompt(99, PROMPT), 1)
    ttft, busy = until_first_token(llm, "long", clock)
    for i in range(STREAMS):
        llm.engine.abort(f"stream {i}")
    quiet_p99, busy_p99 = (float(np.percentile(each, 99)) for each in (quiet, busy))
    return {
        "quiet_itl_p50_s": float(np.median(quiet)),
        "quiet_itl_p99_s": quiet_p99,
        "busy_itl_p50_s": float(np.median(busy)),
        "busy_itl_p99_s": busy_p99,
        "ratio": busy_p99 / quiet_p99,
        "long_prompt_ttft_s": ttft,
        "steps": len(busy),
    }


def shared(llm: LLM, clock: Callable[[], float]) -> dict[str, float]:
    system = prompt(7, SHARED)
    first, second = [], []
    for round_ in range(3):
        for times, name in ((first, "first"), (second, "second")):
            add(llm, name, [round_ + 5, *system[1:], *prompt(len(first) + 10 * len(second), 20)], 1)
            times.append(until_first_token(llm, name, clock)[0])
    return {
        "first_ttft_s": float(np.median(first)),
        "second_ttft_s": float(np.median(second)),
        "ratio": float(np.median(second) / np.median(first)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--chunk-tokens", type=int, help="instead of the default; 0: no bound")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    llm = LLM(max_model_len=6144, max_running=32, memory="6GiB")
    if options.chunk_tokens is not None:
        llm.engine.scheduler.chunk_tokens = options.chunk_tokens or None
    result: dict[str, object] = {
        "date": datetime.date.today().isoformat(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "cpu" if options.cpu_time else "wall",
        "chunk_tokens": llm.engine.scheduler.chunk_tokens,
        "far_tokens": llm.engine.scheduler.far_tokens,
    }
    result["shared_prompt"] = saved = shared(llm, clock)
    print(
        f"shared {SHARED}-token prompt: TTFT {saved['first_ttft_s']:.3f} s, then {saved['second_ttft_s']:.3f} s: "
        f"{saved['ratio']:.2f}x (at most 0.20x)"
    )
    result["gaps"] = found = gaps(llm, clock)
    print(
        f"{STREAMS} streams: p99 gap {found['quiet_itl_p99_s'] * 1000:.0f} ms quiet, "
        f"{found['busy_itl_p99_s'] * 1000:.0f} ms while {PROMPT} tokens arrive: {found['ratio']:.2f}x "
        f"(at most 2.50x); their first token after {found['long_prompt_ttft_s']:.1f} s"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
