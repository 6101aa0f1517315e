"""What the user decides about the server: flags, environment, config file and defaults become `Settings`.

Flags and environment arrive together from `cli.py`; the defaults of the engine's knobs live in `EngineConfig`.
"""

import difflib
import ipaddress
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gear_engine.config import DEFAULT_MODEL, EngineConfig
from gear_engine.log_format import LogFormat
from gear_server.errors import describe

ENGINE_FIELDS = frozenset(EngineConfig.__struct_fields__)


class SettingsError(ValueError):
    """The server cannot start like this; one sentence that names the setting and the remedy."""


def _split(value: Any) -> Any:
    """ "a,b" and ["a", "b"] and ["a,b"] all name two things; empty ones are nothing."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(one, str) for one in values):
        return value
    return tuple(part.strip() for one in values for part in one.split(",") if part.strip())


def _number_to_text(value: Any) -> Any:
    """`memory = 0.5` in a file is the fraction "0.5"."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
AtLeastOne = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Settings(BaseModel):
    """`None` leaves a knob of the engine at its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str | None = None
    host: str = "127.0.0.1"
    port: Port = 8000  # 0: any free one
    api_key: Names = ()
    served_model_name: Names = ()
    metrics_port: Port | None = None
    metrics_host: str = "127.0.0.1"
    insecure: bool = False
    isolate_keys: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: LogFormat = "text"

    device: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    backend: str | None = None
    preset: str | None = None
    memory: Annotated[str | None, BeforeValidator(_number_to_text)] = None
    num_pages: AtLeastOne | None = None
    max_model_len: AtLeastOne | None = None
    max_running: AtLeastOne | None = None
    max_batch_tokens: AtLeastOne | None = None
    eager: bool | None = None
    max_waiting: Annotated[int, Field(ge=0)] | None = None
    swap_space: Annotated[str | None, BeforeValidator(_number_to_text)] = None
    cache_dir: str | None = None
    cache_dir_space: str | None = None
    prefix_cache: bool | None = None

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names that requests may use; the first is the one that answers and metrics carry."""
        return self.served_model_name or (_name_of(self.model),)

    @property
    def engine_config(self) -> EngineConfig:
        return EngineConfig(**{name: value for name, value in self if name in ENGINE_FIELDS and value is not None})

    def check_exposure(self) -> None:
        """Raise `SettingsError` if anybody on the network could use this server without a key, or if the keys that
        are to be kept apart are missing."""
        if not self.api_key and not self.insecure and not is_loopback(self.host):
            raise SettingsError(
                f"{self.host} can be reached from other machines and no API key is set: "
                "set one with --api-key (or GEAR_API_KEY), or pass --insecure to serve whoever can connect"
            )
        if self.isolate_keys and not self.api_key:
            raise SettingsError(
                "--isolate-keys has no API keys to keep apart: set them with --api-key, or leave it out"
            )


def resolve_settings(options: dict[str, Any], config_file: Path | None = None) -> Settings:
    """`options` (flags and environment) win over the file. Raises `SettingsError`."""
    from_file = {} if config_file is None else _read_file(config_file)
    try:
        return Settings(**(from_file | options))
    except ValidationError as error:
        message, _ = describe(error.errors()[0])
        raise SettingsError(message) from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(model: str | None) -> str:
    """A hub name as it is; a folder or a file by its own name, because its path is nobody's business."""
    if model is None:
        return DEFAULT_MODEL
    path = Path(model)
    if not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def _read_file(path: Path) -> dict[str, Any]:
    """Keys are the names of the flags, with - or _."""
    try:
        text = path.read_text(encoding="utf-8")
        values = orjson.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingsError(f"--config {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # both parsers' errors, and text that is not UTF-8
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise SettingsError(f"--config {path} is not valid {kind}: {error}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path} must hold an object with the names of flags as keys")
    settings = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in Settings.model_fields:
            raise SettingsError(f'--config {path}: unknown key "{key}"; {_nearest(name)}')
        settings[name] = value
    return settings


def _nearest(name: str) -> str:
    known = list(Settings.model_fields)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f'the nearest valid key is "{close[0]}"'
