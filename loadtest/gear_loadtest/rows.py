"""Requests from a file: a data set (prompts, or only their lengths) or a trace (with times as well), CSV or JSONL.

Column names are those of the public traces: Azure's, Mooncake's and BurstGPT's, besides plain ones.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gear_loadtest.errors import UsageError

_PROMPT = ("prompt", "text")
_INPUT_LEN = ("input_len", "input_length", "prompt_tokens", "ContextTokens", "Request tokens")
_OUTPUT_LEN = ("output_len", "output_length", "completion_tokens", "GeneratedTokens", "Response tokens")
_TIME_S = ("timestamp_s", "timestamp", "TIMESTAMP", "Timestamp", "arrival_s")


@dataclass(frozen=True, slots=True)
class Row:
    """`None`: the file does not say, so the options decide."""

    prompt: str | None
    input_len: int | None
    output_len: int | None
    time_s: float | None  # after the first row of the file


def read_rows(option: str, path: Path, *, with_times: bool) -> list[Row]:
    """In the order of their times if `with_times`. Raises `UsageError` that names the line."""
    rows = []
    try:
        for number, values in _raw_rows(path):
            try:
                rows.append(_row(values, with_times=with_times))
            except (KeyError, ValueError, TypeError) as error:
                raise UsageError(f"{option} {path}, line {number}: {_problem(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {option} {path} ({error}): name a CSV or JSONL file") from None
    if not rows:
        raise UsageError(f"{option} {path} holds no rows: it needs one request a line")
    if not with_times:
        return rows
    first_s = min(row.time_s or 0.0 for row in rows)
    rows = [Row(row.prompt, row.input_len, row.output_len, (row.time_s or 0.0) - first_s) for row in rows]
    return sorted(rows, key=lambda row: row.time_s or 0.0)


def _raw_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import orjson  # costs more than --help may

    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            yield from enumerate(csv.DictReader(file), start=2)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UsageError(f"{path}, line {number} is not JSON ({error}): give JSONL, or name it .csv") from None


def _row(values: Mapping[str, Any], *, with_times: bool) -> Row:
    prompt, input_len, output_len = (_first(values, names) for names in (_PROMPT, _INPUT_LEN, _OUTPUT_LEN))
    if prompt is None and input_len is None:
        raise KeyError(" or ".join(("prompt", *_INPUT_LEN)))
    return Row(
        prompt if prompt is None else str(prompt),
        input_len if input_len is None else max(1, int(input_len)),
        output_len if output_len is None else max(1, int(output_len)),
        _time_s(values) if with_times else None,
    )


def _time_s(values: Mapping[str, Any]) -> float:
    """Seconds, or a date; `timestamp_ms` for traces in milliseconds, such as Mooncake's."""
    if (time_ms := values.get("timestamp_ms")) not in (None, ""):
        return float(time_ms) / 1000
    time = _first(values, _TIME_S)
    if time is None:
        raise KeyError("timestamp (seconds or a date) or timestamp_ms")
    try:
        return float(time)
    except ValueError:
        return datetime.fromisoformat(str(time)[:26]).timestamp()  # Azure's have a seventh digit


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) not in (None, "")), None)


def _problem(error: Exception) -> str:
    return f"no column {error.args[0]}" if isinstance(error, KeyError) else f"{error}"
