"""A run, or several, as rows of a spreadsheet: one a run, with a column for every figure.

Seconds throughout, as in the JSON.
"""

import csv
import io

from gear_loadtest.report import Report

_METRICS = ("ttft_s", "itl_s", "tpot_s", "e2e_s", "service_ttft_s", "service_e2e_s")
_FIGURES = (
    "date", "url", "model", "num_requests", "num_ok", "num_errors", "num_cancelled", "interrupted", "duration_s",
    "request_throughput", "output_token_throughput", "total_token_throughput", "input_tokens_mean",
    "output_tokens_mean", "objective_met", "good_share", "goodput",
)  # fmt: skip


def to_csv(runs: list[Report]) -> str:
    file = io.StringIO()
    rows = [_row(run) for run in runs]
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(run: Report) -> dict[str, object]:
    row: dict[str, object] = {name: getattr(run, name) for name in _FIGURES}
    row |= {"rate": run.command.rate, "concurrency": run.command.concurrency, "invalid": run.client.invalid}
    for name in _METRICS:
        measured = getattr(run, name)
        for figure in ("mean", "p50", "p90", "p95", "p99", "max"):
            row[f"{name.removesuffix('_s')}_{figure}_s"] = getattr(measured, figure) if measured else None
    return {name: _safe(value) for name, value in row.items()}


def _safe(value: object) -> object:
    """Text from a server must not be a formula to a spreadsheet."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return "'" + value
    return value
