"""What fits: weights, activations and pages in a budget of memory, counted before anything is taken.

The same table stands in `gear-plan` and at start-up. A model or setting that does not fit is refused with the flag
that would make it fit.
"""

import re
from dataclasses import dataclass

import psutil
from transformers import PreTrainedConfig

from gear_compression.layout import Layout
from gear_engine.protocol import EngineStartError, MemoryRow
from gear_engine.slots import num_slots_for_one, num_slots_held

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
DEFAULT_FRACTION = 0.5  # of a host's memory, which other programs need too


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All in bytes, but for counts of slots and tokens."""

    total_bytes: int  # of the device
    budget_bytes: int  # what the engine may take
    weights_bytes: int
    activations_bytes: int
    num_pages: int
    max_model_len: int  # tokens
    max_running: int
    layout: Layout

    @property
    def pages_bytes(self) -> int:
        return self.num_pages * self.layout.page_bytes

    @property
    def headroom_bytes(self) -> int:
        return self.budget_bytes - self.weights_bytes - self.activations_bytes - self.pages_bytes

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
            MemoryRow("weights", self.weights_bytes),
            MemoryRow("activations", self.activations_bytes),
            MemoryRow("pages", self.pages_bytes),
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


def parse_memory(memory: str, total_bytes: int) -> int:
    """ "auto", a fraction such as 0.9, or a size such as 8GiB → bytes. Raises EngineStartError for anything else."""
    if memory == "auto":
        return int(DEFAULT_FRACTION * total_bytes)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?(B)?\s*", memory.upper())
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


def activations_bytes(config: PreTrainedConfig, layout: Layout, *, tokens: int, rows: int, max_len: int) -> int:
    """Upper estimate of what a step of `tokens` tokens that samples `rows` rows needs at once, in float32."""
    hidden = config.hidden_size
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    per_token = 4 * (6 * hidden + 3 * wide)
    logits = 4 * 3 * rows * config.vocab_size
    page = min(layout.page_size, tokens)
    scores = 3 * 4 * heads * page * max_len
    scratch = 2 * 4 * layout.num_kv_heads * layout.head_dim * max_len  # one layer's earlier pages, dequantised
    return tokens * per_token + logits + scores + scratch


def plan_memory(
    config: PreTrainedConfig,
    layout: Layout,
    *,
    weights_bytes: int,
    max_position: int,
    memory: str,
    num_pages: int | None,
    max_model_len: int | None,
    max_running: int,
    max_batch_tokens: int,
) -> MemoryPlan:
    """Divide the budget. `max_model_len` None: as long as the model allows and one sequence fits."""
    if max_model_len is not None and max_model_len > max_position:
        raise EngineStartError(
            f"--max-model-len {max_model_len} is more than the {max_position} tokens of this model: lower it"
        )
    total = psutil.virtual_memory().total
    budget = parse_memory(memory, total)
    length = max_model_len or max_position
    activations = activations_bytes(config, layout, tokens=max_batch_tokens, rows=max_running, max_len=length)
    left = budget - weights_bytes - activations
    # More pages than all running sequences could fill would never be used.
    pages = min(max(left, 0) // layout.page_bytes, max_running * num_slots_for_one(layout, length))
    if num_pages is not None:
        pages = num_pages
    if max_model_len is None:
        length = min(length, _longest(layout, pages))
    if length < layout.page_size or pages < num_slots_for_one(layout, length):
        wanted = max_model_len or layout.page_size
        needed = num_slots_for_one(layout, wanted)
        raise EngineStartError(
            f"too little memory: one sequence of {wanted} tokens needs {needed} pages of {size(layout.page_bytes)} "
            f"beside {size(weights_bytes)} of weights and {size(activations)} of activations, and {pages} pages fit: "
            + ("raise --num-pages" if num_pages is not None else f"raise --memory (now {size(budget)})")
            + (" or lower --max-model-len" if max_model_len else " or lower --max-batch-tokens")
        )
    return MemoryPlan(total, budget, weights_bytes, activations, pages, length, max_running, layout)


def _longest(layout: Layout, num_pages: int) -> int:
    """The longest sequence, in whole pages, that always advances with so many slots."""
    return max(0, num_pages - num_slots_for_one(layout, 0)) * layout.page_size
