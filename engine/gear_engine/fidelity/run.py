"""One run of `gear-fidelity`: loads the model, cuts the text, measures part by part, and reports what was measured."""

import datetime
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoTokenizer

from gear_engine.fidelity.free_running import free_run, prompt_tokens
from gear_engine.fidelity.per_layer import LayerErrors, errors_by_layer, exact_pages
from gear_engine.fidelity.report import EFFECTIVE_AT, Report
from gear_engine.fidelity.retrieval import Haystack, Scores, haystacks, retrieve
from gear_engine.fidelity.subjects import (
    CHUNK,
    Subject,
    ablation_subjects,
    all_names,
    bf16_copy,
    exact_subject,
    subjects,
)
from gear_engine.fidelity.teacher_forced import Distances, compare
from gear_engine.fidelity.texts import TextError, cut
from gear_engine.model_files import model_folder, served_name
from gear_engine.model_loader import LoadedModel, load_model

EXACT, FLOOR = "exact", "bf16 model"


@dataclass(frozen=True, slots=True)
class Request:
    """What to compare, on what, and how much of it."""

    model: str | None
    files: list[Path]
    presets: list[str]  # none: all there are
    ablation: list[str]
    context: int  # tokens of a text
    num_texts: int
    new_tokens: int  # free-running; 0 leaves it out
    retrieval: bool


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything that is fed to the caches, ready before the first minute of work."""

    texts: list[list[int]]
    stacks: list[Haystack]
    prompts: list[list[int]]
    new_tokens: int


@dataclass(slots=True)
class Measured:
    """What there is so far, by name of a cache: an interrupt keeps it."""

    distances: dict[str, Distances] = field(default_factory=dict)
    retrieval: dict[str, Scores] = field(default_factory=dict)
    per_layer: dict[str, list[LayerErrors]] = field(default_factory=dict)
    free_running: dict[str, dict[str, object]] = field(default_factory=dict)
    interrupted: bool = False

    def of(self, name: str) -> dict[str, Any]:
        """All parts of one cache, as in the JSON; null where a part was not measured."""
        scores, errors = self.retrieval.get(name), self.per_layer.get(name)
        return {
            **self.distances[name].summary(),
            "free_running": self.free_running.get(name),
            "retrieval": scores.summary() if scores and scores.pairs else None,
            "per_layer": [asdict(layer) for layer in errors] if errors else None,
        }


def run(request: Request) -> Report:
    """Raises ConfigError, EngineStartError or TextError, each naming its remedy.

    An interrupt ends the measuring, not the report; before there is anything to report, it is raised.
    """
    folder = model_folder(request.model)
    loaded = load_model(folder, "cpu", torch.float32)
    others = subjects(loaded, list(dict.fromkeys(request.presets)) or all_names())
    others += [subject for name in dict.fromkeys(request.ablation) for subject in ablation_subjects(loaded, name)]
    inputs = _inputs(request, loaded, folder, max(subject.layout.page_size for subject in others))
    exact, floor = exact_subject(loaded, EXACT), exact_subject(bf16_copy(loaded), FLOOR)

    columns = (TextColumn("{task.description:<40}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        measured = measure(exact, [floor, *others], inputs, lambda part, total: _bar(progress, part, total))
    if EXACT not in measured.distances:
        raise KeyboardInterrupt
    return Report(
        model=served_name(request.model),
        date=datetime.date.today().isoformat(),
        context=len(inputs.texts[0]),
        num_texts=len(inputs.texts),
        num_positions=sum(len(positions) for positions in measured.distances[EXACT].position),
        exact=measured.of(EXACT),
        noise_floor=measured.of(FLOOR) if FLOOR in measured.distances else {},
        rows=[_row(subject, measured) for subject in others if subject.name in measured.distances],
        interrupted=measured.interrupted,
    )


def _inputs(request: Request, loaded: LoadedModel, folder: Path, page_size: int) -> Inputs:
    if request.context > loaded.max_position:
        raise TextError(
            f"--context {request.context} is more than the {loaded.max_position} tokens of this model: lower it"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(text: str, whole: bool = True) -> list[int]:
        return tokenizer(text, verbose=False, add_special_tokens=whole)["input_ids"]

    texts = cut(request.files, tokenize, request.context, request.num_texts, page_size)
    return Inputs(
        texts=texts,
        stacks=haystacks(texts, lambda text: tokenize(text, whole=False)) if request.retrieval else [],
        prompts=prompt_tokens(tokenize, request.new_tokens, loaded.max_position),
        new_tokens=request.new_tokens,
    )


OnStep = Callable[[str], None]  # called with a cache's name as each step begins


def measure(exact: Subject, others: list[Subject], inputs: Inputs, bar: Callable[[str, int], OnStep]) -> Measured:
    """All parts, the slowest last. An interrupt, whenever it comes, leaves what was measured till then.

    bar: called with a part's name and number of steps as it begins.
    """
    measured = Measured()
    try:
        _compare(measured, exact, others, inputs.texts, bar)

        on_step = bar("retrieval", len(inputs.stacks) * (len(others) + 1))
        for name, pairs in retrieve(exact, others, inputs.stacks, on_step):
            measured.retrieval.setdefault(name, Scores()).pairs += pairs

        on_step = bar("per layer", sum(not subject.layout.is_raw for subject in others))
        for name, errors in errors_by_layer(others, exact_pages(exact, inputs.texts[0]), on_step):
            measured.per_layer[name] = errors

        if inputs.prompts:
            on_step = bar("free-running", len(others) + 1)
            for name, texts in free_run(exact, others, inputs.prompts, inputs.new_tokens, on_step):
                measured.free_running[name] = texts
    except KeyboardInterrupt:
        measured.interrupted = True
    return measured


def _compare(
    measured: Measured,
    exact: Subject,
    others: list[Subject],
    texts: list[list[int]],
    bar: Callable[[str, int], OnStep],
) -> None:
    """The teacher-forced part, which keeps its results from an interrupt by itself."""
    step = bar("text", len(texts) * -(-len(texts[0]) // CHUNK) * len(others))

    def on_step(name: str) -> None:
        measured.interrupted = measured.interrupted or name == "interrupted"
        step(name)

    measured.distances = compare(exact, others, texts, on_step)
    if measured.interrupted:
        raise KeyboardInterrupt


def _bar(progress: Progress, part: str, total: int) -> OnStep:
    task = progress.add_task(part, total=total)
    begun = 0

    def on_step(name: str) -> None:
        nonlocal begun
        progress.update(task, description=f"{part}: {name}", completed=begun)
        begun += 1

    return on_step


def _row(subject: Subject, measured: Measured) -> dict[str, Any]:
    ratios = [subject.effective_ratio(n) for n in EFFECTIVE_AT]
    return {
        "preset": subject.name,
        "bits_per_element": subject.bits_per_element,
        "effective_ratio": ratios if None not in ratios else None,
        "tokens_per_gib": int(2**30 / (subject.layout.token_bytes * subject.bits_per_element / 16)),
        **measured.of(subject.name),
    }
