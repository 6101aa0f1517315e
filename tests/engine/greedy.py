"""Texts from an engine whose chunks, neighbours and pool a test chooses, and how two such texts are compared."""

import torch

from gear_compression import PRESETS, layout_for
from gear_engine.engine import Engine, Limits
from gear_engine.model_loader import LoadedModel
from gear_engine.page_store import PageStore
from gear_engine.prefix_cache import Move
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.runner import ModelRunner, RunResult
from gear_engine.sampler import Sampler, uniform
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Scheduled, Sequence
from gear_engine.slots import SlotAllocator


class RecordingRunner:
    """Keeps the log-probabilities that each output token was drawn from."""

    overlaps = False

    def keep_drawn(self, sequences: list[Sequence], tokens: list[torch.Tensor]) -> None:
        pass

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.logprobs: dict[tuple[str, int], torch.Tensor] = {}

    def move(self, moves: list[Move]) -> None:
        self.runner.move(moves)

    def read_page(self, slot: int, *, in_host: bool) -> bytes:
        return self.runner.read_page(slot, in_host=in_host)

    def write_page(self, slot: int, data: bytes) -> None:
        self.runner.write_page(slot, data)

    def peak_memory_bytes(self) -> int:
        return self.runner.peak_memory_bytes()

    def run(self, scheduled: list[Scheduled]) -> RunResult:
        result = self.runner.run(scheduled)
        rows = [item.sequence for item in scheduled if item.samples]
        for sequence, row in zip(rows, result.logits, strict=True):
            self.logprobs[sequence.request_id, sequence.num_output] = row.log_softmax(-1)
        return result


def generate(
    loaded: LoadedModel,
    prompts: list[list[int]],
    preset: str = "near-lossless",
    *,
    chunk: int = 512,
    num_slots: int = 200,
    backend: str = "cpu",
    max_tokens: int = 24,
    num_host_slots: int = 0,
    store: PageStore | None = None,
) -> tuple[list[list[int]], RecordingRunner, Scheduler]:
    """Greedy texts of all prompts, run together."""
    layout = layout_for(PRESETS[preset], loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 4)
    runner = RecordingRunner(ModelRunner(loaded, layout, num_slots, backend, num_host_slots))
    scheduler = Scheduler(
        SlotAllocator(num_slots),
        layout,
        max_running=min(8, chunk),
        max_batch_tokens=chunk,
        eos_token_ids=[],
        num_host_slots=num_host_slots,
        store=store,
    )
    engine = Engine(scheduler, runner, Sampler(loaded.vocab_size, []), Limits(512, loaded.vocab_size))
    for i, prompt in enumerate(prompts):
        engine.add(AddRequest(str(i), prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0)))
    texts: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            texts[int(output.request_id)] += output.token_ids
        scheduler.check_integrity()
    assert scheduler.allocator.num_active == 0
    engine.close()
    return texts, runner, scheduler


def parts_only_at_near_ties(
    a: list[int], b: list[int], runner: RecordingRunner, request: str, near_tie: float = 0.1
) -> bool:
    """Where two greedy texts part, the two tokens' log-probabilities lie within `near_tie` of each other."""
    for position, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            row = runner.logprobs[request, position]
            return abs(float(row[x] - row[y])) <= near_tie
    return True


def draws_part_only_at_near_ties(a: list[int], b: list[int], runner: RecordingRunner, request: str, seed: int) -> bool:
    """Where two texts of one seed part, drawn at temperature 1, the number that drew `a`'s token nearly drew `b`'s.

    Log-probabilities that differ by 0.1, as at a greedy near-tie, move the edge between two tokens by at most
    tanh(0.1) / 2 = 0.05 of the whole.
    """
    for position, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            edges = runner.logprobs[request, position].double().exp().cumsum(-1).tolist()
            return ([0.0, *edges])[y] - 0.05 <= uniform(seed, position) <= edges[y] + 0.05
    return True
