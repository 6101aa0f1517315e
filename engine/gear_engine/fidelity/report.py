"""What was measured, as a table for people, JSON for programs and a plot: bits an element against KL divergence."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

EFFECTIVE_AT = (1500, 4096)  # tokens of a sequence


@dataclass(slots=True)
class Report:
    """Fields are the JSON's keys. Every row: preset, bits_per_element, kl_mean, kl_p99, top1_agreement and more."""

    model: str
    date: str
    context: int
    num_texts: int
    num_positions: int
    exact: dict[str, Any]  # the uncompressed float32 model's own perplexity and ranks
    noise_floor: dict[str, Any]  # the bf16 model against the float32 one
    rows: list[dict[str, Any]]
    interrupted: bool = False


def tables(report: Report) -> list[Group]:
    """One for each part that was measured, the teacher-forced comparison first."""
    found = [_main_table(report, _labelled(report.rows))]
    rows = [{"preset": "bf16 model", **report.noise_floor}, *report.rows]
    for part, draw in (("retrieval", _retrieval_table), ("per_layer", _layer_table), ("free_running", _free_table)):
        if measured := [row for row in rows if row.get(part)]:
            found.append(draw(report, _labelled(measured)))
    return found


Rows = list[tuple[str, dict[str, Any] | None]]  # label and figures; a heading has none


def _labelled(rows: list[dict[str, Any]]) -> Rows:
    """The rows of an ablation, "preset: parts", go under a heading of their own."""
    labelled: Rows = []
    heading = None
    for row in rows:
        group, colon, part = row["preset"].partition(": ")
        if not colon:
            labelled.append((group, row))
        else:
            if group != heading:
                labelled.append((f"{group}, with", None))
            labelled.append((f"  {part}", row))
            heading = group
    return labelled


def _table(title: str, caption: str, headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Group:
    """At most 80 columns wide."""
    out = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in headings:
        out.add_column(heading, justify="left" if heading == "cache" else "right", no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return Group(Text(title, style="bold"), out, Text(caption, style="dim"))


def _main_table(report: Report, rows: Rows) -> Group:
    floor = report.noise_floor.get("kl_mean", 0.0)
    texts = "1 text" if report.num_texts == 1 else f"{report.num_texts} texts"
    return _table(
        f"{report.model}, {report.num_positions:,} positions in {texts} of {report.context} tokens",
        f"Noise floor, bf16 weights against float32: KL {floor:.4f}. Less reads as zero.\n"
        f"Top-1: same likeliest token. Smaller: than bf16, open pages included,\n"
        f"a sequence of {' and '.join(map(str, EFFECTIVE_AT))} tokens.",
        ("cache", "bits", "KL mean", "KL p99", "top-1", "ppl", "smaller"),
        [
            (label,)
            if row is None
            else (
                label,
                f"{row['bits_per_element']:.2f}",
                f"{row['kl_mean']:.4f}",
                f"{row['kl_p99']:.3f}",
                _percent(row["top1_agreement"], 1),
                f"{row['perplexity']:.3f}",
                " ".join(f"{ratio:.2f}×" for ratio in row["effective_ratio"] or ()),
            )
            for label, row in rows
        ],
    )


def _retrieval_table(report: Report, rows: Rows) -> Group:
    exact = report.exact["retrieval"]
    lengths = [str(entry["tokens"]) for entry in exact["by_length"]]

    def cells(row: dict[str, Any]) -> list[str]:
        part = row["retrieval"]
        by_length = {str(entry["tokens"]): entry["logprob_difference"] for entry in part["by_length"]}
        worst = min(part["by_depth"], key=lambda entry: entry["logprob_difference"])
        return [
            _percent(part["found_share"]),
            *(f"{by_length[n]:+.3f}" if n in by_length else "" for n in lengths),
            f"{worst['logprob_difference']:+.3f} at {worst['depth']} %",
        ]

    return _table(
        f"Retrieval: {exact['num_answers']} facts hidden in text of {', '.join(lengths)} tokens",
        f"Log-probability of an answer's tokens, nats, less the exact model's {exact['logprob_mean']:.3f}.\n"
        f"Found: each of its tokens was the likeliest; exact model {_percent(exact['found_share'])}.",
        ("cache", "found", *lengths, "worst depth"),
        [(label, *(cells(row) if row else ())) for label, row in rows],
    )


def _layer_table(report: Report, rows: Rows) -> Group:
    def cells(row: dict[str, Any]) -> list[str]:
        errors, removed = [], []
        for part in ("keys", "values"):
            by_layer = [100 * layer[part]["error"] for layer in row["per_layer"]]
            worst = max(by_layer)
            errors += [f"{sum(by_layer) / len(by_layer):.1f}", f"{worst:.1f} in {by_layer.index(worst)}"]
        for part in ("low_rank_removes", "outliers_remove"):
            shares = [_mean([layer[which][part] for layer in row["per_layer"]]) for which in ("keys", "values")]
            known = any(share is not None for share in shares)
            removed.append(" / ".join("–" if s is None else f"{100 * s:.0f}" for s in shares) if known else "")
        return errors + removed

    return _table(
        "Sealed pages: error of a layer in % of its norm",
        "Mean over layers; the worst, and the layer it is in, counted from 0.\n"
        "Low rank, outliers: % of the squared error that the part removes, keys / values.",
        ("cache", "keys", "worst", "values", "worst", "low rank", "outliers"),
        [(label, *(cells(row) if row else ())) for label, row in rows],
    )


def _free_table(report: Report, rows: Rows) -> Group:
    exact = report.exact["free_running"]

    def cells(row: dict[str, Any]) -> list[str]:
        part = row["free_running"]
        return [
            f"{part['first_divergence_median']:.0f}",
            f"{part['first_divergence_mean']:.0f}",
            *(_percent(entry["share"]) for entry in part["identical_share"]),
            f"{part['excess_loops']:+d}" if part["excess_loops"] else "0",
        ]

    return _table(
        f"Free-running: {exact['num_prompts']} prompts, greedy, {exact['new_tokens']} new tokens",
        "Parts at: tokens until another one than the exact model's, median and mean.\n"
        f"Loops: texts that end in repetition, beyond the exact model's {exact['num_loops']}.",
        ("cache", "parts at", "mean", *(f"same of {entry['tokens']}" for entry in exact["identical_share"]), "loops"),
        [(label, *(cells(row) if row else ())) for label, row in rows],
    )


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def _mean(shares: list[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def write_json(report: Report, file: Path) -> None:
    """Raises OSError."""
    file.write_bytes(orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2))


def plot(report: Report, file: Path) -> None:
    """Bits an element against mean KL, both caches and the noise floor, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for row in report.rows:
        ours = row["effective_ratio"] is not None and not row["preset"].startswith("kivi")
        color = "tab:blue" if ours else "tab:gray"
        axes.scatter(row["bits_per_element"], row["kl_mean"], color=color, zorder=3)
        axes.annotate(
            row["preset"],
            (row["bits_per_element"], row["kl_mean"]),
            xytext=(5, 4),
            textcoords="offset points",
            color=color,
        )
    if floor := report.noise_floor.get("kl_mean"):
        axes.axhline(floor, color="tab:red", linestyle="--", linewidth=1, label="noise floor: bf16 against float32")
        axes.legend()
    axes.set(
        yscale="log",
        xlabel="bits an element of the KV cache, metadata included",
        ylabel="KL divergence from the exact model, nats (mean)",
        title=f"{report.model}, {report.num_positions:,} positions",
    )
    axes.grid(alpha=0.3)
    figure.savefig(file, format="png")  # whatever the file is called
