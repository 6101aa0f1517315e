"""Prefill attention against float64: chunks that start anywhere, over formats, heads, windows and caps.

Without a GPU the same kernel runs in Triton's interpreter, on small shapes.
"""

import pytest
import torch
from pools import attend

from gear_compression import PRESETS, layout_for
from gear_compression.reference.rotation import hadamard

CHUNKS = [(0, 300), (128, 100), (130, 1), (640, 129), (70, 200)]  # (tokens before, new tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["near-lossless", "gear-4bit", "none"])
@pytest.mark.parametrize(
    ("head_dim", "group", "window", "softcap"),
    [(128, 4, 0, 0.0), (64, 1, 0, 0.0), (96, 3, 0, 0.0), (256, 2, 0, 0.0), (128, 8, 150, 0.0), (64, 2, 0, 5.0)],
)
def test_chunks_see_sealed_pages_and_their_own_exactly(
    name: str, head_dim: int, group: int, window: int, softcap: float
) -> None:
    # bf16 weights and output: 2^-9 each.
    assert error(CHUNKS, "cuda", torch.bfloat16, name, head_dim, group, window, softcap) < 5e-3


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(
    ("name", "head_dim", "group", "window", "softcap"),
    [("near-lossless", 64, 2, 0, 0.0), ("gear-4bit", 32, 2, 40, 0.0), ("none", 96, 1, 0, 5.0)],
)
def test_the_same_in_the_interpreter(name: str, head_dim: int, group: int, window: int, softcap: float) -> None:
    chunks = [(0, 80), (130, 3), (70, 60)]
    # The output is rounded to fp16 once, 2^-11, where it is turned back.
    assert error(chunks, "cpu", torch.float32, name, head_dim, group, window, softcap) < 5e-4


def error(
    chunks: list[tuple[int, int]],
    device: str,
    dtype: torch.dtype,
    name: str,
    head_dim: int,
    group: int,
    window: int,
    softcap: float,
) -> float:
    """Relative to attention in float64, of random pages and chunks."""
    from gear_compression.triton.prefill import prefill_attention, tokens_of_a_tile

    layout = layout_for(PRESETS[name], 1, 2, head_dim, 2, "tiles")
    S, H = layout.page_size, layout.num_kv_heads
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    queries, want, past, own, tiles = [], [], [[], []], [[], []], []
    q_row = past_row = own_row = 0
    for before, new in chunks:
        end, first_page = before + new, before // S * S
        sealed_end = (end - 1) // S * S
        dequantized, exact = draw(2, sealed_end, H, head_dim), draw(2, end, H, head_dim)
        q = draw(new, H * group, head_dim)
        for t in range(new):
            position, page = before + t, (before + t) // S * S
            first = max(0, position + 1 - window) if window else 0
            k, v = torch.cat([dequantized[:, :page], exact[:, page : position + 1]], 1)[:, first:]
            want.append(attend(q[t], k, v, layout, 0, head_dim**-0.5, softcap))
        at = before
        while at < end:
            page = at // S * S
            stop = min(end, page + S, at // tokens_of_a_tile(S) * tokens_of_a_tile(S) + tokens_of_a_tile(S))
            tiles.append([q_row + at - before, stop - at, at - page, own_row + page - first_page, past_row, page])
            at = stop
        queries.append(q)
        for part in range(2):
            past[part].append(dequantized[part])
            own[part].append(exact[part, first_page:])
        q_row, past_row, own_row = q_row + new, past_row + sealed_end, own_row + end - first_page
    past_k, past_v = (torch.cat(x).transpose(0, 1).contiguous().to(device) for x in past)
    own_k, own_v = (torch.cat(x).to(device) for x in own)
    rotation = hadamard(head_dim).sign().half().to(device) if layout.rotates(0)[1] else None
    out = prefill_attention(
        torch.cat(queries).to(device), past_k, past_v, own_k, own_v, torch.tensor(tiles, dtype=torch.int32).to(device),
        S, head_dim**-0.5, window, softcap, rotation,
    ).cpu()  # fmt: skip
    exact_out = torch.stack(want)
    return float((out.double() - exact_out).norm() / exact_out.norm())
