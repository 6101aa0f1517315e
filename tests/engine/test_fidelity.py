"""`gear-fidelity` on a tiny model: exact against itself is zero, and worse caches measure as worse."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from gear_compression.config import ConfigError, GearConfig, LayerConfig, PartConfig, write_preset
from gear_engine.fidelity.cli import app
from gear_engine.fidelity.free_running import first_divergence, free_run, loop_period, prompt_tokens, summary
from gear_engine.fidelity.per_layer import errors_by_layer, exact_pages, part_errors
from gear_engine.fidelity.report import Report, plot
from gear_engine.fidelity.retrieval import DEPTHS, Scores, haystacks, retrieve
from gear_engine.fidelity.run import Inputs, measure
from gear_engine.fidelity.subjects import ablation_subjects, exact_subject, format_subject, subjects
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.fidelity.texts import TextError, cut, default_text
from gear_engine.model_loader import LoadedModel, load_model

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}  # fmt: skip
TEXT = [(7 * i * i + 3 * i) % 125 + 3 for i in range(700)]


def words(text: str) -> list[int]:
    return [sum(word.encode()) % 120 + 3 for word in re.findall(r"\w+", text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    common = ["?", *(word for word, _ in Counter(default_text().split()).most_common(120))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(common)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(folder: Path) -> LoadedModel:
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


def test_the_exact_model_writes_what_it_writes_and_a_worse_cache_parts_no_later(tiny: LoadedModel) -> None:
    exact = exact_subject(tiny, "exact")
    prompts = [TEXT[i : i + 200] for i in range(0, 400, 100)]
    same = exact_subject(tiny, "same")
    found = dict(free_run(exact, [same, *subjects(tiny, ["bf16", "kivi-2"])], prompts, 40, lambda name: None))
    assert found["exact"] == found["same"]
    assert found["exact"]["num_never_diverged"] == 4
    assert found["exact"]["first_divergence_median"] == 40
    assert found["exact"]["excess_loops"] == 0
    assert found["exact"]["identical_share"] == [{"tokens": 40, "share": 1.0}]
    assert found["kivi-2"]["first_divergence_mean"] <= found["bf16"]["first_divergence_mean"] <= 40
    assert found["kivi-2"]["first_divergence_mean"] < 40


def test_a_text_parts_where_it_differs_or_ends() -> None:
    assert first_divergence([1, 2, 3], [1, 2, 3]) is None
    assert first_divergence([1, 2, 3], [1, 9, 3]) == 1
    assert first_divergence([1, 2, 3], [1, 2]) == 2
    assert first_divergence([1, 2], [1, 2, 3]) == 2
    beside = summary([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5]], 4)
    assert beside["first_divergence"] == [2, 1]
    assert beside["identical_share"] == [{"tokens": 4, "share": 0.5}]


def test_a_loop_is_found_with_its_period_and_a_text_that_only_ends_alike_is_none() -> None:
    start = list(range(100, 150))
    assert loop_period(start + [7] * 40) == 1
    assert loop_period(start + [1, 2, 3] * 11) == 3
    assert loop_period(start + [1, 2, 3] * 11 + [1]) == 3  # in the midst of a round
    assert loop_period(start + list(range(20)) * 3) == 20
    assert loop_period(start + list(range(20)) * 2) is None
    assert loop_period(start + [7] * 20) is None  # a row of dashes
    assert loop_period(start + [7] * 40 + [8]) is None
    assert loop_period([]) is None


def test_prompts_that_do_not_fit_the_model_name_the_remedy() -> None:
    assert prompt_tokens(words, 0, 10) == []
    with pytest.raises(TextError, match="lower --new-tokens to"):
        prompt_tokens(words, 900, 1000)


def test_facts_lie_at_their_depths_and_the_exact_model_retrieves_as_well_as_itself(tiny: LoadedModel) -> None:
    stacks = haystacks([TEXT, TEXT], words)
    assert [len(stack.token_ids) for stack in stacks] == [512, 512]
    assert stacks[0].token_ids != stacks[1].token_ids  # needles of its own
    for answer in stacks[0].answers:
        code = stacks[0].token_ids[answer.start : answer.end]
        sealed = stacks[0].token_ids[: 512 * (answer.depth + 10) // 100]
        assert len(code) == 1
        assert code[0] in sealed
    exact = exact_subject(tiny, "exact")
    found: dict[str, Scores] = {}
    for name, pairs in retrieve(exact, [exact_subject(tiny, "same")], stacks, lambda name: None):
        found.setdefault(name, Scores()).pairs += pairs
    summary = found["same"].summary()
    assert summary["logprob_difference"] == 0.0
    assert summary["num_answers"] == 10
    assert summary["logprob_mean"] < 0
    assert [entry["depth"] for entry in summary["by_depth"]] == list(DEPTHS)
    assert [entry["num_answers"] for entry in summary["by_length"]] == [10]


def test_no_haystack_is_made_of_needles_alone() -> None:
    assert haystacks([TEXT], lambda text: [3] * len(text)) == []
    assert haystacks([TEXT[:511]], words) == []


def test_errors_of_all_layers_grow_with_compression(tiny: LoadedModel) -> None:
    kv = exact_pages(exact_subject(tiny, "exact"), TEXT)
    assert kv.shape == (2, 2, 2, 640, 32)  # ten raw pages of 64 tokens
    names = ["fp8", "near-lossless", "max-compression", "gear-4bit"]
    found = dict(errors_by_layer(subjects(tiny, names), kv, lambda name: None))
    assert list(found) == names[1:]  # formats of ours
    for good, bad in zip(found["near-lossless"], found["max-compression"], strict=True):
        assert good.layer == bad.layer
        assert 0 < good.keys.error < bad.keys.error < 1
        assert 0 < good.values.error < bad.values.error < 1
    for layer in found["gear-4bit"]:
        for part in (layer.keys, layer.values):
            assert 0 < part.low_rank_removes < 1
            assert 0 < part.outliers_remove < 1
    assert found["max-compression"][0].keys.low_rank_removes is None


def test_a_layer_with_a_format_of_its_own_has_an_error_of_its_own(tiny: LoadedModel) -> None:
    own = LayerConfig(layer=1, keys=PartConfig(bits=8, rank=2), values=PartConfig(bits=8))
    config = GearConfig(keys=PartConfig(bits=2), values=PartConfig(bits=2), layers=(own,))
    subject = format_subject(tiny, "tuned", config)
    kv = exact_pages(exact_subject(tiny, "exact"), TEXT)
    plain, fine = dict(errors_by_layer([subject], kv, lambda name: None))["tuned"]
    assert fine.keys.error < plain.keys.error / 10
    assert fine.values.error < plain.values.error / 10
    assert plain.keys.low_rank_removes is None
    assert fine.keys.low_rank_removes > 0


def test_the_exact_pages_are_what_attention_reads(tiny: LoadedModel) -> None:
    """Layer 0's values are a linear map of the embeddings: no rotation, no other layer, no mixed-up order."""
    kv = exact_pages(exact_subject(tiny, "exact"), TEXT)
    layer = tiny.model.model.layers[0]
    hidden = layer.input_layernorm(tiny.model.model.embed_tokens(torch.tensor(TEXT[:640])))
    expected = layer.self_attn.v_proj(hidden).view(640, 2, 32).transpose(0, 1)
    torch.testing.assert_close(kv[0, :, 1], expected, atol=1e-5, rtol=1e-5)  # float32, another order of sums


@pytest.mark.parametrize("first", [True, False])
def test_low_rank_removes_nearly_all_of_a_low_rank_matrix_and_little_of_noise(first: bool) -> None:
    torch.manual_seed(0)
    part = PartConfig(bits=2, rank=2, low_rank_first=first)
    noise = torch.randn(64, 32)
    low = torch.randn(64, 2) @ torch.randn(2, 32)
    removed = [part_errors([(x, False)], part, True, 0).low_rank_removes for x in (noise, low)]
    assert 0 < removed[0] < 0.4
    assert removed[0] < removed[1] <= 1
    if first:
        assert removed[1] > 0.99
    assert part_errors([(low, False)], part, True, 0).outliers_remove is None


def test_an_ablation_takes_the_parts_away_one_by_one(tiny: LoadedModel, tmp_path: Path) -> None:
    rows = ablation_subjects(tiny, "gear-4bit")
    assert [subject.name.removeprefix("gear-4bit: ") for subject in rows] == [
        "codes", "codes + outliers", "codes + low rank", "all",
    ]  # fmt: skip
    assert rows[0].bits_per_element < rows[1].bits_per_element < rows[3].bits_per_element
    assert len(ablation_subjects(tiny, "near-lossless")) == 2
    own = LayerConfig(layer=0, keys=PartConfig(rank=4), values=PartConfig(rank=4))
    write_preset(GearConfig(layers=(own,)), tmp_path / "tuned.json")
    codes, low_rank = ablation_subjects(tiny, str(tmp_path / "tuned.json"))
    assert codes.layout.config.parts(0) == (PartConfig(), PartConfig())
    assert low_rank.layout.config.parts(0) == (own.keys, own.values)
    with pytest.raises(ConfigError, match="codes alone"):
        ablation_subjects(tiny, "balanced")


@pytest.mark.parametrize("part", ["text", "retrieval", "per layer", "free-running"])
def test_an_interrupt_in_any_part_keeps_all_before_it(tiny: LoadedModel, part: str) -> None:
    def bar(name: str, total: int) -> Callable[[str], None]:
        begun: list[str] = []

        def on_step(subject: str) -> None:
            begun.append(subject)
            if name == part and len(begun) == min(3, total):
                raise KeyboardInterrupt

        return on_step

    inputs = Inputs([TEXT], haystacks([TEXT], words), [TEXT[:200]], new_tokens=5)
    measured = measure(exact_subject(tiny, "exact"), subjects(tiny, ["near-lossless", "kivi-2"]), inputs, bar)
    assert measured.interrupted
    row = measured.of("near-lossless")
    assert row["kl_mean"] > 0
    kept = {"text": 0, "retrieval": 1, "per layer": 2, "free-running": 3}[part]
    assert [row[key] is not None for key in ("retrieval", "per_layer")] == [kept >= 1, kept >= 2]
    assert (row["free_running"] is not None) == (kept == 3)
    assert measured.of("kivi-2")["free_running"] is None


ARGUMENTS = ["--preset", "kivi-2", "--ablation", "near-lossless", "--context", "600", "--num-texts", "1",
             "--new-tokens", "16"]  # fmt: skip


def test_a_whole_run_writes_all_parts(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [str(folder), *ARGUMENTS, "--json", str(tmp_path / "all.json")])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "all.json").read_text())
    assert [row["preset"] for row in report["rows"]] == [
        "kivi-2", "near-lossless: codes", "near-lossless: codes + low rank",
    ]  # fmt: skip
    for row in [*report["rows"], report["exact"], report["noise_floor"]]:
        assert row["free_running"]["new_tokens"] == 16
        assert row["retrieval"]["by_length"][0]["tokens"] == 512
    assert len(report["rows"][0]["per_layer"]) == 2
    assert report["exact"]["per_layer"] is None
    for title in ("positions in 1 text of 600", "Retrieval: 5 facts", "Sealed pages", "Free-running: 6 prompts"):
        assert title in result.stdout
    assert "near-lossless, with" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_the_file_and_not_the_tables(folder: Path, tmp_path: Path) -> None:
    arguments = ["--new-tokens", "0", "--no-retrieval", "--json", "/dev/full", "--plot", str(tmp_path / "plot.png")]
    result = CliRunner().invoke(app, [str(folder), *ARGUMENTS, *arguments])
    assert result.exit_code == 2
    assert "kivi-2" in result.stdout
    assert "Retrieval" not in result.stdout
    assert "Free-running" not in result.stdout
    assert "cannot write /dev/full: No space left on device" in result.stderr
    assert (tmp_path / "plot.png").exists()  # one failure does not cost the other file
