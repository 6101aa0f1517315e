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
from gear_compression.cuda.dequantize import dequantize_pages
from gear_compression.cuda.layouts import register_layout
from gear_compression.cuda.seal import seal_pages
from gear_compression.layout import Layout, PageLayout
from gear_compression.reference.pages import compress_pages
from gear_compression.reference.rotation import hadamard
from gear_compression.triton.prefill import prefill_attention, tokens_of_a_tile

GEAR = ("near-lossless", "balanced", "max-compression", "gear-4bit", "gear-2bit")
DECODE = {  # case: sequences, tokens, KV heads, query heads a KV head
    "decode-8b": (64, 4096, 8, 4),
    "decode-7b": (16, 4096, 32, 1),
    "decode-1x32k": (1, 32768, 8, 4),
    "decode-256x512": (256, 512, 8, 4),
}
HEAD_DIM = 128
LAYERS, CHUNK, CONTEXT = 32, 2048, 8192  # of Llama-3-8B; tokens of a prompt chunk, and with those before it


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


def int32(values: object) -> Tensor:
    return torch.as_tensor(values).to(torch.int32).cuda()


def seal_case(preset: str) -> tuple[float, int]:
    """(ms, bytes read and written) to seal all pages of a chunk, all layers of Llama-3-8B, a layer at a time."""
    H = 8
    layout = layout_for(PRESETS[preset], LAYERS, H, HEAD_DIM, 2, "tiles")
    assert isinstance(layout, PageLayout)
    pages = CHUNK // layout.page_size
    slab = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8, device="cuda")
    k, v = (torch.randn(CHUNK, H, HEAD_DIM, device="cuda").bfloat16() for _ in range(2))
    rows = torch.arange(pages) * layout.page_size
    tables = [int32(x) for x in (torch.arange(pages), rows == 0, torch.zeros(pages, 1), torch.zeros(pages), rows)]
    number = register_layout(layout)

    def launch() -> None:
        for layer in range(LAYERS):
            seal_pages(slab, *tables, k, v, number, layer, 1)

    moved = LAYERS * (2 * CHUNK * H * HEAD_DIM * 2 + pages * H * layout.layers[0].record_bytes)
    return milliseconds(launch, launches=1), moved


def llama_prefill_ms() -> float:
    """A chunk through Llama-3-8B's shape with random weights, bf16, PyTorch's own attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(0, 1000, (1, CHUNK), device="cuda")
    times = []
    with torch.inference_mode():
        for _ in range(6):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            model(ids, use_cache=False, logits_to_keep=1)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times[1:])


def prefill_case(preset: str) -> tuple[float, int]:
    """(ms, bytes) of one layer's attention of a chunk at the end of a context, dequantising its earlier pages."""
    H, group, past = 8, 4, CONTEXT - CHUNK
    layout = layout_for(PRESETS[preset], 1, H, HEAD_DIM, 2, "tiles")
    S = layout.page_size
    slab = filled_pool(layout, CONTEXT // S)
    q = torch.randn(CHUNK, H * group, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(CHUNK, H, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scratch = [torch.empty(H, CONTEXT, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    step = tokens_of_a_tile(S)
    tiles = int32([[at, step, at % S, at // S * S, 0, past + at // S * S] for at in reversed(range(0, CHUNK, step))])
    pages = torch.arange(CONTEXT // S)  # the chunk's own too, which its later pages see sealed
    slots, firsts, rows = int32(torch.randperm(len(pages))), int32(pages == 0), int32(pages * S)
    rotation = hadamard(HEAD_DIM).sign().half().cuda() if layout.rotates(0)[1] else None
    number = register_layout(layout)

    def launch() -> None:
        dequantize_pages(slab, slots, firsts, rows, *scratch, number, 0)
        prefill_attention(q, *scratch, k, v, tiles, S, HEAD_DIM**-0.5, rotation=rotation)

    return milliseconds(launch, launches=2), 2 * 2 * CONTEXT * H * HEAD_DIM + 2 * q.numel() * 2


def torch_prefill_ms() -> float:
    """The same by PyTorch's flash attention over dense bf16 keys and values."""
    from torch.nn.attention.bias import causal_lower_right

    q = torch.randn(1, 32, CHUNK, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 32, CONTEXT, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = causal_lower_right(CHUNK, CONTEXT)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return milliseconds(lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), launches=2)


class Table:
    """Rows as they are measured, printed and kept."""

    def __init__(self) -> None:
        self.copy_gb_s = copy_gb_s()
        self.rows: list[dict[str, Any]] = []
        print(f"{torch.cuda.get_device_name()}, copy kernel {self.copy_gb_s:.0f} GB/s", flush=True)

    def add(self, case: str, preset: str, measured: tuple[float, int], bf16_ms: float, note: str = "") -> None:
        ms, num_bytes = measured
        gb_s = num_bytes / ms / 1e6
        share = gb_s / self.copy_gb_s
        self.rows.append(
            {"case": case, "preset": preset, "ms": ms, "bf16_ms": bf16_ms, "speedup": bf16_ms / ms, "gb_s": gb_s}
            | {"fraction_of_copy": share}
        )
        print(
            f"  {preset:<16}{ms:8.4f} ms {bf16_ms / ms:6.2f}x {gb_s:5.0f} GB/s {share:6.1%} of copy  {note}", flush=True
        )


def measure_decode(table: Table, case: str, presets: list[str]) -> None:
    raw = decode_case(case, "none")
    bf16 = {"raw": raw[0], **torch_decode(case)}
    print(f"{case}: bf16 ms " + ", ".join(f"{name} {ms:.4f}" for name, ms in bf16.items()))
    table.add(case, "none", raw, min(bf16.values()))
    for preset in presets:
        table.add(case, preset, decode_case(case, preset), min(bf16.values()))


def measure_seal(table: Table, case: str, presets: list[str]) -> None:
    prefill_ms = llama_prefill_ms()
    print(f"{case}: {CHUNK} tokens of Llama-3-8B, whose whole prefill takes {prefill_ms:.1f} ms")
    for preset in presets:
        measured = seal_case(preset)
        table.add(case, preset, measured, prefill_ms, f"{measured[0] / prefill_ms:.1%} of prefill")


def measure_prefill(table: Table, case: str, presets: list[str]) -> None:
    flash_ms = torch_prefill_ms()
    flop = 4 * 32 * HEAD_DIM * (CHUNK * (CONTEXT - CHUNK) + CHUNK**2 // 2)
    print(f"{case}: torch flash {flash_ms:.4f} ms, {flop / flash_ms / 1e9:.0f} TFLOP/s")
    for preset in ("none", *presets):
        measured = prefill_case(preset)
        table.add(case, preset, measured, flash_ms, f"{flop / measured[0] / 1e9:.0f} TFLOP/s")


CASES = dict.fromkeys(DECODE, measure_decode) | {"seal": measure_seal, "prefill-8k": measure_prefill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--preset", action="append", choices=GEAR)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    table = Table()
    for case in arguments.case or CASES:
        CASES[case](table, case, arguments.preset or list(GEAR))
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "command": "python bench/kernels.py",
            "copy_gb_s": table.copy_gb_s,
            "rows": table.rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
