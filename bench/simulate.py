"""An hour of traffic in two minutes: the real scheduler and allocators, with arithmetic in the place of the model.

    python bench/simulate.py [--rate 6] [--rates 4,8,16] [--presets none,balanced] [--json OUT] [--plot OUT]

Each preset serves an hour at `--rate`, and then ten minutes at each of `--rates`, of which the first two go by until
as many conversations run as will. Offered load is counted in conversations that begin per second.

Llama-3-8B on one H100. A step of T tokens, P of them of prompts, takes the sum of

- products: the time to read the weights (16.1 GB at the copy bandwidth in bench/results/kernels.json), or
  1.5 ms + 17.9 µs · T if that is more: measured are 10.7 ms at 512 tokens and 75 ms at 4096 (826 TFLOP/s)
- all else of a layer, launches and sampling: 1.3 ms + 1.9 µs · T; measured are 2 ms at 512 and 9 ms at 4096
- attention of decodes: the bytes of their pages in this preset, and 131 kB for each token of an open page, at the rate
  of the decode kernel (`gb_s` of decode-8b in kernels.json)
- attention of prompts: pairs of tokens that see each other, at the rate of `prefill-8k` in kernels.json (a chunk of
  2048 at the end of 8192, one layer), and 1.7 µs · P, or 2.6 µs · P with pages to dequantise. Measured are 10 and
  3.7 ms for 4096 tokens of prompts of 1000, with near-lossless, and taken to be alike for all presets.
- sealing: the preset's `ms` of `seal` in kernels.json, a page's share of it (`none`: 0)
- moves: a page's bytes over PCIe at 25 GB/s, which is assumed.

So a step of 4096 prompt tokens takes 101 ms (measured: 105), one of 512 decodes after 1250 tokens 23.3 ms (22.4), one
of a single decode 6.7 ms (6.7). What the scheduler itself takes is hidden behind the GPU and counts as nothing.

Users talk in conversations: turns that repeat all that was said, after a shared system prompt, with time to read and
type between them (log-normal lengths). A request is good if its first token came within 2 s and its mean gap stayed
below 50 ms. One that finds 1024 waiting is refused, and its conversation ends.
"""

import argparse
import datetime
import gc
import heapq
import json
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gear_compression import PRESETS, layout_for
from gear_compression.layout import Layout
from gear_engine.protocol import SamplingParams
from gear_engine.scheduler import Scheduler, service_order
from gear_engine.sequence import Batch, Sequence
from gear_engine.slots import SlotAllocator

KERNELS = Path(__file__).parent / "results" / "kernels.json"
LAYERS, KV_HEADS, HEAD_DIM = 32, 8, 128
WEIGHTS_BYTES = 16.1e9
PRODUCTS_S, PRODUCTS_TOKEN_S = 0.0015, 17.9e-6
REST_S, REST_TOKEN_S = 0.0013, 1.9e-6
PROMPT_TOKEN_S, DEQUANTISE_TOKEN_S = 1.7e-6, 0.9e-6
SEALED_TOKENS = 2048  # by which bench/kernels.py measured sealing
PREFILL_PAIRS = 2048 * (8192 - 1024)  # of prefill-8k there
RAW_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 4  # of a token in bf16, keys and values
POOL_BYTES = 438_912 * RAW_BYTES  # what vLLM has for its pages on this card
HOST_BYTES = 64e9
PCIE_BYTES_S = 25e9
MAX_RUNNING, MAX_BATCH_TOKENS, MAX_WAITING = 512, 2048, 1024
MAX_LEN = 16_384
SYSTEM_PROMPTS, SYSTEM_LEN = 20, 800
GOOD_TTFT_S, GOOD_ITL_S = 2.0, 0.050
SWEEP_S = 600.0
TOKEN = 7


@dataclass(slots=True)
class Costs:
    """Of one preset, from measurements, in seconds."""

    layout: Layout
    weights_s: float
    sealed_s: float  # a sealed token that a decode reads
    open_s: float  # one of an open page
    prompt_s: float  # a prompt token, beside products and the rest
    pair_s: float  # two tokens of which one, in a prompt, sees the other
    seal_s: float  # a page
    move_s: float  # a page

    @classmethod
    def measured(cls, preset: str) -> "Costs":
        measured = json.loads(KERNELS.read_text())
        rows = {(row["case"], row["preset"]): row for row in measured["rows"]}
        layout = layout_for(PRESETS[preset], LAYERS, KV_HEADS, HEAD_DIM, 2)
        bytes_s = rows["decode-8b", preset]["gb_s"] * 1e9
        seal = rows.get(("seal", preset))
        return cls(
            layout,
            weights_s=WEIGHTS_BYTES / (measured["copy_gb_s"] * 1e9),
            sealed_s=layout.page_bytes / layout.page_size / bytes_s,
            open_s=RAW_BYTES / bytes_s,
            prompt_s=PROMPT_TOKEN_S + (0.0 if layout.is_raw else DEQUANTISE_TOKEN_S),
            pair_s=LAYERS * rows["prefill-8k", preset]["ms"] / 1000 / PREFILL_PAIRS,
            seal_s=seal["ms"] / 1000 * layout.page_size / SEALED_TOKENS if seal else 0.0,
            move_s=layout.page_bytes / PCIE_BYTES_S,
        )

    def step_s(self, batch: Batch) -> float:
        page_size = self.layout.page_size
        num_tokens = num_prompt = num_pairs = num_read = num_open = num_sealed = 0
        for item in batch.scheduled:
            start, num_new = item.start, item.num_new
            num_tokens += num_new
            if num_new == 1:
                num_read += start
                num_open += start % page_size
            else:
                num_prompt += num_new
                num_pairs += num_new * (2 * start + num_new) // 2
            if start % page_size + num_new >= page_size:
                num_sealed += (start % page_size + num_new) // page_size
        return (
            max(self.weights_s, PRODUCTS_S + num_tokens * PRODUCTS_TOKEN_S)
            + REST_S
            + num_tokens * REST_TOKEN_S
            + (num_read - num_open) * self.sealed_s
            + num_open * self.open_s
            + num_prompt * self.prompt_s
            + num_pairs * self.pair_s
            + num_sealed * self.seal_s
            + len(batch.moves) * self.move_s
        )


class Turn(NamedTuple):
    """Tokens that the user types and tokens of the answer to it, and the time from that to the next turn."""

    typed: int
    answer: int
    pause_s: float


@dataclass(slots=True)
class User:
    """A conversation: the turns to come, and all tokens so far."""

    number: int
    system: int
    turns: deque[Turn]
    token_ids: list[int] = field(default_factory=list)
    num_prompt: int = 0  # tokens of the turn that is being answered
    arrived_s: float = 0.0
    first_s: float = 0.0


def draw_user(rng: random.Random, number: int) -> User:
    turns = [
        Turn(
            typed=min(int(rng.lognormvariate(5.0, 1.0)) + 1, 4000),
            answer=min(int(rng.lognormvariate(5.3, 0.8)) + 1, 1500),
            pause_s=rng.lognormvariate(3.0, 0.7),
        )
        for _ in range(1 + min(9, int(rng.expovariate(1 / 3))))
    ]
    return User(number, rng.randrange(SYSTEM_PROMPTS), deque(turns))


@dataclass(slots=True)
class Result:
    """What one run of one preset at one load came to."""

    ttft_s: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    num_users: int = 0
    num_requests: int = 0
    num_refused: int = 0
    num_good: int = 0
    num_steps: int = 0
    num_running: int = 0  # summed over the steps
    num_moved: int = 0  # pages, to host memory and back
    most_waiting: int = 0
    scheduling_s: float = 0.0


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
        )
        self.seconds = seconds
        self.now_s = 0.0
        self.num_asked = 0
        self.users: dict[str, User] = {}  # who waits for an answer, by request id
        self.drawn: dict[str, int] = {}  # what the model says to each of them
        self.result = Result()
        self.events: list[tuple[float, int, User]] = []  # a heap: when who asks
        rng, starts_s = random.Random(1), 0.0  # the same users for every preset
        while (starts_s := starts_s + rng.expovariate(rate)) < seconds:
            self.result.num_users += 1
            self.events.append((starts_s, self.result.num_users, draw_user(rng, self.result.num_users)))

    def run(self) -> None:
        while self.now_s < self.seconds and (self.events or self.scheduler.has_work):
            if not self.scheduler.has_work:
                self.now_s = max(self.now_s, self.events[0][0])
            while self.events and self.events[0][0] <= self.now_s:
                at_s, _, user = heapq.heappop(self.events)
                self._ask(at_s, user)
            self._step()

    def _ask(self, at_s: float, user: User) -> None:
        turn = user.turns[0]
        if len(user.token_ids) + turn.typed + turn.answer > MAX_LEN:
            return
        if len(self.scheduler.waiting) >= MAX_WAITING:
            self.result.num_refused += 1
            return
        if not user.token_ids:
            user.token_ids = [-1 - user.system] * SYSTEM_LEN
        user.token_ids += [user.number] * turn.typed
        user.num_prompt, user.arrived_s, user.first_s = len(user.token_ids), at_s, 0.0
        self.num_asked += 1
        name, order = str(self.num_asked), service_order(0, self.num_asked)
        params = SamplingParams(max_tokens=turn.answer, ignore_eos=True)
        self.users[name], self.drawn[name] = user, TOKEN
        # The answer is added to the user's own tokens.
        self.scheduler.add(Sequence(name, user.token_ids, user.num_prompt, params, seed=0, order=order, arrival_s=at_s))

    def _step(self) -> None:
        result, scheduler = self.result, self.scheduler
        start = time.process_time()
        batch = scheduler.schedule()
        result.scheduling_s += time.process_time() - start
        begins = [item.sequence for item in batch.scheduled if not item.sequence.was_scheduled]
        result.queue_s += [self.now_s - sequence.arrival_s for sequence in begins]
        self.now_s += self.costs.step_s(batch)
        start = time.process_time()
        scheduler.advance(batch)
        outputs = scheduler.commit(batch, self.drawn, {})
        result.scheduling_s += time.process_time() - start
        result.num_steps += 1
        result.num_running += len(batch.scheduled)
        result.num_moved += len(batch.moves)
        result.most_waiting = max(result.most_waiting, len(scheduler.waiting))
        for output in outputs:
            user = self.users[output.request_id]
            if not user.first_s:
                user.first_s = self.now_s
                result.ttft_s.append(self.now_s - user.arrived_s)
            if output.finish_reason is not None:
                self._finish(output.request_id, user)

    def _finish(self, name: str, user: User) -> None:
        del self.users[name], self.drawn[name]
        turn = user.turns.popleft()
        gap_s = (self.now_s - user.first_s) / max(turn.answer - 1, 1)
        self.result.num_requests += 1
        self.result.num_good += user.first_s - user.arrived_s <= GOOD_TTFT_S and gap_s <= GOOD_ITL_S
        if user.turns:
            heapq.heappush(self.events, (self.now_s + turn.pause_s, user.number, user))

    def row(self, preset: str, rate: float) -> dict[str, Any]:
        result, stats = self.result, self.scheduler.stats(0)
        ttft, num_steps = sorted(result.ttft_s), result.num_steps
        return {
            "preset": preset,
            "conversations_per_s": rate,
            "minutes": self.seconds / 60,
            "users": result.num_users,
            "requests_per_s": result.num_requests / self.now_s,
            "goodput_per_s": result.num_good / self.now_s,
            "refused": result.num_refused,
            "output_tok_s": stats.generation_tokens_total / self.now_s,
            "hit_rate": stats.cached_tokens_total / stats.prompt_tokens_total,
            "swaps_out": stats.swaps_out_total,
            "preemptions": stats.preemptions_total,
            "moved_bytes": result.num_moved * self.costs.layout.page_bytes,
            "ttft_p50_s": statistics.median(ttft),
            "ttft_p99_s": ttft[int(0.99 * (len(ttft) - 1))],
            "queue_p50_s": statistics.median(result.queue_s),
            "running_mean": result.num_running / num_steps,
            "most_waiting": result.most_waiting,
            "steps": num_steps,
            "scheduling_ms_a_step": 1000 * result.scheduling_s / num_steps,
        }


def scheduling_cost(num_waiting: int, num_running: int = 512, num_slots: int = 100_000) -> dict[str, float]:
    """Milliseconds of CPU time of all that the scheduler does in a step of that many decodes, in a pool nearly full.

    All sequences are equally long, so that all of them fill a page in the same step, twice in 256 steps. With any
    waiting, each step looks for slots for them, in vain.
    """
    layout = layout_for(PRESETS["near-lossless"], LAYERS, KV_HEADS, HEAD_DIM, 2)
    max_running = num_running + bool(num_waiting)
    scheduler = Scheduler(
        SlotAllocator(num_slots), layout, max_running=max_running, max_batch_tokens=8192, eos_token_ids=[]
    )
    params = SamplingParams(max_tokens=100_000, ignore_eos=True)
    drawn = dict.fromkeys(map(str, range(num_running)), TOKEN)

    def add(number: int, token_ids: list[int]) -> None:
        order = service_order(0, number)
        scheduler.add(Sequence(str(number), token_ids, len(token_ids), params, 0, order, arrival_s=0.0))

    def step() -> tuple[float, int]:
        start = time.process_time()
        batch = scheduler.schedule()
        scheduler.advance(batch)
        scheduler.commit(batch, drawn, {})
        scheduler.stats(0)
        return time.process_time() - start, batch.num_tokens

    for i in range(num_running):
        add(i, [i] * (num_slots // num_running - 16) * layout.page_size)
    while step()[1] != num_running:  # their prompts
        pass
    too_long = [-1] * 9000 * layout.page_size  # for the slots that are left
    for i in range(num_running, num_running + num_waiting):
        add(i, too_long)
    step()
    gc.freeze()  # as the engine's process does: else the collector walks through millions of tokens
    took = [step()[0] for _ in range(256)]
    return {
        "running": num_running,
        "waiting": num_waiting,
        "pages": num_slots,
        "p50_ms": 1000 * statistics.median(took),
        "mean_ms": 1000 * statistics.mean(took),
        "max_ms": 1000 * max(took),
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    panels = (
        ("goodput_per_s", "good requests a second"),
        ("ttft_p99_s", "p99 time to first token, s"),
        ("hit_rate", "prompt tokens found in the cache"),
        ("running_mean", "sequences in a step, on average"),
    )
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for preset, marker in zip(PRESETS, "osD^vX", strict=True):
            own = [row for row in rows if row["preset"] == preset]
            dashes = "--" if preset == "none" else "-"
            loads = [row["conversations_per_s"] for row in own]
            axes.plot(loads, [row[key] for row in own], dashes, marker=marker, markersize=6, label=preset)
        axes.set_title(title)
        axes.set_xlabel("conversations that begin a second")
        axes.grid(alpha=0.3)
        if key == "ttft_p99_s":
            axes.set_yscale("log")
            axes.axhline(GOOD_TTFT_S, color="grey", linewidth=1.5, linestyle=":")
            axes.annotate("good up to here", (loads[0], GOOD_TTFT_S), (0, 4), textcoords="offset points", color="grey")
        else:
            axes.set_ylim(0.5 if key == "hit_rate" else 0, 1 if key == "hit_rate" else None)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PRESETS))
    minutes = ", ".join(f"{row['minutes']:g}" for row in rows[:1])
    figure.suptitle(
        f"Simulated, {minutes} minutes a point: Llama-3-8B on one H100, the real scheduler, costs as measured"
    )
    figure.savefig(path, dpi=100)


HEAD = (
    f"{'preset':<16}{'load/s':>7}{'min':>4}{'users':>7}{'req/s':>6}{'good/s':>7}{'refused':>8}{'tok/s':>7}{'hits':>6}"
    f"{'swaps':>6}{'moved GB':>9}{'TTFT p50':>9}{'p99 s':>7}{'running':>8}{'sched ms':>9}{'took s':>7}"
)


def run(preset: str, rate: float, seconds: float) -> dict[str, Any]:
    """Simulate, and print a line."""
    start = time.process_time()
    simulation = Simulation(preset, rate, seconds)
    simulation.run()
    row = simulation.row(preset, rate) | {"took_cpu_s": time.process_time() - start}
    print(
        f"{preset:<16}{rate:>7g}{row['minutes']:>4g}{row['users']:>7}{row['requests_per_s']:>6.1f}"
        f"{row['goodput_per_s']:>7.1f}{row['refused']:>8}{row['output_tok_s']:>7.0f}{row['hit_rate']:>6.0%}"
        f"{row['swaps_out']:>6}{row['moved_bytes'] / 1e9:>9.0f}{row['ttft_p50_s']:>9.2f}{row['ttft_p99_s']:>7.2f}"
        f"{row['running_mean']:>8.0f}{row['scheduling_ms_a_step']:>9.2f}{row['took_cpu_s']:>7.0f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=6)
    parser.add_argument("--rates", default="4,6,8,10,12,14,16")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--json", type=Path, help="rows of other presets that the file has stay in it")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    costs = [scheduling_cost(0), scheduling_cost(1000)]
    for cost in costs:
        print(
            f"scheduling {cost['running']} sequences in {cost['pages']:,} pages, {cost['waiting']} waiting: "
            f"{cost['p50_ms']:.2f} ms a step, mean {cost['mean_ms']:.2f}, at most {cost['max_ms']:.2f} (goal: below 1)"
        )
    presets = options.presets.split(",")
    result: dict[str, Any] = {"hour": [], "sweep": []}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text())
        result = {part: [row for row in before[part] if row["preset"] not in presets] for part in result}
    print(HEAD)
    for preset in presets:
        result["hour"].append(run(preset, options.rate, 3600))
        result["sweep"] += [run(preset, rate, SWEEP_S) for rate in map(float, options.rates.split(","))]
    for part in ("hour", "sweep"):
        result[part].sort(key=lambda row: list(PRESETS).index(row["preset"]))
    if options.json:
        result = {"date": datetime.date.today().isoformat(), "scheduling": costs} | result
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result["sweep"], options.plot)


if __name__ == "__main__":
    main()
