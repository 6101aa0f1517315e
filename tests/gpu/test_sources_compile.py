"""Every CUDA file compiles for every architecture; NVRTC needs no GPU for that."""

import pytest
from formats import FORMATS

from gear_compression import PRESETS, layout_for
from gear_compression.cuda.compiler import ARCHITECTURES, compile_cubin, header
from gear_compression.cuda.seal import OPTIONS as SEAL

DECODE = {"window": 0, "softcap": 0, "float_out": 0, "min_ctas": 4}
KERNELS = [
    ("decode.cu", "near-lossless", DECODE | {"min_ctas": 5}),
    ("decode.cu", "gear-4bit", DECODE | {"window": 1, "softcap": 1}),
    ("decode.cu", "none", DECODE | {"float_out": 1}),
    ("seal.cu", "near-lossless", SEAL),
    ("seal.cu", "gear-2bit", SEAL),
    ("dequantize.cu", "balanced", {}),
    ("append.cu", "near-lossless", {"rotate_keys": 0, "rotate_values": 1}),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("file", "preset", "options"), KERNELS)
def test_every_architecture(file: str, preset: str, options: dict[str, int], arch: str) -> None:
    layout = layout_for(PRESETS[preset], 2, 8, 128, 2, "tiles")
    assert compile_cubin(file, header(layout, 1, options), arch)[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_format(name: str, head_dim: int) -> None:
    layout = layout_for(FORMATS[name], 1, 2, head_dim, 2, "tiles")
    assert compile_cubin("decode.cu", header(layout, 0, DECODE), "sm_90")[:4] == b"\x7fELF"


def test_the_yardstick() -> None:
    assert compile_cubin("copy.cu", "", "sm_90")[:4] == b"\x7fELF"
