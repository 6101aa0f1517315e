"""Flag, environment, config file, default: in that order, and wrong ones are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from gear_engine.config import EngineConfig
from gear_server import cli
from gear_server.settings import Settings, SettingsError, resolve_settings


def settings_from(arguments: list[str]) -> Settings:
    """What the command line would serve with."""
    command = typer.main.get_command(cli.app)
    params = command.make_context("gear-serve", arguments).params
    return resolve_settings(cli.given_options(params), params["config"])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text('port = 1001\nmax-running = 11\npreset = "file"\napi_key = ["a", "b"]\nmemory = 0.5\n')
    return path


def test_flags_win_over_environment_over_file_over_defaults(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEAR_CONFIG", str(config_file))
    monkeypatch.setenv("GEAR_PORT", "1002")
    monkeypatch.setenv("GEAR_MAX_RUNNING", "12")
    settings = settings_from(["--port", "1003"])
    assert settings.port == 1003
    assert settings.max_running == 12
    assert settings.preset == "file"
    assert settings.host == "127.0.0.1"


def test_without_anything_the_defaults_are_the_engines() -> None:
    settings = settings_from([])
    assert settings == Settings()
    assert settings.engine_config == EngineConfig()
    assert settings.model_names == ("SmolLM2-135M-Instruct",)


def test_every_option_reaches_its_setting() -> None:
    given: dict[str, Any] = {
        "host": "::1", "port": 1, "served_model_name": ("x",), "api_key": ("k",), "device": "cpu", "dtype": "float32",
        "backend": "reference", "preset": "none", "memory": "8GiB", "num_pages": 2, "max_model_len": 3,
        "max_running": 4, "max_batch_tokens": 5, "max_waiting": 6, "metrics_port": 7, "log_level": "debug",
        "swap_space": "1GiB", "cache_dir": "/tmp/pages", "cache_dir_space": "2GiB", "metrics_host": "::1",
        "log_format": "json", "quantization": "fp8",
    }  # fmt: skip
    flags: list[str] = []
    for name, value in given.items():
        flags += [f"--{name.replace('_', '-')}", value[0] if isinstance(value, tuple) else str(value)]
    settings = settings_from(["some/model", "--insecure", "--isolate-keys", "--no-prefix-cache", "--eager", *flags])
    switches = {"insecure": True, "isolate_keys": True, "prefix_cache": False, "eager": True}
    assert settings.model_dump() == given | switches | {"model": "some/model"}
    assert settings.engine_config == EngineConfig(
        model="some/model", device="cpu", dtype="float32", backend="reference", preset="none", memory="8GiB",
        num_pages=2, max_model_len=3, max_running=4, max_batch_tokens=5, max_waiting=6, swap_space="1GiB",
        cache_dir="/tmp/pages", cache_dir_space="2GiB", prefix_cache=False, log_format="json", eager=True,
        quantization="fp8",
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--api-key", "a", "--api-key", "b"], ["--api-key", "a, b,"]])
def test_keys_may_be_repeated_or_separated_by_commas(arguments: list[str]) -> None:
    assert settings_from(arguments).api_key == ("a", "b")


def test_keys_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEAR_API_KEY", "a,b")
    assert settings_from([]).api_key == ("a", "b")


def test_the_file_may_be_toml_or_json(config_file: Path, tmp_path: Path) -> None:
    as_json = tmp_path / "server.json"
    as_json.write_text(json.dumps({"port": 1001, "max_running": 11, "preset": "file", "api-key": "a,b", "memory": 0.5}))
    assert resolve_settings({}, config_file) == resolve_settings({}, as_json)
    assert resolve_settings({}, as_json).memory == "0.5"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prot = 1", r'unknown key "prot"; the nearest valid key is "port"'),
        ("max-runing = 1", r'unknown key "max-runing"; the nearest valid key is "max_running"'),
        ("port = 70000", "port must be less than or equal to 65535, got 70000"),
        ('port = "many"', "port must be a valid integer.*, got 'many'"),
        ("max_running = 0", "max_running must be greater than or equal to 1, got 0"),
        ('log-level = "loud"', "log_level must be 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ("port = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        resolve_settings({}, path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nowhere\.toml cannot be read: No such file"):
        resolve_settings({}, tmp_path / "nowhere.toml")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.5", "example.com"])
def test_other_machines_need_a_key_or_an_explicit_permission(host: str) -> None:
    with pytest.raises(SettingsError, match=r"--api-key.*--insecure"):
        Settings(host=host).check_exposure()
    Settings(host=host, api_key=("key",)).check_exposure()
    Settings(host=host, insecure=True).check_exposure()


def test_keys_to_keep_apart_must_be_there() -> None:
    with pytest.raises(SettingsError, match=r"--isolate-keys.*--api-key"):
        Settings(isolate_keys=True).check_exposure()
    Settings(isolate_keys=True, api_key=("key",)).check_exposure()


def test_a_switch_may_be_set_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEAR_PREFIX_CACHE", "false")
    monkeypatch.setenv("GEAR_ISOLATE_KEYS", "1")
    assert settings_from([]).prefix_cache is False
    assert settings_from(["--prefix-cache"]).prefix_cache is True
    assert settings_from([]).isolate_keys is True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    Settings(host=host).check_exposure()


def test_a_model_in_a_folder_is_known_by_the_folders_name(tmp_path: Path) -> None:
    (tmp_path / "Tiny-1B").mkdir()
    (tmp_path / "tiny.Q4.gguf").touch()
    assert Settings(model=str(tmp_path / "Tiny-1B") + "/").model_names == ("Tiny-1B",)
    assert Settings(model=str(tmp_path / "tiny.Q4.gguf")).model_names == ("tiny.Q4",)
    assert Settings(model="org/Name").model_names == ("org/Name",)
    assert Settings(model="org/Name", served_model_name=("a", "b")).model_names == ("a", "b")
