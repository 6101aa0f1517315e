"""Where compiled kernels are kept, outside of any checkout."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GEAR_CACHE_DIR, else gearserve/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GEAR_CACHE_DIR") or Path(home) / "gearserve")
