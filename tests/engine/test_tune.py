"""`gear-fidelity --tune` on a tiny model: the file it writes loads, meets its target and is no larger than needed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from gear_compression.config import PRESETS, GearConfig, preset, write_preset
from gear_engine.config import EngineConfig
from gear_engine.fidelity.cli import app
from gear_engine.fidelity.subjects import exact_subject, format_subject
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.fidelity.texts import TextError
from gear_engine.fidelity.tune import default_output, report, split, tuned_format
from gear_engine.fidelity.tune_search import KEY_STEPS, VALUE_STEPS, Tuned, TuneError, Tuner
from gear_engine.model_loader import LoadedModel, load_model
from gear_engine.protocol import AddRequest, SamplingParams
from gear_engine.start import start_engine

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 32,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
CALIBRATION = [[(7 * i * i + 3 * i) % 125 + 3 for i in range(400)]]
HELD_OUT = [[(11 * i * i + 5 * i) % 125 + 3 for i in range(500)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def tiny(folder: Path) -> LoadedModel:
    return load_model(folder, "cpu", torch.float32)


def held_out_kl(loaded: LoadedModel, configs: dict[str, GearConfig]) -> dict[str, float]:
    others = [format_subject(loaded, name, config) for name, config in configs.items()]
    measured = compare(exact_subject(loaded, "exact"), others, HELD_OUT, lambda name: None)
    return {name: float(measured[name].summary()["kl_mean"]) for name in configs}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def target(tiny: LoadedModel) -> float:
    """Between two shipped presets, so that neither is the answer."""
    shipped = {
        name: config for name in ("near-lossless", "balanced") if isinstance(config := PRESETS[name], GearConfig)
    }
    kl = held_out_kl(tiny, shipped)
    return (kl["near-lossless"] * kl["balanced"]) ** 0.5


@pytest.fixture(scope="module")
def tuned(tiny: LoadedModel, target: float) -> Tuned:
    return tuned_format(tiny, CALIBRATION, HELD_OUT, target)


def test_the_written_preset_meets_its_target_and_no_uniform_format_is_smaller(
    tiny: LoadedModel, tuned: Tuned, target: float, tmp_path: Path
) -> None:
    file = tmp_path / "tuned.json"
    write_preset(tuned.best.config, file)
    config = preset(str(file))
    assert isinstance(config, GearConfig)
    uniform = {
        f"{k} {v}": GearConfig(keys=replace(keys, rotate=rotate), values=values, sink_tokens=1)
        for k, keys in KEY_STEPS.items()
        for v, values in VALUE_STEPS.items()
        for rotate in {False, config.keys.rotate}
        if v != "8" and k != "8"
    }
    kl = held_out_kl(tiny, {"tuned": config, **uniform})
    assert kl["tuned"] <= target
    assert kl["tuned"] == pytest.approx(tuned.best.held_out_kl)
    bits = {name: format_subject(tiny, name, one).bits_per_element for name, one in uniform.items()}
    assert tuned.best.bits_per_element <= min(bits[name] for name in uniform if kl[name] <= target)


def test_the_engine_serves_a_tuned_preset(folder: Path, tuned: Tuned, tmp_path: Path) -> None:
    file = tmp_path / "tuned.json"
    write_preset(tuned.best.config, file)
    started = start_engine(EngineConfig(model=str(folder), preset=str(file), num_pages=40, max_model_len=400))
    assert started.info.kv_compression_ratio == pytest.approx(16 / tuned.best.bits_per_element)
    started.engine.add(AddRequest("one", HELD_OUT[0][:300], SamplingParams(max_tokens=4, temperature=0.0)))
    outputs = []
    while started.engine.has_work:
        outputs += started.engine.step().outputs
    assert outputs[-1].finish_reason is not None
    assert outputs[-1].error is None


def test_a_target_out_of_reach_says_what_is_reachable(tiny: LoadedModel) -> None:
    with pytest.raises(TuneError, match=r"finest format \(.* bits an element\) has .*--target-kl above that"):
        tuned_format(tiny, CALIBRATION, HELD_OUT, 1e-9)


def test_an_interrupt_keeps_the_best_so_far_or_says_that_there_is_none(tiny: LoadedModel, target: float) -> None:
    def interrupt_at(stop: str) -> Tuner:
        def on_step(name: str) -> None:
            if name == stop:
                raise KeyboardInterrupt

        return Tuner(tiny, CALIBRATION, HELD_OUT, target, on_step)

    tuned = interrupt_at("values 3").run()
    assert tuned.interrupted
    assert tuned.best.name == "near-lossless"  # the shipped presets are measured first
    with pytest.raises(TuneError, match="nothing was written"):
        interrupt_at("balanced").run()


def test_the_report_names_layers_and_the_shipped_presets(tuned: Tuned, target: float) -> None:
    from rich.console import Console

    console = Console(width=100, record=True)
    console.print(report(tuned, target))
    text = console.export_text()
    assert "near-lossless" in text
    assert "best" in text
    assert "bits" in text


def test_texts_are_split_into_calibration_and_held_out() -> None:
    assert split([[1] * 600, [2] * 600]) == ([[1] * 300], [[2] * 600])
    assert split([[1] * 300 + [2] * 300]) == ([[1] * 256], [[2] * 300])
    with pytest.raises(TextError, match="two texts of 256 tokens"):
        split([[1] * 500])


def test_the_command_refuses_before_it_works(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    for arguments, remedy in (
        (["--tune"], "pass --tune and --target-kl"),
        (["--target-kl", "0.002"], "pass --tune and --target-kl"),
        (["--tune", "--target-kl", "0"], "above 0"),
        (["--tune", "--target-kl", "0.002", "--output", str(there)], "remove it or pass another --output"),
        (["--tune", "--target-kl", "0.002", "--output", str(tmp_path / "no" / "x.json")], "another --output"),
        (["--tune", "--target-kl", "0.002", "--preset", "fp8"], "drop --preset"),
    ):
        result = CliRunner().invoke(app, [str(folder), *arguments])
        assert result.exit_code == 2
        assert remedy in result.stderr
    assert default_output("org/some-model", 0.002) == Path("some-model-kl0.002.json")
