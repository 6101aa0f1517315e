"""From a page layout and a .cu file to a kernel on the device.

The layout becomes a header of constants, so a kernel is compiled for exactly the pages it reads. NVRTC needs no GPU and
no CUDA toolkit; what it made is kept on disk by a hash of sources, layout and architecture.
"""

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from cuda.bindings import driver, nvrtc
from cuda.core import Device, ObjectCode, Program, ProgramOptions

from gear_compression.config import GearConfig, PartConfig
from gear_compression.layout import Layout, PageLayout, PartLayout, RawLayout
from gear_compression.paths import cache_dir
from gear_compression.reference.codes import GAUSSIAN_STEP
from gear_compression.reference.low_rank import factor_zero

_HERE = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")  # that CI compiles for


# What the definition has chosen once for all formats: of 4-bit factors, and of symmetric codes of 2 and 3 bits.
FORMAT: dict[str, float] = {"factor_zero": factor_zero(4)}
FORMAT |= {f"gaussian_step_{bits}": step for bits, step in GAUSSIAN_STEP.items()}


def header(layout: Layout, layer: int, options: Mapping[str, int]) -> str:
    """`Format`, `Page`, `Keys`, `Values` and `Options` as C++ structs of constants."""
    if isinstance(layout, PageLayout):
        record = layout.layers[layer]
        page = {
            "raw": 0,
            "record_bytes": record.record_bytes,
            "sink_tokens": layout.config.sink_tokens,
            "element_bytes": 2,
        }
        keys, values = record.keys, record.values
    else:
        page = {"raw": 1, "record_bytes": 0, "sink_tokens": 0, "element_bytes": layout.element_bytes}
        keys, values = _unused(layout)
    page |= {
        "head_dim": layout.head_dim,
        "page_size": layout.page_size,
        "run_tokens": layout.run_tokens,
        "num_heads": layout.num_kv_heads,
    }
    structs: dict[str, Mapping[str, float]] = {"Format": FORMAT, "Page": page}
    structs |= {"Keys": keys._asdict(), "Values": values._asdict(), "Options": options}
    return "#pragma once\n" + "".join(
        f"struct {name} {{\n"
        + "".join(f"  static constexpr {_constant(field, value)};\n" for field, value in fields.items())
        + "};\n"
        for name, fields in structs.items()
    )


def _constant(name: str, value: float) -> str:
    return f"float {name} = {value}f" if isinstance(value, float) else f"int {name} = {int(value)}"


def _unused(layout: RawLayout) -> tuple[PartLayout, PartLayout]:
    """Raw pages have no records; the code that would read them must still compile."""
    part = PartConfig(symmetric=True)
    stand_in = PageLayout(GearConfig(part, part, page_size=64), 1, 1, layout.head_dim, "tiles")
    return stand_in.layers[0].keys, stand_in.layers[0].values


def compile_cubin(file: str, header_text: str, arch: str) -> bytes:
    """Machine code of `file` with that header, from the disk if it was compiled before."""
    sources = {path.name: path.read_text() for path in sorted(_HERE.glob("*.cu*"))}
    _, major, minor = nvrtc.nvrtcVersion()
    parts = [file, header_text, arch, f"{major}.{minor}", *(text for pair in sources.items() for text in pair)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    kept = cache_dir() / "cubins" / f"{Path(file).stem}-{arch}-{name}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "layout.cuh").write_text(header_text)
        options = ProgramOptions(name=file, arch=arch, std="c++17", include_path=[folder, str(_HERE)])
        code = Program(sources[file], "c++", options).compile("cubin").code
    assert isinstance(code, bytes)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(code)
    partial.replace(kept)  # whole or not there
    return code


class CudaKernel:
    """One kernel, loaded on the current device."""

    def __init__(self, file: str, name: str, header_text: str, dynamic_shared_bytes: int) -> None:
        device = Device()
        self.arch = f"sm_{device.arch}"
        self._module = ObjectCode.from_cubin(compile_cubin(file, header_text, self.arch))
        self._handle = int(self._module.get_kernel(name).handle)
        self._shared = dynamic_shared_bytes
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if dynamic_shared_bytes > 48 * 1024:
            _check(driver.cuKernelSetAttribute(attribute, dynamic_shared_bytes, self._handle, device.device_id))

    def launch(self, grid: tuple[int, int, int], threads: int, stream: int, args: ctypes.Structure) -> None:
        """Asynchronous, on a stream's handle. `args` is the kernel's one parameter, passed by value."""
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(args))
        _check(
            driver.cuLaunchKernel(
                self._handle, *grid, threads, 1, 1, self._shared, stream, ctypes.addressof(pointers), 0
            )
        )


@functools.cache
def cuda_kernel(file: str, name: str, header_text: str, dynamic_shared_bytes: int) -> CudaKernel:
    """The same kernel for the same layout, once."""
    return CudaKernel(file, name, header_text, dynamic_shared_bytes)


def _check(result: tuple[object, ...]) -> None:
    error = result[0]
    if error != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(error)
        raise RuntimeError(f"CUDA driver: {text.decode() if text else error}")
