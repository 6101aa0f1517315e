"""`gear-fidelity --tune`: finds the smallest format that meets a KL target and writes it as a preset file.

Knows the texts, the progress bar, the file and the table; how formats are found is in `tune_search.py`.
"""

from itertools import groupby
from pathlib import Path

import torch
from rich import box
from rich.console import Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer

from gear_compression.config import GearConfig, PartConfig, write_preset
from gear_engine.fidelity.subjects import CHUNK
from gear_engine.fidelity.texts import MIN_PAGES, TextError, cut
from gear_engine.fidelity.tune_search import Texts, Tuned, Tuner
from gear_engine.model_files import model_folder, served_name
from gear_engine.model_loader import LoadedModel, load_model

PAGE_SIZE = GearConfig().page_size


def default_output(model: str | None, target_kl: float) -> Path:
    return Path(f"{served_name(model).split('/')[-1]}-kl{target_kl:g}.json")


def tune_model(
    model: str | None, files: list[Path], target_kl: float, output: Path, context: int, num_texts: int
) -> Tuned:
    """Writes `output`, after an interrupt with the best so far. Raises TuneError, TextError or EngineStartError."""
    folder = model_folder(model)
    loaded = load_model(folder, "cpu", torch.float32)
    if context > loaded.max_position:
        raise TextError(f"--context {context} is more than the {loaded.max_position} tokens of this model: lower it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = cut(files, lambda text: tokenizer(text, verbose=False)["input_ids"], context, num_texts, PAGE_SIZE)
    tuned = tuned_format(loaded, *split(texts), target_kl)
    write_preset(tuned.best.config, output)
    return tuned


def split(texts: Texts) -> tuple[Texts, Texts]:
    """(calibration: half of the first text, since many formats run on it; held out: the others)"""
    if len(texts) == 1:
        half = len(texts[0]) // 2
        texts = [texts[0][:half], texts[0][half:]]
    least = MIN_PAGES * PAGE_SIZE
    if len(texts[-1]) < least:
        raise TextError(f"--tune needs two texts of {least} tokens (two pages): add more with --text")
    return [texts[0][: max(len(texts[0]) // 2, least)]], texts[1:]


def tuned_format(loaded: LoadedModel, calibration: Texts, held_out: Texts, target_kl: float) -> Tuned:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("starting", total=1)
        tuner = Tuner(
            loaded, calibration, held_out, target_kl, lambda name: progress.update(task, description=name, advance=1)
        )
        on_calibration, on_held_out = tuner.num_measurements
        progress.update(task, total=on_calibration * _num_chunks(calibration) + on_held_out * _num_chunks(held_out))
        return tuner.run()


def _num_chunks(texts: Texts) -> int:
    return sum(-(-len(text) // CHUNK) for text in texts)


def report(tuned: Tuned, target_kl: float) -> Group:
    """What was found, layer by layer, and beside the shipped presets."""
    return Group(_layers(tuned.best.config, tuned.num_layers), _comparison(tuned, target_kl))


def _layers(config: GearConfig, num_layers: int) -> Table:
    out = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("layers", "keys", "values"):
        out.add_column(heading)
    same: dict[tuple[PartConfig, PartConfig], list[int]] = {}
    for layer in range(num_layers):
        same.setdefault(config.parts(layer), []).append(layer)
    for (keys, values), layers in same.items():
        out.add_row(_ranges(layers), described(keys), described(values))
    return out


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def described(part: PartConfig) -> str:
    words = [f"{part.bits} bits"]
    if part.group_size:
        words.append(f"groups of {part.group_size}")
    if part.rank:
        words.append(f"rank {part.rank}")
    if part.outliers:
        words.append(f"{part.outliers} outliers")
    if part.rotate:
        words.append("rotated")
    return ", ".join(words)


def _comparison(tuned: Tuned, target_kl: float) -> Table:
    calibration = "not measured" if tuned.calibration_kl is None else f"{tuned.calibration_kl:.5f}"
    out = Table(
        box=box.SIMPLE,
        pad_edge=False,
        caption=f"KL on held-out text. Of the best on the shorter calibration text: {calibration}.",
    )
    for heading in ("format", "bits", "smaller", "KL", f"≤ {target_kl:g}"):
        out.add_column(heading, justify="left" if heading == "format" else "right")
    for found in sorted(tuned.verified, key=lambda found: found.bits_per_element):
        mark = "best" if found is tuned.best else "yes" if found.held_out_kl <= target_kl else "no"
        out.add_row(
            found.name,
            f"{found.bits_per_element:.2f}",
            f"{16 / found.bits_per_element:.2f}×",
            f"{found.held_out_kl:.5f}",
            mark,
        )
    return out
