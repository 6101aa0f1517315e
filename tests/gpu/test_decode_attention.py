"""Decode attention on a GPU against float64, over formats, head shapes, lengths, windows and splits."""

import dataclasses

import pytest
import torch
from torch import Tensor

from gear_compression import PRESETS, GearConfig, PartConfig, layout_for
from gear_compression.layout import Layout
from gear_compression.reference.pages import compress_pages, decompress_pages
from gear_compression.reference.rotation import hadamard

pytestmark = pytest.mark.gpu


class Pool:
    """Sequences of random tokens in a pool, as an engine would have left them, and what their pages read back as."""

    def __init__(self, layout: Layout, lengths: list[int], seed: int = 0) -> None:
        self.layout, self.lengths = layout, lengths
        L, H, S, D = layout.num_layers, layout.num_kv_heads, layout.page_size, layout.head_dim
        g = torch.Generator().manual_seed(seed)
        num_slots = sum(n // S + 1 + layout.max_runs for n in lengths)
        slots = torch.randperm(num_slots, generator=g).tolist()
        slab = torch.randint(0, 256, (num_slots, layout.page_bytes), dtype=torch.uint8, generator=g)  # poison
        shape = (L, H, 2, layout.run_tokens, D)
        runs = slab.view(torch.bfloat16)[:, : torch.Size(shape).numel()].unflatten(1, shape)
        page_table = torch.full((len(lengths), max(max(lengths) // S, 1) + 1), -1, dtype=torch.int32)
        open_slots = torch.full((len(lengths), layout.max_runs), -1, dtype=torch.int32)
        self.exact: list[list[Tensor]] = []  # of each sequence and layer: K, V [2, n, H, D] as they read back
        for n, length in enumerate(lengths):
            sealed = max(length - 1, 0) // S
            bias = torch.randn(L, 2, 1, H, D, generator=g) * torch.tensor([3.0, 0.0]).view(1, 2, 1, 1, 1)
            kv = (torch.randn(L, 2, length, H, D, generator=g) + bias).bfloat16()
            back = kv.float().clone()
            for page in range(sealed):
                slot = page_table[n, page] = slots.pop()
                tokens = slice(page * S, (page + 1) * S)
                for layer in range(L):
                    if layout.is_raw:
                        runs[slot, layer] = kv[layer, :, tokens].permute(2, 0, 1, 3)
                        continue
                    first = torch.tensor([page == 0])
                    records = compress_pages(
                        kv[layer, 0, tokens][None], kv[layer, 1, tokens][None], layout, first, layer
                    )
                    at = layout.layers[layer]
                    slab[slot, at.start : at.start + H * at.record_bytes] = records.flatten()
                    back[layer, :, tokens] = torch.stack(decompress_pages(records, layout, first, layer))[:, 0]
            for run in range(-(-(length - sealed * S) // layout.run_tokens)):
                slot = open_slots[n, run] = slots.pop()
                first, last = (
                    sealed * S + run * layout.run_tokens,
                    min(sealed * S + (run + 1) * layout.run_tokens, length),
                )
                runs[slot, :, :, :, : last - first] = kv[:, :, first:last].permute(0, 3, 1, 2, 4)
            self.exact.append(list(back))
        self.slab, self.page_table, self.open_slots = slab.cuda(), page_table.cuda(), open_slots.cuda()

    def attention(self, q: Tensor, layer: int, scaling: float, window: int, softcap: float) -> Tensor:
        """The definition in float64: q [N, Q, D] → the same."""
        out = torch.zeros(q.shape, dtype=torch.float64)
        group = q.shape[1] // self.layout.num_kv_heads
        rotation = hadamard(q.shape[2]).double()
        _, rotates_values = self.layout.rotates(layer)
        for n, length in enumerate(self.lengths):
            if length == 0:
                continue
            first = max(0, length - window) if window else 0
            k, v = (x[first:].double().repeat_interleave(group, 1) for x in self.exact[n][layer])
            scores = torch.einsum("qd,nqd->qn", q[n].double(), k) * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[n] = torch.einsum("qn,nqd->qd", scores.softmax(-1), v)
            if rotates_values:
                out[n] = out[n] @ rotation
        return out


FORMATS: dict[str, GearConfig] = {name: c for name, c in PRESETS.items() if isinstance(c, GearConfig)}
V4 = PRESETS["near-lossless"].values  # type: ignore[union-attr]
FORMATS |= {
    "keys 2 bits": GearConfig(PartConfig(bits=2), V4),
    "keys 5 bits, values 5": GearConfig(PartConfig(bits=5, scale_bits=8), dataclasses.replace(V4, bits=5)),
    "keys 8 bits, values 8": GearConfig(PartConfig(bits=8), PartConfig(bits=8), page_size=64),
    "symmetric keys, rotated": GearConfig(PartConfig(bits=4, symmetric=True, rotate=True), V4, page_size=256),
    "groups of 16": GearConfig(PartConfig(bits=3, group_size=16), V4, page_size=64, sink_tokens=4),
    "groups of 64": GearConfig(PartConfig(bits=2, group_size=64), PartConfig(bits=2, scale_bits=8), page_size=128),
    "five bits and all parts": GearConfig(
        PartConfig(bits=5, rank=4, outliers=4), PartConfig(bits=5, rank=8, outliers=2), page_size=64, sink_tokens=2
    ),
    "three bits and all parts": GearConfig(
        PartConfig(bits=3, rank=8, factor_bits=4, low_rank_first=True, outliers=2),
        PartConfig(bits=3, rank=4, outliers=2),
    ),
}


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
