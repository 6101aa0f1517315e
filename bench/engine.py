"""The engine on one GPU: output tokens a second, latency and memory, of every preset beside `none`, in one run.

    python bench/engine.py [--work 8b-1000-500 …] [--preset near-lossless …] [--json bench/results/engine.json]

Models have the real shape and random weights; prompts are random tokens, so nothing is shared; every request writes all
its tokens, greedily. Each row is saved as it is measured, and with --json rows that are there are not measured again.
"""

import argparse
import datetime
import gc
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gear_compression import PRESETS, layout_for
from gear_engine.attention_trial import ATTENTION_NAME, register_attention, verify_attention
from gear_engine.cuda_runner import CudaRunner
from gear_engine.engine import Engine, Limits
from gear_engine.model_loader import LoadedModel, weights_bytes
from gear_engine.plan import MemoryPlan, cuda_device, plan_memory
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.quantized import quantize_linears
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.slots import SlotAllocator

PEAK_FLOPS, PEAK_BYTES_S = 989e12, 3.35e12  # of an H100 SXM: bf16 without sparsity, HBM3
SHAPES = {
    "8b": {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256},
    "7b": {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000},
    "tiny": {"intermediate_size": 512, "num_key_value_heads": 2, "vocab_size": 1000, "hidden_size": 512,
             "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """So many requests of so many tokens in and out, all there from the start."""

    shape: str
    num_requests: int
    num_in: int
    num_out: int
    memory: str = "0.9"
    max_running: int = 512
    max_batch_tokens: int = 4096
    sized_to_work: bool = False  # the pool holds what the work needs and no more
    quantization: str = "none"  # of the weights
    until_full: bool = False  # it ends when a sequence has to make room for others


WORKS = {
    "8b-1000-500": Work("8b", 512, 1000, 500),
    "8b-6000-500": Work("8b", 192, 6000, 500, max_running=192),
    "7b-24g-1000-500": Work("7b", 96, 1000, 500, memory="24GB", max_running=96),
    "8b-512-4096": Work("8b", 192, 512, 4096, max_running=192),
    "8b-held-1500": Work("8b", 1200, 1000, 500, max_running=1024, until_full=True),
    "8b-decode-64": Work("8b", 64, 1000, 200, max_running=64),
    "8b-tpot-1": Work("8b", 1, 1000, 200, max_running=1),
    "8b-tpot-8": Work("8b", 8, 1000, 200, max_running=8),
    "7b-equal-batch": Work("7b", 40, 2500, 500, max_running=40, sized_to_work=True, quantization="fp8"),
    "smoke": Work("tiny", 40, 300, 60, max_running=32),
    "smoke-fp8": Work("tiny", 40, 300, 60, max_running=32, quantization="fp8"),
}


def random_model(shape: str, quantization: str) -> LoadedModel:
    """Llama of that shape on the GPU, in bf16, its linear layers in 8 bits if that is asked for."""
    register_attention()
    sizes: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32} | SHAPES[shape]
    config = LlamaConfig(max_position_embeddings=8192, attn_implementation=ATTENTION_NAME, **sizes)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.eval().requires_grad_(False)
    layers = verify_attention(model)
    if quantization == "fp8":
        quantize_linears(model, torch.device("cuda"))
    return LoadedModel(
        model=model,
        config=config,
        layers=layers,
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=layers[0].head_dim,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        eos_token_ids=(),
        weights_bytes=weights_bytes(model),
    )


class Bench:
    """One work on one preset; the model is the caller's, and is fused and compiled only once."""

    def __init__(self, work: Work, preset: str, loaded: LoadedModel) -> None:
        self.work, self.preset = work, preset
        element_bytes = 2
        layout = layout_for(
            PRESETS[preset], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, element_bytes, "tiles"
        )
        max_len = work.num_in + work.num_out
        held = -(-max_len // layout.page_size) + layout.max_runs + 1
        self.plan: MemoryPlan = plan_memory(
            loaded.config, layout, runtime_bytes=600 << 20, weights_bytes=loaded.weights_bytes,
            max_position=loaded.max_position, memory=work.memory,
            num_pages=held * work.num_requests if work.sized_to_work else None, max_model_len=max_len,
            max_running=work.max_running, max_batch_tokens=work.max_batch_tokens, swap_space="0",
            device=cuda_device(),
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        self.runner = CudaRunner(
            loaded, layout, self.plan.num_pages, max_running=work.max_running,
            max_batch_tokens=work.max_batch_tokens, max_model_len=max_len,
        )  # fmt: skip
        self.warm_up_s = self.runner.warm_up()
        scheduler = Scheduler(
            SlotAllocator(self.plan.num_pages), layout, max_running=work.max_running,
            max_batch_tokens=work.max_batch_tokens, eos_token_ids=[],
        )  # fmt: skip
        self.num_head_weights = loaded.vocab_size * loaded.config.hidden_size
        self.num_weights = sum(p.numel() for p in loaded.model.parameters()) - 2 * self.num_head_weights
        self.engine = Engine(scheduler, self.runner, Sampler(loaded.vocab_size, []), Limits(max_len, loaded.vocab_size))

    def add(self, num_requests: int, num_in: int, num_out: int) -> None:
        draw = random.Random(num_requests)
        params = SamplingParams(max_tokens=num_out, temperature=0.0, ignore_eos=True)
        for i in range(num_requests):
            tokens = [draw.randrange(self.engine.limits.vocab_size) for _ in range(num_in)]
            self.engine.add(AddRequest(f"{num_in}-{i}", tokens, params))

    def run(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with what was measured. Utilisation counts the products of the weights, and every step's reading of
        all weights and all pages, against what an H100 has on paper."""
        work, engine = self.work, self.engine
        self.add(min(work.num_requests, 4), 300, 3)  # whatever is compiled at first use
        while engine.has_work:
            engine.step()
        self.add(work.num_requests, work.num_in, work.num_out)
        drawn_before = engine.stats().generation_tokens_total
        held = num_steps = num_tokens = num_bytes = 0
        gaps: list[float] = []
        gc.collect()
        gc.freeze()  # as the engine's own process does
        torch.cuda.synchronize()
        began = last = time.perf_counter()
        while engine.has_work:
            report = engine.step()
            now = time.perf_counter()
            if len(report.outputs) and report.batch_tokens <= work.max_running:
                gaps.append(now - last)
            last = now
            num_steps += 1
            num_tokens += report.batch_tokens
            num_bytes += row["weights_bytes"] + report.stats.kv_sealed_bytes + report.stats.kv_open_bytes
            held = max(held, report.stats.kv_tokens)
            if work.until_full and report.stats.preemptions_total:
                break
        seconds = time.perf_counter() - began
        stats = engine.stats()
        num_drawn = stats.generation_tokens_total - drawn_before
        flop = 2 * (self.num_weights * num_tokens + self.num_head_weights * num_drawn)
        return row | {
            "output_tok_s": num_drawn / seconds,
            "seconds": seconds,
            "steps": num_steps,
            "tpot_ms_p50": 1e3 * statistics.median(gaps),
            "tpot_ms_p99": 1e3 * sorted(gaps)[int(0.99 * (len(gaps) - 1))],
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "planned_bytes": self.plan.budget_bytes - self.plan.headroom_bytes - self.plan.runtime_bytes,
            "tokens_fit": self.plan.tokens_gear,
            "tokens_held": held,
            "pages_used": stats.kv_peak_bytes // self.plan.layout.page_bytes,
            "flops_utilisation": flop / seconds / PEAK_FLOPS,
            "bandwidth_utilisation": num_bytes / seconds / PEAK_BYTES_S,
            "preemptions": stats.preemptions_total,
            "warm_up_s": self.warm_up_s,
        }

    def idle_fraction(self, num_steps: int = 20) -> float:
        """Of steady decode, as the profiler sees it: time in which no kernel runs."""
        num_requests = min(self.work.num_requests, self.work.max_running)
        self.add(num_requests, 200, 200)
        num_decoding = 0
        while num_decoding < 10:  # steps in which all of them do
            num_decoding += self.engine.step().batch_tokens == num_requests
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(num_steps):
                self.engine.step()
            torch.cuda.synchronize()
        spans = sorted(
            (event.time_range.start, event.time_range.end)
            for event in profile.events() or []
            if event.device_type == torch.autograd.DeviceType.CUDA
        )
        busy, end = 0.0, spans[0][0]
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        for i in range(num_requests):
            self.engine.abort(f"200-{i}")
        while self.engine.has_work:
            self.engine.step()
        return float(1 - busy / (end - spans[0][0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", action="append", choices=list(WORKS))
    parser.add_argument("--preset", action="append", choices=list(PRESETS))
    parser.add_argument("--idle", action="store_true", help="also profile a few steps for the GPU's idle share")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": []}
    if arguments.json and arguments.json.is_file():
        result = json.loads(arguments.json.read_text())
    result |= {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "command": "python bench/engine.py",
    }
    models: dict[tuple[str, str], LoadedModel] = {}  # one at a time
    for name in arguments.work or [name for name in WORKS if not name.startswith("smoke")]:
        work = WORKS[name]
        for preset in arguments.preset or ["none", "near-lossless"]:
            rows = [row for row in result["rows"] if row["work"] == name and quantization(row) == work.quantization]
            if any(row["preset"] == preset for row in rows):
                continue
            kind = work.shape, work.quantization
            if kind not in models:
                models.clear()
                gc.collect()
                torch.cuda.empty_cache()
                models[kind] = random_model(*kind)
            bench = Bench(work, preset, models[kind])
            named = {"work": name, "preset": preset, "quantization": work.quantization}
            row = bench.run(named | {"weights_bytes": models[kind].weights_bytes})
            row["gpu_idle_fraction"] = bench.idle_fraction() if arguments.idle else None
            result["rows"].append(row)
            print_row(row, [other for other in [*rows, row] if other["preset"] == "none"])
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
            bench.runner.close()
            del bench
            gc.collect()
            torch.cuda.empty_cache()


def quantization(row: dict[str, Any]) -> str:
    """Rows of older runs do not say."""
    return str(row.get("quantization", "none"))


def print_row(row: dict[str, Any], none: list[dict[str, Any]]) -> None:
    ratio = f"{row['output_tok_s'] / none[0]['output_tok_s']:5.2f}x" if none else ""
    idle = "" if row["gpu_idle_fraction"] is None else f"  idle {row['gpu_idle_fraction']:.1%}"
    print(
        f"{row['work']:<16}{row['preset']:<16}{row['output_tok_s']:8.0f} tok/s {ratio}  {row['seconds']:6.1f} s  "
        f"TPOT {row['tpot_ms_p50']:.2f} / {row['tpot_ms_p99']:.2f} ms  peak {row['peak_bytes'] / 2**30:.1f} GiB "
        f"(planned {row['planned_bytes'] / 2**30:.1f})  {row['tokens_fit']:,} tokens fit, {row['tokens_held']:,} held "
        f"in {row['pages_used']:,} pages  {row['flops_utilisation']:.0%} of FLOPs, "
        f"{row['bandwidth_utilisation']:.0%} of bytes  "
        f"warm-up {row['warm_up_s']:.0f} s{idle}",
        flush=True,
    )


if __name__ == "__main__":
    main()
