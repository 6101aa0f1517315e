"""The caches under comparison, each a runner over the same weights that is fed the same tokens in step."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gear_compression.config import PRESETS, ConfigError, GearConfig, preset
from gear_compression.cpu.backend import CpuBackend
from gear_compression.layout import Layout, layout_for
from gear_compression.paged import open_runs
from gear_engine.engine import Engine, Limits
from gear_engine.fidelity.baselines import BASELINES, backend_of
from gear_engine.model_loader import LoadedModel
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.runner import ModelRunner
from gear_engine.sampler import Sampler
from gear_engine.scheduler import Scheduler
from gear_engine.sequence import Batch, Sequence
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
        for runner, batch in self._steps(token_ids):
            yield runner.all_logits(batch.scheduled).float()

    def raw_pages(self, token_ids: list[int]) -> Tensor:
        """[P, L, H, 2, S, D]: keys and values of the text's full pages as they lie in the pool, for a raw layout."""
        for runner, batch in self._steps(token_ids):
            runner.run(batch.scheduled)
        runs = open_runs(runner.slab, self.layout, self.loaded.model.dtype)
        return runs[batch.scheduled[0].pages]

    def _steps(self, token_ids: list[int]) -> Iterator[tuple[ModelRunner, Batch]]:
        """The prefill of one text; whoever iterates computes each step before asking for the next."""
        num_slots = num_slots_for_one(self.layout, len(token_ids))
        runner = ModelRunner(self.loaded, self.layout, num_slots, self.backend)
        scheduler = Scheduler(
            SlotAllocator(num_slots), self.layout, max_running=1, max_batch_tokens=CHUNK, eos_token_ids=[]
        )
        text = list(token_ids)  # the scheduler will append to it
        scheduler.add(Sequence("text", text, len(text), SamplingParams(max_tokens=1), 0, (0, 0), 0.0))
        while scheduler.has_work:
            batch = scheduler.schedule()
            yield runner, batch
            scheduler.advance(batch)
            scheduler.commit(batch, {"text": 0}, {})

    def generate(self, prompts: list[list[int]], num_new: int) -> list[list[int]]:
        """Greedy texts of all prompts, run as one continuous batch: `num_new` tokens, or up to an end-of-sequence."""
        loaded = self.loaded
        num_slots = sum(num_slots_for_one(self.layout, len(prompt) + num_new) for prompt in prompts)
        scheduler = Scheduler(
            SlotAllocator(num_slots),
            self.layout,
            max_running=len(prompts),
            max_batch_tokens=CHUNK,
            eos_token_ids=loaded.eos_token_ids,
        )
        runner = ModelRunner(loaded, self.layout, num_slots, self.backend)
        sampler = Sampler(loaded.vocab_size, loaded.eos_token_ids)
        engine = Engine(scheduler, runner, sampler, Limits(loaded.max_position, loaded.vocab_size))
        for i, prompt in enumerate(prompts):
            engine.add(AddRequest(str(i), prompt, SamplingParams(max_tokens=num_new, temperature=0.0)))
        texts: list[list[int]] = [[] for _ in prompts]
        while engine.has_work:
            for output in engine.step().outputs:
                texts[int(output.request_id)] += output.token_ids
        return texts

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


def ablation_subjects(loaded: LoadedModel, name: str) -> list[Subject]:
    """A preset taken apart: its codes alone, with one part more, with all. Raises ConfigError if it has codes only."""
    config = preset(name)
    if not isinstance(config, GearConfig):
        raise ConfigError(f"--ablation {name}: raw pages have no parts to take away; choose another preset")
    wanted = {
        "codes": _without(_without(config, "rank"), "outliers"),
        "codes + outliers": _without(config, "rank"),
        "codes + low rank": _without(config, "outliers"),
        "all": config,
    }
    labels: dict[GearConfig, str] = {}
    for label, one in wanted.items():
        labels.setdefault(one, label)  # a preset with one part only has two rows, not four
    if len(labels) == 1:
        raise ConfigError(f"--ablation {name}: it is codes alone, nothing to take away; try near-lossless")
    return [format_subject(loaded, f"{name}: {label}", one) for one, label in labels.items()]


def _without(config: GearConfig, knob: Literal["rank", "outliers"]) -> GearConfig:
    """The same format without that part, in every layer."""
    zero: dict[str, Any] = {knob: 0}
    return replace(
        config,
        keys=replace(config.keys, **zero),
        values=replace(config.values, **zero),
        layers=tuple(
            replace(own, keys=replace(own.keys, **zero), values=replace(own.values, **zero)) for own in config.layers
        ),
    )


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
