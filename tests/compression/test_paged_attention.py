"""The compiled backend against the definition, over every preset, head shape, window and soft-cap."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gear_compression import PRESETS, GearConfig, PageLayout, layout_for
from gear_compression.config import LayerConfig
from gear_compression.cpu.backend import CpuBackend
from gear_compression.layout import Layout
from gear_compression.paged import PagedBatch
from gear_compression.reference.attention import ReferenceBackend


def run(
    backend: CpuBackend | ReferenceBackend,
    layout: Layout,
    chunks: list[int],
    qkv: list[Tensor],
    **options: float | None,
) -> Tensor:
    """One sequence computed chunk by chunk, with the slots that a scheduler would take."""
    free = list(range(backend.runs.shape[0]))
    sealed: list[int] = []
    open_slots: list[int] = []
    outputs, at = [], 0

    def table(slots: list[int], width: int) -> Tensor:
        return torch.tensor([slots + [-1] * (width - len(slots))])

    for chunk in chunks:
        end = at + chunk
        filled = end // layout.page_size - at // layout.page_size
        next_open = [] if filled else list(open_slots)
        in_place = open_slots if layout.is_raw and filled else []
        sealed += in_place + [free.pop() for _ in range(filled - len(in_place))]
        while len(next_open) < -(-(end % layout.page_size) // layout.run_tokens):
            next_open.append(free.pop())
        batch = PagedBatch(
            torch.tensor([0, chunk]),
            torch.tensor([at]),
            table(sealed, len(sealed) + 1),
            table(open_slots, layout.max_runs),
            table(next_open, layout.max_runs),
        )
        rows = [x[at:end] for x in qkv]
        plan = backend.plan(batch)
        outputs.append(backend.attend(plan, layout.num_layers - 1, *rows, **options))  # type: ignore[arg-type]
        open_slots, at = next_open, end
    return torch.cat(outputs)


CASES = [
    *((name, 2, 3, 64, None, None) for name in PRESETS),
    ("near-lossless", 1, 1, 16, 50, None),
    ("gear-4bit", 2, 4, 96, None, 5.0),
    ("balanced", 1, 8, 128, 200, 5.0),
    ("max-compression", 4, 1, 80, 30, None),
    ("none", 1, 8, 48, 100, None),
]


@pytest.mark.parametrize(("name", "H", "G", "D", "window", "softcap"), CASES)
def test_the_cpu_backend_computes_what_the_definition_says(
    name: str, H: int, G: int, D: int, window: int | None, softcap: float | None
) -> None:
    agree(layout_for(PRESETS[name], 1, H, D, 4), G, window, softcap)


def test_a_layer_may_have_a_format_of_its_own() -> None:
    own = PRESETS["max-compression"]
    assert isinstance(own, GearConfig)
    keys = dataclasses.replace(own.keys, rank=4, outliers=2, rotate=True)
    config = dataclasses.replace(PRESETS["near-lossless"], layers=(LayerConfig(1, keys, own.keys),))
    layout = PageLayout(config, 2, 2, 64)
    assert layout.layers[1].start == 2 * layout.layers[0].record_bytes
    agree(layout, 3, None, None)


def agree(layout: Layout, G: int, window: int | None, softcap: float | None) -> None:
    H, D = layout.num_kv_heads, layout.head_dim
    chunks = [150, 1, 1, 120, 7, *[1] * 5]
    g = torch.Generator().manual_seed(D)
    T = sum(chunks)
    keys = torch.randn(T, H, D, generator=g) * 2 + torch.randn(H, D, generator=g) * 3
    qkv = [torch.randn(T, H * G, D, generator=g), keys, torch.randn(T, H, D, generator=g)]
    outputs = []
    for kind in (ReferenceBackend, CpuBackend):
        slab = torch.zeros(40, layout.page_bytes, dtype=torch.uint8)
        backend = kind(slab, layout, torch.float32)
        outputs.append(run(backend, layout, chunks, qkv, scaling=D**-0.5, sliding_window=window, softcap=softcap))
    # Sums in another order move a code between its two neighbours now and then: 1e-4 of the largest output.
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-4 * float(outputs[0].abs().max())


def test_nan_in_a_key_reaches_the_output_and_is_not_hidden() -> None:
    layout = layout_for(PRESETS["near-lossless"], 1, 1, 16, 4)
    backend = CpuBackend(torch.zeros(8, layout.page_bytes, dtype=torch.uint8), layout, torch.float32)
    qkv = [torch.ones(20, 1, 16) for _ in range(3)]
    qkv[1][18] = torch.nan
    out = run(backend, layout, [17, 1, 1, 1], qkv, scaling=1.0, sliding_window=None, softcap=None)
    assert bool(out[:18].isfinite().all())
    assert bool(out[18:].isnan().all())
