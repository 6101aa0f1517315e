"""The kernels as PyTorch operators: fake implementations, compiled graphs, and a captured CUDA graph."""

import pytest
import torch
from pools import Pool
from torch._subclasses.fake_tensor import FakeTensorMode

from gear_compression import PRESETS, layout_for
from gear_compression.config import ConfigError
from gear_compression.cuda.decode import choose_splits, decode_attention
from gear_compression.cuda.layouts import register_layout


def test_a_layout_that_the_kernels_cannot_read_is_refused() -> None:
    with pytest.raises(ConfigError, match='order="tiles"'):
        register_layout(layout_for(PRESETS["near-lossless"], 1, 1, 128, 2))
    with pytest.raises(ConfigError, match="head_dim of 64, 96, 128 or 256, got 32"):
        register_layout(layout_for(PRESETS["none"], 1, 1, 32, 2, "tiles"))


def test_equal_layouts_have_one_number() -> None:
    one, other = (layout_for(PRESETS["near-lossless"], 1, 1, 128, 2, "tiles") for _ in range(2))
    assert register_layout(one) == register_layout(other)
    assert register_layout(layout_for(PRESETS["balanced"], 1, 1, 128, 2, "tiles")) != register_layout(one)


def test_shapes_are_known_without_a_device() -> None:
    number = register_layout(layout_for(PRESETS["near-lossless"], 1, 2, 128, 2, "tiles"))
    with FakeTensorMode():
        q = torch.empty(3, 8, 128, dtype=torch.bfloat16)
        table = torch.empty(3, 4, dtype=torch.int32)
        slab = torch.empty(10, 64, dtype=torch.uint8)
        out = decode_attention(slab, table, table, table[:, 0], q, number, 0, 1, 4, 0.1, 0, 0.0)
    assert out.shape == q.shape
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tiles", "pages", "slots"), [(512, 32, 528), (8, 256, 528), (2048, 4, 528), (1, 0, 528), (3, 1, 8)]
)
def test_splits_cover_every_page(tiles: int, pages: int, slots: int) -> None:
    splits, each = choose_splits(tiles, pages, slots)
    assert splits * each >= pages
    assert (splits - 1) * each < max(pages, 1)
    assert splits <= 64


@pytest.mark.gpu
def test_a_compiled_graph_and_a_captured_one_give_the_same_bits() -> None:
    layout = layout_for(PRESETS["near-lossless"], 1, 2, 128, 2, "tiles")
    pool = Pool(layout, [300, 40, 129])
    number = register_layout(layout)
    lengths = torch.tensor(pool.lengths, dtype=torch.int32, device="cuda")
    q = torch.randn(3, 8, 128, device="cuda").bfloat16()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return decode_attention(
            pool.slab, pool.page_table, pool.open_slots, lengths, q * 2, number, 0, 2, 1, 0.1, 0, 0.0
        ) + 1  # fmt: skip

    want = attend(q)
    assert torch.equal(torch.compile(attend, fullgraph=True)(q), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(q)
    for _ in range(2):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, want)
    lengths -= torch.tensor([0, 30, 0], dtype=torch.int32, device="cuda")  # lengths are read on the device
    graph.replay()
    assert torch.equal(captured, attend(q))
