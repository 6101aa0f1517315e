"""What metrics cost a server: CPU seconds in a second of observations and scrapes, as with many streams at once.

    python bench/metrics.py [--streams 256] [--itl-ms 20] [--layers 32]

A step gives every stream a token; a Prometheus scrapes every 5 seconds. The yardstick: 1 % of a core.
"""

import argparse
import time
from collections.abc import Callable

from gear_engine.protocol import EngineInfo, EngineStats, MemoryRow, PageError, RequestOutput, StepReport
from gear_server.metrics import Metrics

_SCRAPE_S = 5.0
_SECONDS = 20


def _info(num_layers: int) -> EngineInfo:
    return EngineInfo(
        model_path="", max_model_len=8192, vocab_size=32000, eos_token_ids=[2], preset="near-lossless", backend="cpu",
        device="cpu", dtype="float32", num_layers=num_layers, num_pages=1000, page_size=128, page_bytes=1000,
        bf16_token_bytes=100, kv_compression_ratio=3.31, memory=[MemoryRow("pages", 1_000_000)], memory_table="",
    )  # fmt: skip


def _cpu_s(work: Callable[[], object], times: int) -> float:
    began_s = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began_s


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--itl-ms", type=float, default=20.0)
    parser.add_argument("--layers", type=int, default=32)
    options = parser.parse_args()
    stats = EngineStats(num_running=options.streams)
    metrics = Metrics("model", _info(options.layers), lambda: stats, lambda: True)
    outputs = [RequestOutput(str(i), [1]) for i in range(options.streams)]
    errors = [PageError(layer, part, 0.03) for layer in range(options.layers) for part in ("keys", "values")]  # type: ignore[arg-type]
    metrics.on_step(StepReport(outputs, stats, 0.02, options.streams, {"a": 0.1}, errors))
    report = StepReport(outputs, stats, 0.02, options.streams, {"a": 0.1}, errors[:2])

    def step() -> None:
        metrics.on_step(report)
        for _ in outputs:
            metrics.inter_token_latency_s.observe(0.0205)

    steps_per_s = 1000 / options.itl_ms
    step_s = _cpu_s(step, int(_SECONDS * steps_per_s)) / _SECONDS
    scrape_s = _cpu_s(lambda: metrics.render(""), 100) / 100
    print(f"{options.streams} streams at {options.itl_ms:g} ms a token: {options.streams * steps_per_s:,.0f} tokens/s")
    print(f"{step_s:8.2%} of a core for observations")
    print(f"{scrape_s / _SCRAPE_S:8.2%} of a core for a scrape every {_SCRAPE_S:g} s ({scrape_s * 1000:.1f} ms each)")
    print(f"{step_s + scrape_s / _SCRAPE_S:8.2%} together (the goal: under 1 %)")


if __name__ == "__main__":
    main()
