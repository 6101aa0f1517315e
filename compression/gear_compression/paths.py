"""Where compiled kernels and converted models are kept, outside of any checkout."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$GEAR_HOME, else gearserve/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("GEAR_HOME") or Path(home) / "gearserve").expanduser()
