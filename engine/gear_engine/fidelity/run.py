"""One run of `gear-fidelity`: loads the model, cuts the text, compares, and reports what was measured."""

import datetime
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from gear_engine.fidelity.report import EFFECTIVE_AT, Report
from gear_engine.fidelity.subjects import CHUNK, Subject, all_names, bf16_copy, exact_subject, subjects
from gear_engine.fidelity.teacher_forced import Distances, compare
from gear_engine.fidelity.texts import TextError, cut
from gear_engine.model_files import model_folder, served_name
from gear_engine.model_loader import load_model

FLOOR = "bf16 model"


def run(model: str | None, files: list[Path], names: list[str] | None, context: int, num_texts: int) -> Report:
    """Raises ConfigError, EngineStartError or TextError, each naming its remedy."""
    folder = model_folder(model)
    loaded = load_model(folder, "cpu", torch.float32)
    others = subjects(loaded, names or all_names())
    if context > loaded.max_position:
        raise TextError(f"--context {context} is more than the {loaded.max_position} tokens of this model: lower it")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    page_size = max(subject.layout.page_size for subject in others)
    texts = cut(files, lambda text: tokenizer(text, verbose=False)["input_ids"], context, num_texts, page_size)
    exact = exact_subject(loaded, "exact")
    floor = exact_subject(bf16_copy(loaded), FLOOR)

    num_steps = len(texts) * -(-len(texts[0]) // CHUNK) * (len(others) + 1)
    interrupted = False
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("starting", total=num_steps)

        def on_step(name: str) -> None:
            nonlocal interrupted
            interrupted = interrupted or name == "interrupted"
            progress.update(task, description=name, advance=1)

        measured = compare(exact, [floor, *others], texts, on_step)
    if "exact" not in measured:
        raise TextError("interrupted before anything was measured: try fewer presets (--preset) or a shorter --context")
    return Report(
        model=served_name(model),
        date=datetime.date.today().isoformat(),
        context=len(texts[0]),
        num_texts=len(texts),
        num_positions=sum(len(positions) for positions in measured["exact"].position),
        exact=measured["exact"].summary(),
        noise_floor=measured[FLOOR].summary() if FLOOR in measured else {},
        rows=[_row(subject, measured[subject.name]) for subject in others if subject.name in measured],
        interrupted=interrupted,
    )


def _row(subject: Subject, distances: Distances) -> dict[str, object]:
    ratios = [subject.effective_ratio(n) for n in EFFECTIVE_AT]
    return {
        "preset": subject.name,
        "bits_per_element": subject.bits_per_element,
        "effective_ratio": ratios if None not in ratios else None,
        "tokens_per_gib": int(2**30 / (subject.layout.token_bytes * subject.bits_per_element / 16)),
        **distances.summary(),
    }
