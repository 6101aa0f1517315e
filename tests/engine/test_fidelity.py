"""`gear-fidelity` on a tiny model: exact against itself is zero, and worse caches measure as worse."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from gear_compression.config import ConfigError
from gear_engine.fidelity.cli import app
from gear_engine.fidelity.report import Report, plot
from gear_engine.fidelity.subjects import exact_subject, subjects
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.fidelity.texts import TextError, cut, default_text
from gear_engine.model_loader import LoadedModel, load_model

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
TEXT = [(7 * i * i + 3 * i) % 125 + 3 for i in range(700)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return load_model(folder, "cpu", torch.float32)


def test_the_exact_model_against_itself_is_zero_and_worse_caches_measure_as_worse(tiny: LoadedModel) -> None:
    names = ["bf16", "fp8", "int8", "int4", "kivi-2", "near-lossless", "max-compression"]
    measured = compare(exact_subject(tiny, "exact"), subjects(tiny, names), [TEXT], lambda name: None)
    summaries = {name: distances.summary() for name, distances in measured.items()}
    kl = {name: summary["kl_mean"] for name, summary in summaries.items()}
    assert summaries["exact"]["kl_max"] == 0.0
    assert summaries["exact"]["top1_agreement"] == 1.0
    assert 0 < kl["bf16"] < kl["fp8"] < kl["int4"] < kl["kivi-2"]
    assert kl["int8"] < kl["near-lossless"] < kl["max-compression"]
    assert [bucket["from"] for bucket in summaries["exact"]["by_position"]] == [0, 512]
    assert len(TEXT) == 700  # left as it was
    assert sum(len(part) for part in measured["fp8"].position) == 699


def test_all_of_a_page_that_is_not_full_is_exact(tiny: LoadedModel) -> None:
    measured = compare(exact_subject(tiny, "exact"), subjects(tiny, ["kivi-2"]), [TEXT[:128]], lambda name: None)
    # Nothing is sealed before the last of 128 tokens; what is left is bf16 in the open page.
    assert measured["kivi-2"].summary()["kl_mean"] < 1e-2


def test_bits_are_honest(tiny: LoadedModel) -> None:
    bits = {subject.name: subject.bits_per_element for subject in subjects(tiny, ["fp8", "int4", "kivi-2", "kivi-4"])}
    assert bits == {"fp8": 8.0, "int4": 5.0, "kivi-2": 3.0, "kivi-4": 5.0}  # int4: 4 + two bf16 over 32 channels


def test_an_interrupt_keeps_what_was_measured(tiny: LoadedModel) -> None:
    steps = 0

    def stop_in_the_second_text(name: str) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt

    measured = compare(exact_subject(tiny, "exact"), subjects(tiny, ["fp8"]), [TEXT, TEXT], stop_in_the_second_text)
    assert len(measured["fp8"].position) == 2


def test_text_too_short_unknown_presets_and_bad_paths_name_the_remedy(tiny: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="two pages"):
        cut([], lambda text: [1] * 255, 100, 1, 128)
    with pytest.raises(TextError, match="--text"):
        cut([tmp_path / "none.txt"], lambda text: [1], 100, 1, 128)
    with pytest.raises(ConfigError, match="unknown preset 'fp7'"):
        subjects(tiny, ["fp7"])
    result = CliRunner().invoke(app, ["--json", str(tmp_path / "no" / "where.json")])
    assert result.exit_code == 2
    assert "choose another path" in result.stderr


def test_texts_are_spread_over_all_there_is() -> None:
    tokens = list(range(1000))
    assert [text[0] for text in cut([], lambda text: tokens, 200, 3, 64)] == [0, 400, 800]
    assert len(default_text()) > 300_000


def test_the_report_becomes_a_plot(tmp_path: Path) -> None:
    row = {"preset": "fp8", "bits_per_element": 8.0, "kl_mean": 0.01, "effective_ratio": None}
    report = Report("tiny", "2026-01-01", 100, 1, 99, {}, {"kl_mean": 0.001}, [row])
    plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.dumps(row)
