"""What was measured, as a table for people, JSON for programs and a plot: bits an element against KL divergence."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

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


def table(report: Report) -> Table:
    floor = report.noise_floor.get("kl_mean", 0.0)
    positions = f"{report.num_positions:,} positions in {report.num_texts} texts"
    out = Table(
        box=box.SIMPLE,
        pad_edge=False,
        title=f"{report.model}, {positions} of {report.context} tokens",
        caption=f"Noise floor, bf16 weights against float32: KL {floor:.4f}. A figure below it reads as zero.\n"
        f"Top-1: same likeliest token. Smaller: than bf16, open pages included,\n"
        f"a sequence of {' and '.join(map(str, EFFECTIVE_AT))} tokens.",
    )
    for heading in ("cache", "bits", "KL mean", "KL p99", "top-1", "ppl", "smaller"):
        out.add_column(heading, justify="left" if heading == "cache" else "right", no_wrap=True)
    for row in report.rows:
        out.add_row(
            row["preset"],
            f"{row['bits_per_element']:.2f}",
            f"{row['kl_mean']:.4f}",
            f"{row['kl_p99']:.3f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['perplexity']:.3f}",
            " ".join(f"{ratio:.2f}×" for ratio in row["effective_ratio"] or ()),
        )
    return out


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
    figure.savefig(file)
