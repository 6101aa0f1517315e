"""The GPU kernels beside bf16, in one run: milliseconds, GB/s, and the share of what a copy kernel reaches.

    python bench/kernels.py [--case decode-8b …] [--json bench/results/kernels.json]

Every time is the median over replays of a CUDA graph. Bytes are those a kernel must read and write once. bf16 is the
fastest of our own raw pages and PyTorch's attention over dense tensors of the same lengths.
"""

import argparse
import ctypes
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gear_compression import PRESETS, layout_for
from gear_compression.cuda.compiler import cuda_kernel
from gear_compression.cuda.decode import choose_splits, ctas_per_sm, decode_into
from gear_compression.cuda.layouts import register_layout
from gear_compression.layout import Layout, PageLayout
from gear_compression.reference.pages import compress_pages

GEAR = ("near-lossless", "balanced", "max-compression", "gear-4bit", "gear-2bit")
DECODE = {  # case: sequences, tokens, KV heads, query heads a KV head
    "decode-8b": (64, 4096, 8, 4),
    "decode-7b": (16, 4096, 32, 1),
    "decode-1x32k": (1, 32768, 8, 4),
    "decode-256x512": (256, 512, 8, 4),
}
HEAD_DIM = 128


def milliseconds(launch: Callable[[], object], launches: int = 10, replays: int = 20) -> float:
    """Median of one launch, from replays of a graph of several."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            launch()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times)


class _CopyArgs(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("target", ctypes.c_void_p), ("count", ctypes.c_int64)]


def copy_gb_s() -> float:
    """Bytes read and written by a second of copying 2 GB."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_() for _ in range(2))
    kernel = cuda_kernel("copy.cu", "copy", "", 0)
    args = _CopyArgs(source.data_ptr(), target.data_ptr(), source.numel() // 16)
    ms = milliseconds(
        lambda: kernel.launch((args.count // 1024, 1, 1), 256, torch.cuda.current_stream().cuda_stream, args)
    )
    return 2 * source.numel() / ms / 1e6


def filled_pool(layout: Layout, num_slots: int) -> Tensor:
    """A pool in which every slot holds a sealed page of random tokens; a few pages, repeated."""
    H, S, D = layout.num_kv_heads, layout.page_size, layout.head_dim
    generator = torch.Generator().manual_seed(0)
    few = 4
    k = torch.randn(few, S, H, D, generator=generator) + 2 * torch.randn(1, 1, H, D, generator=generator)
    v = torch.randn(few, S, H, D, generator=generator)
    if isinstance(layout, PageLayout):
        pages = compress_pages(k.bfloat16(), v.bfloat16(), layout, torch.zeros(few, dtype=torch.bool)).flatten(1)
    else:
        pages = torch.stack([k, v], 1).bfloat16().permute(0, 3, 1, 2, 4).contiguous().view(torch.uint8).flatten(1)
    slab = torch.zeros(num_slots, layout.page_bytes, dtype=torch.uint8, device="cuda")
    slab[:, : pages.shape[1]] = pages.cuda()[torch.arange(num_slots) % few]
    return slab


def decode_case(case: str, preset: str) -> tuple[float, int]:
    """(ms, bytes of pages that it must read)"""
    N, tokens, H, group = DECODE[case]
    layout = layout_for(PRESETS[preset], 1, H, HEAD_DIM, 2, "tiles")
    pages = tokens // layout.page_size
    slab = filled_pool(layout, N * (pages + 1))
    slots = torch.randperm(N * (pages + 1), dtype=torch.int32, device="cuda").view(N, -1)
    page_table = slots[:, :pages].contiguous()
    open_slots = slots[:, pages:].repeat(1, layout.max_runs).contiguous()
    lengths = torch.full((N,), tokens + 1, dtype=torch.int32, device="cuda")
    q = torch.randn(N, H * group, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    number = register_layout(layout)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    splits = choose_splits(N * H, pages, num_sms * ctas_per_sm(layout, 0, q.device))
    ms = milliseconds(
        lambda: decode_into(out, slab, page_table, open_slots, lengths, q, number, 0, *splits, scaling=HEAD_DIM**-0.5)
    )
    record_bytes = layout.layers[0].record_bytes if isinstance(layout, PageLayout) else layout.page_bytes // H
    return ms, N * H * pages * record_bytes


def torch_decode(case: str) -> dict[str, float]:
    """Milliseconds of PyTorch's own attention over dense bf16 keys and values."""
    N, tokens, H, group = DECODE[case]
    q = torch.randn(N, H * group, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(N, H, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = {}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        times["flash"] = milliseconds(lambda: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    try:
        from torch.nn.attention.flex_attention import flex_attention

        flex = torch.compile(flex_attention, dynamic=False)
        times["flex"] = milliseconds(lambda: flex(q, k, v, enable_gqa=True))
    except Exception as error:  # a yardstick that is not there is said, not hidden
        print(f"  flex_attention: {type(error).__name__}: {str(error).splitlines()[0]}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(DECODE))
    parser.add_argument("--preset", action="append", choices=GEAR)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    copy = copy_gb_s()
    print(f"{torch.cuda.get_device_name()}, copy kernel {copy:.0f} GB/s")
    rows: list[dict[str, Any]] = []
    for case in arguments.case or DECODE:
        raw_ms, raw_bytes = decode_case(case, "none")
        bf16 = {"raw": raw_ms, **torch_decode(case)}
        best = min(bf16.values())
        beside = ", ".join(f"{name} {ms:.4f}" for name, ms in bf16.items())
        print(f"{case}: bf16 ms {beside}; raw at {raw_bytes / raw_ms / 1e6 / copy:.1%} of copy")
        for preset in ("none", *(arguments.preset or GEAR)):
            ms, num_bytes = (raw_ms, raw_bytes) if preset == "none" else decode_case(case, preset)
            gb_s = num_bytes / ms / 1e6
            row = {"case": case, "preset": preset, "ms": ms, "bf16_ms": best, "speedup": best / ms}
            rows.append(row | {"gb_s": gb_s, "fraction_of_copy": gb_s / copy})
            print(f"  {preset:<16}{ms:8.4f} ms {best / ms:6.2f}x bf16 {gb_s:7.0f} GB/s {gb_s / copy:7.1%} of copy")
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "command": "python bench/kernels.py",
            "copy_gb_s": copy,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
