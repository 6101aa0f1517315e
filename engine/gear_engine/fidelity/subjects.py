"""The caches under comparison, each a runner over the same weights that is fed the same tokens in step."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gear_compression.config import PRESETS, GearConfig, preset
from gear_compression.cpu.backend import CpuBackend
from gear_compression.layout import Layout, layout_for
from gear_engine.fidelity.baselines import BASELINES, backend_of
from gear_engine.model_loader import LoadedModel
from gear_engine.protocol import SamplingParams
from gear_engine.runner import ModelRunner
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Sequence
from gear_engine.slots import SlotAllocator, num_slots_for_one, num_slots_held

CHUNK = 512  # tokens in a step


@dataclass(slots=True)
class Subject:
    """One way to keep keys and values."""

    name: str
    loaded: LoadedModel
    layout: Layout
    bits_per_element: float
    backend: type[CpuBackend]

    def chunks(self, token_ids: list[int]) -> Iterator[Tensor]:
        """Logits [T, V] float32 of the text, chunk by chunk, as the engine computes them with this cache."""
        num_slots = num_slots_for_one(self.layout, len(token_ids))
        runner = ModelRunner(self.loaded, self.layout, num_slots, self.backend)
        scheduler = Scheduler(
            SlotAllocator(num_slots), self.layout, max_running=1, max_batch_tokens=CHUNK, eos_token_ids=[]
        )
        text = list(token_ids)  # the scheduler will append to it
        scheduler.add(Sequence("text", text, len(text), SamplingParams(max_tokens=1), 0, (0, 0), 0.0))
        while scheduler.has_work:
            batch = scheduler.schedule()
            yield runner.all_logits(batch.scheduled).float()
            scheduler.commit(batch, {"text": 0}, {})

    def effective_ratio(self, num_tokens: int) -> float | None:
        """bf16 bytes of a sequence of so many tokens ÷ the bytes of its slots, open pages included; None: not ours."""
        if not isinstance(self.layout.config, GearConfig):
            return None
        held = num_slots_held(self.layout, num_tokens) * self.layout.page_bytes
        return num_tokens * self.layout.token_bytes / held


def exact_subject(loaded: LoadedModel, name: str) -> Subject:
    """Raw pages in the model's own dtype."""
    layout = _layout(loaded, "none")
    return Subject(name, loaded, layout, layout.bits_per_element, CpuBackend)


def subjects(loaded: LoadedModel, names: list[str]) -> list[Subject]:
    """Presets and baselines by name. Raises ConfigError naming what there is."""
    found = []
    for name in names:
        if name in BASELINES:
            baseline = BASELINES[name]
            layout = layout_for(
                baseline.config, loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, loaded.model.dtype.itemsize
            )
            bits = baseline.bits(loaded.head_dim) if baseline.bits else layout.bits_per_element
            found.append(Subject(name, loaded, layout, bits, backend_of(baseline)))
        else:
            layout = _layout(loaded, name)
            found.append(Subject(name, loaded, layout, layout.bits_per_element, CpuBackend))
    return found


def format_subject(loaded: LoadedModel, name: str, config: GearConfig) -> Subject:
    """A page format that is no preset (yet)."""
    layout = layout_for(config, loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, loaded.model.dtype.itemsize)
    return Subject(name, loaded, layout, layout.bits_per_element, CpuBackend)


def all_names() -> list[str]:
    """Everything that can be compared, baselines first."""
    return [*BASELINES, *(name for name in PRESETS if name != "none")]


def bf16_copy(loaded: LoadedModel) -> LoadedModel:
    """The same weights in bfloat16, for the noise floor."""
    copied = copy.copy(loaded)
    copied.model = copy.deepcopy(loaded.model).to(torch.bfloat16)
    return copied


def _layout(loaded: LoadedModel, name: str) -> Layout:
    return layout_for(
        preset(name), loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, loaded.model.dtype.itemsize
    )
