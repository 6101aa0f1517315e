"""What fits: weights, activations and pages in a budget of memory, counted before anything is taken.

The same table stands in `gear-plan` and at start-up. A model or setting that does not fit is refused with the flag
that would make it fit.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import PreTrainedConfig

from gear_compression.cuda.tables import num_scratch_tokens
from gear_compression.layout import Layout
from gear_engine.protocol import EngineStartError, MemoryRow
from gear_engine.slots import num_slots_for_one, num_slots_held

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?(B)?"
DEFAULT_SWAP_BYTES = 4 * 2**30
GRAPHS_BYTES = 2**30  # CUDA graphs of all sizes, and what libraries keep as workspace
MAX_PIECES_TOKENS = 1024  # of a step that is captured in pieces: a longer one keeps a GPU busy while it is launched


@dataclass(frozen=True, slots=True)
class Device:
    """What memory there is, and how a step uses it."""

    name: str  # "cpu" or "cuda"
    total_bytes: int
    default_fraction: float
    swap_bytes: int | None  # of host memory, for swap space; None: it is the device's own
    taken_bytes: int = 0  # by the CUDA context, and by other programs


def host_device() -> Device:
    """Half of a host's memory is for us, which other programs need too."""
    return Device("cpu", host_bytes(), 0.5, None)


def cuda_device() -> Device:
    import torch

    torch.zeros(1, device="cuda")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return Device("cuda", total_bytes, 0.9, psutil.virtual_memory().available // 4, total_bytes - free_bytes)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes, but for counts of slots and tokens."""

    total_bytes: int  # of the device
    budget_bytes: int  # what the engine may take
    runtime_bytes: int  # Python, torch and the libraries, before any weight
    weights_bytes: int
    activations_bytes: int
    num_pages: int
    num_host_pages: int  # of swap space; on a CPU they are of the same memory
    max_model_len: int  # tokens
    max_running: int
    layout: Layout
    swap_apart: bool = False  # swap space is not of this memory

    @property
    def pages_bytes(self) -> int:
        return self.num_pages * self.layout.page_bytes

    @property
    def swap_bytes(self) -> int:
        return self.num_host_pages * self.layout.page_bytes

    @property
    def headroom_bytes(self) -> int:
        taken = self.runtime_bytes + self.weights_bytes + self.activations_bytes + self.pages_bytes
        return self.budget_bytes - taken - (0 if self.swap_apart else self.swap_bytes)

    @property
    def tokens_gear(self) -> int:
        """Tokens that fit into sealed pages."""
        return self.num_pages * self.layout.page_size

    @property
    def tokens_bf16(self) -> int:
        """Tokens that the same bytes would hold in bf16."""
        return self.pages_bytes // self.layout.token_bytes

    def concurrency(self, num_tokens: int) -> int:
        """Sequences of `num_tokens` tokens that the pool holds at once, open pages included."""
        return self.num_pages // num_slots_held(self.layout, max(num_tokens, 1))

    def rows(self) -> list[MemoryRow]:
        return [
            MemoryRow("runtime", self.runtime_bytes),
            MemoryRow("weights", self.weights_bytes),
            MemoryRow("activations", self.activations_bytes),
            MemoryRow("pages", self.pages_bytes),
            MemoryRow("swap", self.swap_bytes),
            MemoryRow("headroom", self.headroom_bytes),
        ]

    def table(self, preset: str) -> str:
        """As text, for a terminal."""
        lines = [f"memory    {size(self.budget_bytes)} of {size(self.total_bytes)}   preset {preset}"]
        lines += [f"  {row.kind:<12}{size(row.num_bytes):>10}" for row in self.rows()]
        layout = self.layout
        lines.append(
            f"pages     {self.num_pages:,} of {layout.page_size} tokens, {size(layout.page_bytes)} each "
            f"({layout.bits_per_element:.2f} bits an element, {layout.compression_ratio:.2f}x smaller than bf16)"
        )
        lines.append(f"tokens    {self.tokens_gear:,} fit ({self.tokens_bf16:,} with bf16 in the same memory)")
        lengths = sorted({min(n, self.max_model_len) for n in (1024, 4096, self.max_model_len)})
        fits = ", ".join(f"{self.concurrency(n):,} x {n:,}" for n in lengths)
        lines.append(f"sequences {fits} tokens fit; at most {self.max_running} run at once")
        return "\n".join(lines)


def size(num_bytes: int) -> str:
    """Bytes for people: 8.00 GiB."""
    value, sign = float(abs(num_bytes)), "-" if num_bytes < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{sign}{value:.0f} {unit}" if unit == "B" else f"{sign}{value:.2f} {unit}"
        value /= 1024
    raise AssertionError


def parse_memory(memory: str, total_bytes: int, default_fraction: float = 0.5) -> int:
    """ "auto", a fraction such as 0.9, or a size such as 8GiB → bytes. Raises EngineStartError for anything else."""
    if memory == "auto":
        return int(default_fraction * total_bytes)
    match = re.fullmatch(_SIZE, memory.strip().upper())
    if match is None:
        raise EngineStartError(f"--memory {memory!r} is neither a fraction such as 0.9 nor a size such as 8GiB")
    value = float(match[1])
    if not match[2] and not match[3]:
        if not 0 < value <= 1:
            raise EngineStartError(f"--memory {memory} is not between 0 and 1: name a unit, such as {memory}GiB")
        return int(value * total_bytes)
    num_bytes = int(value * _UNITS[match[2] or ""])
    if num_bytes > total_bytes:
        raise EngineStartError(
            f"--memory {memory} is more than the {size(total_bytes)} of this machine: ask for less, or for a fraction"
        )
    return num_bytes


def parse_swap_space(swap_space: str, room_bytes: int) -> int:
    """ "auto", 0, or a size such as 2GiB → bytes. `room_bytes`: for pages and swap space together."""
    if swap_space == "auto":
        return min(DEFAULT_SWAP_BYTES, room_bytes // 8)
    match = re.fullmatch(_SIZE, swap_space.strip().upper())
    if match is None or not (match[2] or match[3] or float(match[1]) == 0):
        raise EngineStartError(f"--swap-space {swap_space!r} is neither a size such as 2GiB nor 0, which turns it off")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def activations_bytes(config: PreTrainedConfig, layout: Layout, *, tokens: int, rows: int, max_len: int) -> int:
    """Upper estimate of what a step of `tokens` tokens that samples `rows` rows needs at once."""
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    layer = tokens * 4 * (6 * hidden + 4 * wide)  # gate and up as one product, gate activated, and the two multiplied
    # Before and after cap, mask and softmax; without a cap, which the config need not tell of, the masks of 8 segments.
    scores = max(5 * heads, 8) * 4 * min(layout.page_size, tokens) * max_len
    scratch = 2 * 4 * layout.num_kv_heads * layout.head_dim * max_len  # one layer's keys and values, dequantised
    sampling = 48 * rows * config.vocab_size  # logits in float32, integer weights, their sums and their order
    return layer + scores + scratch + sampling


def gpu_activations_bytes(config: PreTrainedConfig, layout: Layout, *, tokens: int, rows: int, max_len: int) -> int:
    """The same for a step on a GPU, whose layers are compiled and whose attention keeps no scores."""
    hidden, wide = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    projections = 2 * (config.num_attention_heads + 2 * layout.num_kv_heads) * layout.head_dim
    captured = min(tokens, MAX_PIECES_TOKENS)  # whose memory is apart
    layer = (tokens + captured) * 2 * (4 * hidden + 3 * wide + projections)
    scratch = 2 * 2 * layout.num_kv_heads * layout.head_dim * num_scratch_tokens(layout, max_len, tokens)
    logits = 2 * 2 * rows * config.vocab_size  # as computed, and as the graphs leave them
    # A float32 copy that takes penalties, and what a grammar allows; or the logits of four times as many scored rows.
    sampling = 8 * rows * config.vocab_size
    return layer + scratch + logits + sampling + GRAPHS_BYTES


def host_bytes() -> int:
    """Memory that this process may use: the machine's, or less where a container's limit says so."""
    total = psutil.virtual_memory().total
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
    return total


def plan_memory(
    config: PreTrainedConfig,
    layout: Layout,
    *,
    runtime_bytes: int,
    weights_bytes: int,
    max_position: int,
    memory: str,
    num_pages: int | None,
    max_model_len: int | None,
    max_running: int,
    max_batch_tokens: int,
    swap_space: str = "auto",
    device: Device | None = None,
) -> MemoryPlan:
    """Divide the budget. `max_model_len` None: as long as the model allows and one sequence fits."""
    if max_model_len is not None and max_model_len > max_position:
        raise EngineStartError(
            f"--max-model-len {max_model_len} is more than the {max_position} tokens of this model: lower it"
        )
    device = device or host_device()
    total = device.total_bytes
    budget = parse_memory(memory, total, device.default_fraction)

    def planned(length: int) -> MemoryPlan:
        sizes = activations_bytes if device.name == "cpu" else gpu_activations_bytes
        activations = sizes(config, layout, tokens=max_batch_tokens, rows=max_running, max_len=length)
        left = max(budget - runtime_bytes - weights_bytes - activations, 0)
        swap = parse_swap_space(swap_space, left if device.swap_bytes is None else device.swap_bytes)
        pages = num_pages
        if pages is None:  # as many as all running sequences could fill
            pages = min(
                max(left - (swap if device.swap_bytes is None else 0), 0) // layout.page_bytes,
                max_running * num_slots_for_one(layout, length),
            )
        return MemoryPlan(
            total, budget, runtime_bytes, weights_bytes, activations, pages, swap // layout.page_bytes, length,
            max_running, layout, device.swap_bytes is not None,
        )  # fmt: skip

    def fits(length: int) -> bool:
        return planned(length).num_pages >= num_slots_for_one(layout, length)

    length = max_model_len or _longest_that(fits, max_position)
    if length and fits(length):
        return planned(length)
    short = planned(max_model_len or 1)
    needed = num_slots_for_one(layout, short.max_model_len)
    raise EngineStartError(
        f"too little memory: one sequence of {short.max_model_len} tokens needs {needed} pages of "
        f"{size(layout.page_bytes)} beside {size(runtime_bytes)} for the program, {size(weights_bytes)} of weights and "
        f"{size(short.activations_bytes)} of activations, and {short.num_pages} pages fit: "
        + ("raise --num-pages" if num_pages is not None else f"raise --memory (now {size(budget)})")
        + (f" or lower --swap-space (now {size(short.swap_bytes)})" if swap_space != "auto" else "")
        + (" or lower --max-model-len" if max_model_len else " or lower --max-batch-tokens")
    )


def _longest_that(fits: Callable[[int], bool], max_len: int) -> int:
    """The largest length up to `max_len` that fits, by bisection; 0 if none does."""
    low, high = 0, max_len
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
