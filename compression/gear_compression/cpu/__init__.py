"""The CPU backend: Numba kernels that read codes straight into the dot product, as the GPU kernels do.

Compiled code is kept on disk by a hash of these sources: Numba itself would not notice that a function changed which
another file's kernel calls.
"""

import hashlib
import os
from pathlib import Path

import numba


def _cache_dir() -> Path:
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = os.environ.get("GEAR_CACHE_DIR") or Path(home) / "gearserve"
    return Path(base) / "kernels" / digest


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(_cache_dir())
