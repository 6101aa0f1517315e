"""Decode attention on a GPU against float64, over formats, head shapes, lengths, windows and splits."""

import pytest
import torch
from formats import FORMATS
from pools import Pool

from gear_compression import PRESETS, layout_for
from gear_compression.layout import Layout

pytestmark = pytest.mark.gpu


def check(
    layout: Layout, lengths: list[int], group: int, splits: int = 0, window: int = 0, softcap: float = 0.0
) -> float:
    from gear_compression.cuda.decode import choose_splits, decode_into
    from gear_compression.cuda.layouts import register_layout

    pool = Pool(layout, lengths)
    N, H, D = len(lengths), layout.num_kv_heads, layout.head_dim
    q = (torch.randn(N, H * group, D, generator=torch.Generator().manual_seed(1)) * 0.5).bfloat16()
    pages = max(lengths) // layout.page_size
    num_splits, pages_per_split = choose_splits(N * H, pages, 132 * 6)
    if splits:
        pages_per_split = max(1, -(-pages // splits))
        num_splits = max(1, -(-pages // pages_per_split))
    layer, scaling = layout.num_layers - 1, D**-0.5
    want = pool.attention(q, layer, scaling, window, softcap)
    outputs = []
    for _ in range(2):
        out = torch.full(q.shape, torch.nan, device="cuda")
        decode_into(
            out, pool.slab, pool.page_table, pool.open_slots, torch.tensor(lengths, dtype=torch.int32, device="cuda"),
            q.cuda(), register_layout(layout), layer, num_splits, pages_per_split, scaling, window, softcap,
        )  # fmt: skip
        outputs.append(out.cpu())
    live = torch.tensor(lengths) > 0
    assert torch.equal(outputs[0][live], outputs[1][live]), "two runs differ"
    assert bool(outputs[0][~live].isnan().all()), "padding was written"
    error = float((outputs[0][live].double() - want[live]).norm() / want[live].norm())
    # q, p and their products with scales are rounded to fp16 (2^-11), weights of exact tokens to bf16 (2^-9).
    assert error < 4e-3
    return error


LENGTHS = [1, 5, 64, 65, 128, 129, 200, 513, 0, 384]


@pytest.mark.parametrize("name", [*FORMATS, "none"])
def test_every_format(name: str) -> None:
    config = FORMATS.get(name, PRESETS["none"])
    check(layout_for(config, 2, 2, 128, 2, "tiles"), LENGTHS, 4)


@pytest.mark.parametrize("head_dim", [64, 96, 256])
@pytest.mark.parametrize("name", ["near-lossless", "max-compression", "gear-4bit", "none"])
def test_every_head_dim(head_dim: int, name: str) -> None:
    check(layout_for(PRESETS[name], 1, 2, head_dim, 2, "tiles"), LENGTHS[:8], 3)


@pytest.mark.parametrize("group", [1, 2, 7, 8, 12, 16])
def test_every_group(group: int) -> None:
    check(layout_for(PRESETS["near-lossless"], 1, 1, 128, 2, "tiles"), LENGTHS, group)


@pytest.mark.parametrize("name", ["near-lossless", "gear-4bit", "none"])
@pytest.mark.parametrize("splits", [1, 2, 3, 100])
def test_splits_are_merged(name: str, splits: int) -> None:
    check(layout_for(PRESETS[name], 1, 2, 128, 2, "tiles"), [1500, 3, 700, 128], 4, splits)


@pytest.mark.parametrize(("window", "softcap"), [(50, 0.0), (300, 0.0), (0, 5.0), (130, 8.0)])
@pytest.mark.parametrize("name", ["near-lossless", "none"])
def test_windows_and_caps(name: str, window: int, softcap: float) -> None:
    check(layout_for(PRESETS[name], 1, 2, 128, 2, "tiles"), LENGTHS, 4, 2, window, softcap)
