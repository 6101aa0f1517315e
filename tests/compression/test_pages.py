"""What a page promises: its bytes, its error, and that it depends on nothing but its own tokens."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gear_compression import PRESETS, GearConfig, PageLayout, PartConfig, layout_for
from gear_compression.config import ConfigError, LayerConfig, preset, write_preset
from gear_compression.cpu.backend import CpuBackend
from gear_compression.paged import PagedBatch
from gear_compression.reference.pages import compress_pages, compress_part, decompress_pages, decompress_part
from gear_compression.reference.planes import pack_codes, unpack_codes
from gear_compression.reference.tiles import pack_tiles

GEAR_PRESETS = [name for name, config in PRESETS.items() if isinstance(config, GearConfig)]


def keys_like(S: int, D: int, seed: int) -> Tensor:
    """[S, D] with channel offsets, channel scales and a slow drift over tokens, as rotary keys have."""
    g = torch.Generator().manual_seed(seed)
    offset, scale = torch.randn(D, generator=g) * 3, torch.rand(D, generator=g) * 2 + 0.1
    drift = torch.linspace(0, 3, S)[:, None] * torch.randn(1, D, generator=g)
    return torch.randn(S, D, generator=g) * scale + offset + torch.sin(drift)


def error(x: Tensor, part: PartConfig, is_keys: bool) -> float:
    compressed = compress_part(x, part, is_keys, 0, False)
    return float((decompress_part(compressed, is_keys, 0) - x).norm() / x.norm())


@given(st.sampled_from([2, 3, 4, 5, 8]), st.integers(1, 40), st.integers(0, 10**6))
def test_codes_come_back_as_they_were(bits: int, eighths: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (8 * eighths,), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack_codes(packed, bits).long(), codes)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_error_falls_as_bits_grow(seed: int, is_keys: bool, symmetric: bool) -> None:
    x = keys_like(64, 32, seed)
    errors = [error(x, PartConfig(bits=bits, symmetric=symmetric), is_keys) for bits in (2, 3, 4, 5, 8)]
    assert errors == sorted(errors, reverse=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_error_falls_as_rank_and_outliers_grow(seed: int, is_keys: bool, first: bool) -> None:
    x = keys_like(64, 32, seed)
    ranks = [error(x, PartConfig(bits=3, rank=rank, low_rank_first=first), is_keys) for rank in (0, 4, 12)]
    assert ranks[2] < ranks[1] < ranks[0]
    outliers = [error(x, PartConfig(bits=3, outliers=o), is_keys) for o in (0, 4, 12)]
    assert outliers[2] < outliers[1] < outliers[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_outlier_entries_come_back_exactly_to_bf16(seed: int, is_keys: bool) -> None:
    x = keys_like(32, 16, seed)
    x[3, 5], x[7, 2] = 90.0, -70.0
    compressed = compress_part(x, PartConfig(bits=4, rank=2, outliers=2), is_keys, 0, False)
    vectors = x.T if is_keys else x
    back = decompress_part(compressed, is_keys, 0)
    got = (back.T if is_keys else back).gather(1, compressed.outlier_index)
    want = vectors.gather(1, compressed.outlier_index)
    # Half an ulp of bf16, doubled.
    assert bool(((got - want).abs() <= compressed.outlier_value.abs() / 256 + 1e-6).all())
    rows = compressed.outlier_index.tolist()
    assert all(len(set(row)) == len(row) for row in rows)


@pytest.mark.parametrize("name", GEAR_PRESETS)
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_the_bytes_of_a_page_equal_the_formula(name: str, head_dim: int) -> None:
    config = PRESETS[name]
    assert isinstance(config, GearConfig)
    layout = PageLayout(config, num_layers=30, num_kv_heads=3, head_dim=head_dim)
    total = 0
    for part, V, n in (
        (config.keys, head_dim, config.page_size),
        (config.values, config.page_size, head_dim),
    ):
        groups = V * (n // (part.group_size or n))
        sections = [
            V * n * part.bits // 8,
            groups * part.scale_bits // 8,
            0 if part.symmetric else groups * part.scale_bits // 8,
            part.rank * config.page_size * part.factor_bits // 8,
            part.rank * head_dim * part.factor_bits // 8,
            2 * V * part.outliers,
            V * part.outliers,
            2 * config.sink_tokens * head_dim,
        ]
        last = (4 if part.scale_bits == 8 else 0) + (2 * part.rank if part.factor_bits < 16 else 0)
        total += sum(-(-section // 16) * 16 for section in [*sections, last])
    assert layout.layers[0].record_bytes == total
    assert layout.page_bytes >= 30 * 3 * layout.layers[0].record_bytes


ODD_INPUTS = {
    "constant": torch.full((64, 16), 3.7),
    "zero": torch.zeros(64, 16),
    "tiny": torch.full((64, 16), 1e-35) * torch.arange(16),
    "huge": torch.linspace(-1e25, 1e25, 1024).view(64, 16),
    "tied": torch.tensor([1.0, -1.0]).repeat(512).view(64, 16),
    "mixed": torch.cat([torch.full((64, 8), 1e-6), keys_like(64, 8, 0) * 1e4], 1),
}


@pytest.mark.parametrize("name", GEAR_PRESETS)
@pytest.mark.parametrize("kind", ODD_INPUTS)
def test_odd_inputs_stay_finite_and_near(name: str, kind: str) -> None:
    config = dataclasses.replace(PRESETS[name], page_size=64)
    layout = PageLayout(config, num_layers=1, num_kv_heads=1, head_dim=16)
    x = ODD_INPUTS[kind]
    pages = x[None, :, None]
    k, v = decompress_pages(compress_pages(pages, pages, layout, torch.tensor([True])), layout, torch.tensor([True]))
    for back in (k[0, :, 0], v[0, :, 0]):
        assert bool(back.isfinite().all())
        assert float((back - x).abs().max()) <= float(x.abs().max()) + 1e-20


def test_two_runs_give_identical_bytes_and_pages_do_not_depend_on_their_batch() -> None:
    layout = PageLayout(PRESETS["gear-4bit"], num_layers=1, num_kv_heads=2, head_dim=32)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 3, 64, 2, 32, generator=g)
    first = torch.tensor([True, False, False])
    together = compress_pages(k, v, layout, first)
    assert torch.equal(together, compress_pages(k, v, layout, first))
    alone = torch.cat([compress_pages(k[p : p + 1], v[p : p + 1], layout, first[p : p + 1]) for p in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", GEAR_PRESETS)
def test_compiled_sealing_agrees_with_the_definition_alone_and_in_a_batch(name: str) -> None:
    layout = layout_for(PRESETS[name], 1, 2, 32, 4)
    assert isinstance(layout, PageLayout)
    S, P = layout.page_size, 3
    k = torch.stack([torch.stack([keys_like(S, 32, 10 * p + h) for h in range(2)], 1) for p in range(P)]).bfloat16()
    v = torch.randn(P, S, 2, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    if layout.rotates(0)[1]:
        from gear_compression.reference.rotation import hadamard

        stored_v = (v.float() @ hadamard(32)).bfloat16()
    else:
        stored_v = v
    want = compress_pages(k, stored_v, layout, torch.tensor([True] * P))

    def sealed(pages: list[int]) -> Tensor:
        slab = torch.zeros(P, layout.page_bytes, dtype=torch.uint8)
        backend = CpuBackend(slab, layout, torch.float32)
        N = len(pages)
        tables = torch.tensor(pages)[:, None]
        none = torch.full((N, layout.max_runs), -1)
        batch = PagedBatch(torch.arange(N + 1) * S, torch.zeros(N, dtype=torch.int64), tables, none, none)
        rows = [t[pages].flatten(0, 1).float() for t in (k, v)]
        q = torch.zeros(N * S, 2, 32)
        backend.attend(backend.plan(batch), 0, q, *rows, scaling=1.0, sliding_window=None, softcap=None)
        return slab[:, : 2 * layout.layers[0].record_bytes].view(P, 2, -1)

    together = sealed([0, 1, 2])
    different = float((together != want).float().mean())
    assert different < 0.02  # another order of summation moves a code on the edge between two
    for page in range(P):
        assert torch.equal(sealed([page])[page], together[page])
    back, definition = (decompress_pages(r, layout, torch.tensor([True] * P))[0] for r in (together, want))
    assert float((back - definition).norm() / definition.norm()) < 0.02


def test_a_format_that_cannot_exist_is_refused_by_name() -> None:
    for wrong in ({"bits": 6}, {"rank": 99}, {"outliers": 3}, {"group_size": 8}, {"scale_bits": 4}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            PartConfig(**wrong)
    with pytest.raises(ConfigError, match=r"unknown preset 'best'.*near-lossless"):
        preset("best")
    with pytest.raises(ConfigError, match="head_dim"):
        PageLayout(GearConfig(), 1, 1, 40)


def test_a_preset_file_reads_back_as_it_was_written(tmp_path: Path) -> None:
    base = PRESETS["near-lossless"]
    assert isinstance(base, GearConfig)
    own = LayerConfig(3, dataclasses.replace(base.keys, bits=5), base.values)
    config = dataclasses.replace(base, layers=(own,))
    file = tmp_path / "tuned.json"
    write_preset(config, file)
    assert preset(str(file)) == config
    assert config.parts(3) == (own.keys, own.values)
    with pytest.raises(ConfigError, match="layer 3"):
        PageLayout(config, 2, 1, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Invalid JSON"),
        ('{"page_sise": 64}', "page_sise"),
        ('{"keys": {"bits": 6}}', "bits must be one of"),
        ('{"layers": [{"layer": 1, "keys": {}, "values": {"rnak": 1}}]}', r"layers\.0\.values\.rnak"),
    ],
)
def test_a_broken_preset_file_is_refused_by_entry(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        preset(str(file))
    with pytest.raises(ConfigError, match="cannot read"):
        preset(str(tmp_path / "missing.json"))


@pytest.mark.parametrize("name", GEAR_PRESETS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_tiles_hold_the_same_values_in_the_same_bytes(name: str, head_dim: int) -> None:
    config = PRESETS[name]
    assert isinstance(config, GearConfig)
    if head_dim == 96 and config.values.bits == 3:
        with pytest.raises(ConfigError, match="values: 3 bits need a head_dim that is a multiple of 64"):
            PageLayout(config, 1, 1, head_dim, "tiles")
        return
    planes, tiles = PageLayout(config, 1, 1, head_dim), PageLayout(config, 1, 1, head_dim, "tiles")
    assert tiles.page_bytes == planes.page_bytes
    g = torch.Generator().manual_seed(head_dim)
    k, v = torch.randn(2, 1, config.page_size, 1, head_dim, generator=g)
    first = torch.tensor([True])
    records = [compress_pages(k, v, layout, first) for layout in (planes, tiles)]
    assert not torch.equal(*records)
    back = [decompress_pages(r, x, first) for r, x in zip(records, (planes, tiles), strict=True)]
    for one, other in zip(*back, strict=True):
        assert torch.equal(one, other)


def test_a_tile_is_a_tensor_cores_fragment() -> None:
    """Lane 4 g + j finds in word w of its 16 bytes: tokens 16 i + 2 g + l, channels 16 j + 4 w + b (values: turned)."""
    layout = PageLayout(GearConfig(page_size=128), 1, 1, 64, "tiles")
    tokens, channels = torch.meshgrid(torch.arange(128), torch.arange(64), indexing="ij")
    codes = (tokens * 7 + channels * 3) % 16
    keys, values = layout.layers[0].keys, layout.layers[0].values
    key_bytes = pack_tiles(codes.T, keys).view(2, 4, 8, 64).int()  # token block, i, g, channel
    value_bytes = pack_tiles(codes, values).view(2, 4, 8, 64).int()  # token block, i, g, token
    for block, i, g, j, w, b in ((0, 0, 0, 0, 0, 0), (1, 2, 5, 3, 1, 2), (0, 3, 7, 2, 3, 1)):
        channel, token = 16 * j + 4 * w + b, 64 * block + 16 * i + 2 * g
        byte = int(key_bytes[block, i, g, channel])
        assert (byte & 15, byte >> 4) == (int(codes[token, channel]), int(codes[token + 1, channel]))
        channel, token = 16 * i + 2 * g, 64 * block + 16 * w + 4 * j + b
        byte = int(value_bytes[block, i, g, 16 * j + 4 * w + b])
        assert (byte & 15, byte >> 4) == (int(codes[token, channel]), int(codes[token, channel + 1]))
