"""Where reports go besides the terminal, by kind.

Checked before the run: an hour of measuring is not lost to a wrong path.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from gear_loadtest.errors import LoadTestError, UsageError


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """Each field is an option."""

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None
    png: Path | None = None

    def check(self) -> None:
        """Raise `UsageError` for what cannot be written. Leaves no empty file behind."""
        for one in fields(self):
            path: Path | None = getattr(self, one.name)
            if path is None:
                continue
            existed = path.exists()
            try:
                path.open("ab").close()
            except OSError as error:
                raise UsageError(
                    f"cannot write --{one.name} {path} ({error.strerror}): name a file in an existing folder"
                ) from None
            if not existed:
                path.unlink()


def write(path: Path | None, make: Callable[[], bytes]) -> None:
    """Nothing for `None`."""
    if path is None:
        return
    try:
        path.write_bytes(make())
    except OSError as error:
        raise LoadTestError(f"could not write {path} ({error.strerror}): the table above is the only report") from None
