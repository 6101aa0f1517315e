"""An hour of traffic in a minute: the real scheduler and allocators, with arithmetic in the place of the model.

    python bench/simulate.py [--minutes 60] [--rates 2,4,8] [--json OUT] [--plot OUT]

Llama-3-8B on one H100. A step of d decodes and c prompt tokens with `context` tokens before them takes

    step_s = weights_s + (d + c) · token_s + context · context_s + seals · seal_s + moves · move_s

- weights_s = 16.1 GB of weights at 2.99 TB/s (the copy bandwidth in bench/results/kernels.json)
- token_s = 2 · 8.0e9 FLOPs at 400 TFLOP/s, which is assumed, not measured
- context_s: bytes of a token in this preset's pages, read at the rate of its decode kernel (`gb_s` of decode-8b)
- seal_s: the preset's `ms` of `seal`, which is a chunk of 2048 tokens in all layers, a page's share of it (`none`: 0)
- move_s: a page's bytes over PCIe at 25 GB/s
- and 2 ms for the launches and the sampling of a step.

Users talk in conversations: turns that repeat all that was said, after a shared system prompt, with time to read and
type between them (log-normal lengths). A request is good if its first token came within 2 s and its mean gap stayed
below 50 ms. Offered load: conversations that begin per second.
"""

import argparse
import datetime
import gc
import heapq
import json
import random
import statistics
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gear_compression import PRESETS, layout_for
from gear_compression.layout import Layout
from gear_engine.prefix_cache import Move
from gear_engine.protocol import SamplingParams
from gear_engine.scheduler import Scheduler, service_order
from gear_engine.sequence import Batch, Sequence
from gear_engine.slots import SlotAllocator

KERNELS = Path(__file__).parent / "results" / "kernels.json"
LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
WEIGHTS_BYTES = 16.1e9
FLOPS_A_TOKEN, FLOPS = 2 * 8.0e9, 400e12
POOL_BYTES = 438_912 * 131_072  # what vLLM has for its pages on this card
HOST_BYTES = 64e9
PCIE_BYTES_S = 25e9
LAUNCH_S = 0.002
SEALED_TOKENS = 2048  # by which bench/kernels.py measured sealing
MAX_RUNNING, MAX_BATCH_TOKENS, CHUNK_TOKENS = 512, 2048, 384
MAX_LEN = 16_384
SYSTEM_PROMPTS, SYSTEM_LEN = 20, 800
GOOD_TTFT_S, GOOD_ITL_S = 2.0, 0.050
TOKEN = 7


@dataclass(slots=True)
class Costs:
    """Of one preset, from measurements."""

    layout: Layout
    context_s: float
    seal_s: float
    weights_s: float

    @classmethod
    def measured(cls, preset: str) -> "Costs":
        measured = json.loads(KERNELS.read_text())
        rows = {(row["case"], row["preset"]): row for row in measured["rows"]}
        layout = layout_for(PRESETS[preset], LAYERS, KV_HEADS, HEAD_DIM, 2)
        bytes_a_token = layout.page_bytes / layout.page_size
        decode = rows["decode-8b", preset]
        seal = rows.get(("seal", preset))
        return cls(
            layout,
            context_s=bytes_a_token / (decode["gb_s"] * 1e9),
            seal_s=seal["ms"] / 1000 * layout.page_size / SEALED_TOKENS if seal else 0.0,
            weights_s=WEIGHTS_BYTES / (measured["copy_gb_s"] * 1e9),
        )

    def step_s(self, batch: Batch) -> float:
        context = seals = 0
        for item in batch.scheduled:
            context += item.start
            seals += len(item.pages) - len(item.sequence.pages)
        move_s = sum(isinstance(move, Move) for move in batch.moves) * self.layout.page_bytes / PCIE_BYTES_S
        return (
            LAUNCH_S
            + self.weights_s
            + batch.num_tokens * FLOPS_A_TOKEN / FLOPS
            + context * self.context_s
            + seals * self.seal_s
            + move_s
        )


@dataclass(slots=True)
class User:
    """A conversation: its turns, and all tokens so far."""

    token_ids: list[int]
    turns: int
    first_s: float = 0.0
    arrived_s: float = 0.0


@dataclass(slots=True)
class Result:
    """What one run of one preset at one load came to."""

    ttft_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    num_requests: int = 0
    num_good: int = 0
    num_steps: int = 0
    scheduling_s: float = 0.0
    most_running: int = 0
    most_waiting: int = 0


class Simulation:
    """Time is a number here: it goes on by what a step would take."""

    def __init__(self, preset: str, rate: float, seconds: float) -> None:
        self.costs = Costs.measured(preset)
        layout = self.costs.layout
        self.scheduler = Scheduler(
            SlotAllocator(int(POOL_BYTES / layout.page_bytes)),
            layout,
            max_running=MAX_RUNNING,
            max_batch_tokens=MAX_BATCH_TOKENS,
            eos_token_ids=[],
            num_host_slots=int(HOST_BYTES / layout.page_bytes),
            chunk_tokens=CHUNK_TOKENS,
        )
        self.rng = random.Random(1)  # the same users for every preset
        self.seconds = seconds
        self.now_s = 0.0
        self.num_arrivals = 0
        self.users: dict[str, User] = {}
        self.result = Result()
        self.events: list[tuple[float, int, User]] = []
        starts, number = 0.0, 0
        while (starts := starts + self.rng.expovariate(rate)) < seconds:
            number += 1
            system = self.rng.randrange(SYSTEM_PROMPTS)
            user = User([1000 + system] * SYSTEM_LEN, turns=1 + min(9, int(self.rng.expovariate(1 / 3))))
            heapq.heappush(self.events, (starts, number, user))

    def run(self) -> None:
        while self.now_s < self.seconds and (self.events or self.scheduler.has_work):
            if not self.scheduler.has_work:
                self.now_s = max(self.now_s, self.events[0][0])
            while self.events and self.events[0][0] <= self.now_s:
                self._ask(*heapq.heappop(self.events))
            self._step()

    def _ask(self, at_s: float, number: int, user: User) -> None:
        typed = min(int(self.rng.lognormvariate(5.0, 1.0)) + 1, 4000)
        answer = min(int(self.rng.lognormvariate(5.3, 0.8)) + 1, 1500)
        if len(user.token_ids) + typed + answer > MAX_LEN:
            return
        user.token_ids += [number % 90_000] * typed
        user.arrived_s, user.first_s = at_s, 0.0
        self.num_arrivals += 1
        name = str(self.num_arrivals)
        self.users[name] = user
        self.scheduler.add(
            Sequence(
                request_id=name,
                token_ids=list(user.token_ids),
                num_prompt=len(user.token_ids),
                params=SamplingParams(max_tokens=answer, ignore_eos=True),
                seed=0,
                order=service_order(0, self.num_arrivals),
                arrival_s=at_s,
            )
        )

    def _step(self) -> None:
        result, scheduler = self.result, self.scheduler
        start = time.process_time()
        batch = scheduler.schedule()
        result.scheduling_s += time.process_time() - start
        for item in batch.scheduled:
            if not item.sequence.was_scheduled:
                result.queue_s.append(self.now_s - item.sequence.arrival_s)
        self.now_s += self.costs.step_s(batch)
        sequences = {item.sequence.request_id: item.sequence for item in batch.scheduled if item.samples}
        start = time.process_time()
        scheduler.advance(batch)
        outputs = scheduler.commit(batch, dict.fromkeys(sequences, TOKEN), {})
        result.scheduling_s += time.process_time() - start
        result.num_steps += 1
        result.most_running = max(result.most_running, len(scheduler.running))
        result.most_waiting = max(result.most_waiting, len(scheduler.waiting))
        for output in outputs:
            user, sequence = self.users[output.request_id], sequences[output.request_id]
            if not user.first_s:
                user.first_s = self.now_s
                result.ttft_s.append(self.now_s - user.arrived_s)
            if output.finish_reason is not None:
                self._finish(output.request_id, user, sequence)

    def _finish(self, name: str, user: User, sequence: Sequence) -> None:
        del self.users[name]
        gap_s = (self.now_s - user.first_s) / max(sequence.num_output - 1, 1)
        self.result.num_requests += 1
        self.result.num_good += user.first_s - user.arrived_s <= GOOD_TTFT_S and gap_s <= GOOD_ITL_S
        user.token_ids = sequence.token_ids
        user.turns -= 1
        if user.turns:
            pause_s = self.rng.lognormvariate(3.0, 0.7)
            self.num_arrivals += 1
            heapq.heappush(self.events, (self.now_s + pause_s, self.num_arrivals, user))

    def row(self, preset: str, rate: float) -> dict[str, Any]:
        result, stats = self.result, self.scheduler.stats(0)
        ttft = sorted(result.ttft_s) or [0.0]
        return {
            "preset": preset,
            "conversations_per_s": rate,
            "requests_per_s": result.num_requests / self.now_s,
            "goodput_per_s": result.num_good / self.now_s,
            "output_tok_s": stats.generation_tokens_total / self.now_s,
            "hit_rate": stats.cached_tokens_total / max(stats.prompt_tokens_total, 1),
            "swaps_out": stats.swaps_out_total,
            "preemptions": stats.preemptions_total,
            "ttft_p50_s": statistics.median(ttft),
            "ttft_p99_s": ttft[int(0.99 * (len(ttft) - 1))],
            "queue_p50_s": statistics.median(result.queue_s or [0.0]),
            "most_running": result.most_running,
            "most_waiting": result.most_waiting,
            "steps": result.num_steps,
            "scheduling_ms_a_step": 1000 * result.scheduling_s / max(result.num_steps, 1),
        }


def scheduling_cost(num_running: int = 512, num_slots: int = 100_000) -> dict[str, float]:
    """Milliseconds of CPU time of schedule and commit in a step of that many decodes, the pool nearly full."""
    layout = layout_for(PRESETS["near-lossless"], LAYERS, KV_HEADS, HEAD_DIM, 2)
    scheduler = Scheduler(
        SlotAllocator(num_slots), layout, max_running=num_running, max_batch_tokens=8192, eos_token_ids=[]
    )
    length = (num_slots // num_running - 16) * layout.page_size
    for i in range(num_running):
        tokens = list(array("i", [i]) * length)
        params = SamplingParams(max_tokens=100_000, ignore_eos=True)
        scheduler.add(Sequence(str(i), tokens, length, params, 0, service_order(0, i), 0.0))
    took: list[float] = []
    while len(took) < 200:
        if len(took) == 1:
            gc.freeze()  # else the collector now and then walks through millions of tokens
        start = time.process_time()
        batch = scheduler.schedule()
        middle = time.process_time()
        tokens_drawn = {item.sequence.request_id: TOKEN for item in batch.scheduled if item.samples}
        before_commit = time.process_time()
        scheduler.advance(batch)
        scheduler.commit(batch, tokens_drawn, {})
        if len(tokens_drawn) == num_running:
            took.append(middle - start + time.process_time() - before_commit)
    return {
        "running": num_running,
        "pages": num_slots,
        "p50_ms": 1000 * statistics.median(took),
        "p99_ms": 1000 * sorted(took)[int(0.99 * len(took))],
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    panels = (
        ("goodput_per_s", "good requests a second"),
        ("ttft_p99_s", "p99 time to first token, s"),
        ("hit_rate", "prompt tokens found in the cache"),
        ("output_tok_s", "tokens a second"),
    )
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for preset in dict.fromkeys(row["preset"] for row in rows):
            own = [row for row in rows if row["preset"] == preset]
            axes.plot([row["conversations_per_s"] for row in own], [row[key] for row in own], "o-", label=preset)
        axes.set_title(title)
        axes.set_xlabel("conversations that begin a second")
        axes.grid(alpha=0.3)
        if key == "ttft_p99_s":
            axes.set_yscale("log")
    figure.axes[0].legend()
    figure.suptitle("Simulated: Llama-3-8B on one H100, the real scheduler, a cost model of the model")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rates", default="2,4,6,8")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cost = scheduling_cost()
    print(
        f"scheduling {cost['running']} sequences in {cost['pages']:,} pages: {cost['p50_ms']:.2f} ms a step, "
        f"p99 {cost['p99_ms']:.2f} ms (the goal: below 1 ms)"
    )
    print(f"{'preset':<16}{'load/s':>7}{'req/s':>7}{'good/s':>7}{'tok/s':>8}{'hits':>6}{'swaps':>7}{'again':>7}"
          f"{'TTFT p50':>9}{'p99 s':>8}{'queue':>7}{'sched ms':>9}{'took s':>7}")  # fmt: skip
    rows = []
    for preset in options.presets.split(","):
        for rate in map(float, options.rates.split(",")):
            start = time.perf_counter()
            simulation = Simulation(preset, rate, 60 * options.minutes)
            simulation.run()
            row = simulation.row(preset, rate) | {"took_s": time.perf_counter() - start}
            rows.append(row)
            print(f"{preset:<16}{rate:>7g}{row['requests_per_s']:>7.1f}{row['goodput_per_s']:>7.1f}"
                  f"{row['output_tok_s']:>8.0f}{row['hit_rate']:>6.0%}{row['swaps_out']:>7}{row['preemptions']:>7}"
                  f"{row['ttft_p50_s']:>9.2f}{row['ttft_p99_s']:>8.2f}{row['queue_p50_s']:>7.2f}"
                  f"{row['scheduling_ms_a_step']:>9.2f}{row['took_s']:>7.0f}", flush=True)  # fmt: skip
    if options.json:
        result = {"date": datetime.date.today().isoformat(), "minutes": options.minutes, "cost": cost, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
