"""The CPU backend: Numba kernels that read codes straight into the dot product, as the GPU kernels do.

Compiled code is kept on disk by a hash of these sources: Numba itself would not notice that a function changed which
another file's kernel calls.
"""

import hashlib
import os
from pathlib import Path

import numba

from gear_compression.paths import cache_dir


def _cache_dir() -> Path:
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return cache_dir() / "kernels" / digest


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(_cache_dir())
