"""Append, seal and dequantize on a GPU against the PyTorch definition."""

import pytest
import torch
from formats import FORMATS
from pools import random_tokens, runs_of
from torch import Tensor

from gear_compression import PageLayout, layout_for
from gear_compression.reference.pages import compress_pages, decompress_pages
from gear_compression.reference.rotation import hadamard

pytestmark = pytest.mark.gpu
PAGES = 3
CASES = [
    *((name, 128) for name in FORMATS),
    *((name, D) for D in (64, 96, 256) for name in ("near-lossless", "gear-4bit")),
]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def seal(layout: PageLayout, kv: Tensor, pages: list[int], old: int) -> Tensor:
    """Seal some of PAGES pages, the first `old` tokens of each from runs, others from rows; the slab [slots, bytes]."""
    from gear_compression.cuda.layouts import register_layout
    from gear_compression.cuda.seal import seal_pages

    L, S, R = layout.num_layers, layout.page_size, layout.max_runs
    slab = torch.full((PAGES * (1 + R), layout.page_bytes), 0xAB, dtype=torch.uint8)
    runs = runs_of(slab, layout)
    run_slots = torch.arange(PAGES, PAGES * (1 + R), dtype=torch.int32).view(PAGES, R)
    for p in range(PAGES):
        for t in range(old):
            runs[run_slots[p, t // layout.run_tokens], :, :, :, t % layout.run_tokens] = kv[:, :, p * S + t].permute(
                0, 2, 1, 3
            )
    slab = slab.cuda()
    rows = int32(*(p * S + old for p in pages))
    tables = [int32(*pages), int32(*(int(p == 0) for p in pages)), run_slots.cuda()[pages].contiguous()]
    for first, count in [(0, L)] if old == S else [(layer, 1) for layer in range(L)]:
        k, v = kv[first].cuda()
        seal_pages(slab, *tables, int32(*[old] * len(pages)), rows, k, v, register_layout(layout), first, count)
    return slab.cpu()


def records_of(slab: Tensor, layout: PageLayout, layer: int) -> Tensor:
    """[PAGES, H, record_bytes]"""
    at, H = layout.layers[layer], layout.num_kv_heads
    return slab[:PAGES, at.start : at.start + H * at.record_bytes].view(PAGES, H, -1)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_sealed_pages_are_those_of_the_definition(name: str, head_dim: int) -> None:
    layout = layout_for(FORMATS[name], 2, 2, head_dim, 2, "tiles")
    assert isinstance(layout, PageLayout)
    S = layout.page_size
    kv = random_tokens(layout, PAGES * S, torch.Generator().manual_seed(2))
    from_runs, from_rows, mixed = (seal(layout, kv, [0, 1, 2], old) for old in (S, 0, 16))
    first = torch.tensor([True, False, False])
    for layer in range(2):
        sealed = records_of(from_runs, layout, layer)
        for other in (from_rows, mixed, seal(layout, kv, [0, 1, 2], S)):  # however they came, and again
            assert torch.equal(sealed, records_of(other, layout, layer))
        alone = records_of(seal(layout, kv, [1], S), layout, layer)
        assert torch.equal(sealed[1], alone[1])  # whatever else is sealed
        k, v = kv[layer].view(2, PAGES, S, 2, head_dim)
        want = compress_pages(k, v, layout, first, layer)
        for part in layout.layers[layer].keys, layout.layers[layer].values:
            codes = slice(part.codes, part.tokens_factor)
            different = float((sealed != want)[:, :, codes].float().mean())
            # Sums run in another order: a value on the edge between two codes may take the other one. Codes of what
            # factors leave over follow every rounding of theirs.
            assert different < (0.06 if part.rank and part.low_rank_first else 0.002)
        for one, other, exact in zip(
            decompress_pages(sealed, layout, first, layer),
            decompress_pages(want, layout, first, layer),
            (k, v),
            strict=True,
        ):
            error, least = (float((x - exact.float()).norm()) for x in (one, other))
            assert error <= 1.01 * least + 1e-3


@pytest.mark.parametrize(("name", "head_dim"), [*CASES, ("none", 128)])
def test_dequantized_pages_are_those_of_the_definition(name: str, head_dim: int) -> None:
    from gear_compression import PRESETS
    from gear_compression.cuda.dequantize import dequantize_pages
    from gear_compression.cuda.layouts import register_layout

    layout = layout_for(FORMATS.get(name, PRESETS["none"]), 2, 2, head_dim, 2, "tiles")
    S, H = layout.page_size, layout.num_kv_heads
    kv = random_tokens(layout, 2 * S, torch.Generator().manual_seed(3))[1].view(2, 2, S, H, head_dim)
    slab = torch.zeros(4, layout.page_bytes, dtype=torch.uint8)
    first = torch.tensor([True, False])
    want = kv.float()
    if isinstance(layout, PageLayout):
        records = compress_pages(*kv, layout, first, 1)
        at = layout.layers[1]
        slab[[3, 1], at.start : at.start + H * at.record_bytes] = records.flatten(1)
        want = torch.stack(decompress_pages(records, layout, first, 1))
    else:
        runs_of(slab, layout)[[3, 1], 1] = kv.permute(1, 3, 0, 2, 4)
    keys, values = (torch.full((H, 3 * S, head_dim), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    rows = int32(2 * S, 0)
    dequantize_pages(slab.cuda(), int32(3, 1), int32(1, 0), rows, keys, values, register_layout(layout), 1)
    for out, page in zip((keys, values), want.transpose(2, 3), strict=True):  # [pages, H, S, D]
        for p, row in enumerate(rows.tolist()):
            got = out[:, row : row + S].cpu().float()
            assert float((got - page[p]).norm() / page[p].norm()) < 2.5e-3  # bf16: 2^-9
        assert bool(out[:, S : 2 * S].isnan().all())


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_appended_tokens_are_rotated_and_land_in_their_runs(head_dim: int) -> None:
    from gear_compression.cuda.append import append_tokens
    from gear_compression.cuda.layouts import register_layout

    layout = layout_for(FORMATS["symmetric keys, rotated"], 2, 3, head_dim, 2, "tiles")
    g = torch.Generator().manual_seed(4)
    qkv = torch.randn(7, 12, head_dim, generator=g).bfloat16().cuda()  # queries, keys and values of one projection
    keys, values = qkv[:, 6:9], qkv[:, 9:]
    want = [(x.float() @ hadamard(head_dim).cuda()) for x in (keys, values)]
    slab = torch.zeros(5, layout.page_bytes, dtype=torch.uint8, device="cuda")
    slots, offsets = [4, 4, -1, 0, 2, -1, 3], [0, 1, 0, 5, 7, 0, 2]
    append_tokens(slab, keys, values, int32(*slots), int32(*offsets), register_layout(layout), 1)
    runs = runs_of(slab, layout)
    for part, (rows, exact) in enumerate(zip((keys, values), want, strict=True)):
        assert float((rows.float() - exact).norm() / exact.norm()) < 2.5e-3
        for t, (slot, offset) in enumerate(zip(slots, offsets, strict=True)):
            if slot >= 0:
                assert torch.equal(runs[slot, 1, :, part, offset], rows[t])
    assert int((runs != 0).sum()) == 5 * 2 * 3 * head_dim - int((qkv[[0, 1, 3, 4, 6], 6:] == 0).sum())
