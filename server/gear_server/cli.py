"""The command `gear-serve`: flags and their environment variables, explained; everything else is imported late.

`--help` answers in a blink because neither FastAPI nor the engine's client is imported for it.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gear_engine.config import DEFAULT_MODEL, EngineConfig

_engine = EngineConfig()  # whose defaults the help shows

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _option(name: str, help: str, default: object = None, **more: Any) -> Any:
    """An option that is also GEAR_… in the environment; unset, it leaves the word to the config file."""
    variable = "GEAR_" + name.partition("/")[0].removeprefix("--").replace("-", "_").upper()
    text = help if default is None else f"{help} Default: {default}."
    return typer.Option(name, envvar=variable, help=text, show_default=False, **more)


def _print_version(wanted: bool) -> None:
    if wanted:
        from gear_server import version

        typer.echo(f"gear-serve {version()}")
        raise typer.Exit


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="GEAR_MODEL",
            help=f"A folder, a .gguf file or a name on the Hugging Face hub. Default: {DEFAULT_MODEL}, built in.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str | None, _option("--host", "Address to listen on.", "127.0.0.1")] = None,
    port: Annotated[int | None, _option("--port", "Port to listen on; 0 takes a free one.", 8000)] = None,
    api_key: Annotated[
        list[str] | None,
        _option("--api-key", "Key that clients must send (Bearer or X-API-Key); repeat it or separate keys by commas."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        _option("--served-model-name", "Name that requests use for the model, instead of its own; may be repeated."),
    ] = None,
    device: Annotated[
        str | None, _option("--device", "Where the model runs: cpu, cuda or auto.", _engine.device)
    ] = None,
    dtype: Annotated[
        str | None,
        _option(
            "--dtype",
            "Type of weights and activations: float32, bfloat16 or auto. auto: bfloat16 on a GPU; on a CPU float32, "
            "with weights in bfloat16 for decoding or prompts where a short trial at start finds that faster.",
            _engine.dtype,
        ),
    ] = None,
    quantization: Annotated[
        str | None,
        _option(
            "--quantization",
            "fp8: on a GPU, linear layers of a model that is not quantised multiply in 8 bits, at half the memory; "
            "their inputs are rounded too. none: weights as they are in the checkpoint.",
            _engine.quantization,
        ),
    ] = None,
    backend: Annotated[
        str | None, _option("--backend", "How compressed pages are written and read.", _engine.backend)
    ] = None,
    preset: Annotated[
        str | None, _option("--preset", "How keys and values are stored: a name, or a preset file.", _engine.preset)
    ] = None,
    memory: Annotated[
        str | None,
        _option("--memory", "Memory to use: a fraction such as 0.8 or a size such as 8GiB.", _engine.memory),
    ] = None,
    num_pages: Annotated[
        int | None, _option("--num-pages", "Pages in the pool, instead of what --memory allows.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        _option("--max-model-len", "Longest prompt and answer together, in tokens; default: what the model allows."),
    ] = None,
    max_running: Annotated[
        int | None, _option("--max-running", "Sequences in a batch at most.", "64 on a CPU, 256 on a GPU")
    ] = None,
    max_batch_tokens: Annotated[
        int | None, _option("--max-batch-tokens", "Tokens in one step at most.", "512 on a CPU, 2048 on a GPU")
    ] = None,
    eager: Annotated[
        bool | None, _option("--eager/--no-eager", "On a GPU: compile no layers and capture no CUDA graphs.", "off")
    ] = None,
    max_waiting: Annotated[
        int | None, _option("--max-waiting", "Requests that may wait; one more gets 429.", _engine.max_waiting)
    ] = None,
    swap_space: Annotated[
        str | None,
        _option(
            "--swap-space",
            "Host memory for pages of requests that must wait: a size such as 2GiB, or 0 to compute them again; "
            "auto: up to 4GiB.",
            _engine.swap_space,
        ),
    ] = None,
    cache_dir: Annotated[
        str | None,
        _option(
            "--cache-dir",
            "Directory for cached prompts that memory has no room for, and that are to be there after a restart. "
            "It tells what prompts said: keep it private.",
        ),
    ] = None,
    cache_dir_space: Annotated[
        str | None, _option("--cache-dir-space", "What --cache-dir may take, such as 50GiB.", _engine.cache_dir_space)
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        _option(
            "--prefix-cache/--no-prefix-cache",
            "Keep pages of past requests for prompts that begin alike, until their space is needed.",
            "on",
        ),
    ] = None,
    config: Annotated[
        Path | None, _option("--config", "TOML or JSON file with these options as keys; flags and environment win.")
    ] = None,
    metrics_port: Annotated[
        int | None,
        _option("--metrics-port", "Serve /metrics and /health, without a key, on this port instead of the public one."),
    ] = None,
    metrics_host: Annotated[str | None, _option("--metrics-host", "Address of the metrics port.", "127.0.0.1")] = None,
    insecure: Annotated[
        bool | None, _option("--insecure", "Allow other machines to connect without an API key.", is_flag=True)
    ] = None,
    isolate_keys: Annotated[
        bool | None,
        _option("--isolate-keys", "Share cached prompts only among requests with the same API key.", is_flag=True),
    ] = None,
    log_level: Annotated[
        str | None, _option("--log-level", "How much to log: debug, info, warning or error.", "info")
    ] = None,
    log_format: Annotated[
        str | None, _option("--log-format", "text, or json: an object a line, with what became of a request.", "text")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve a language model from a GEAR-compressed KV cache, with OpenAI's API."""
    run(given_options(context.params), config)


def given_options(params: dict[str, Any]) -> dict[str, Any]:
    """What flags and environment say; the rest is left to the config file and the defaults."""
    own = ("config", "version")
    return {name: value for name, value in params.items() if name not in own and value not in (None, [], ())}


def run(options: dict[str, Any], config_file: Path | None) -> None:
    """Resolve the settings, take the port and serve until a signal; exits with one sentence if that cannot be."""
    from gear_server.settings import SettingsError, resolve_settings

    try:
        settings = resolve_settings(options, config_file)
        settings.check_exposure()
    except SettingsError as error:
        _fail(error, 2)

    import asyncio

    from gear_engine.client import EngineClient
    from gear_engine.log_format import configure_logging
    from gear_server.serving import StartError, bind_all, serve

    configure_logging(settings.log_level.upper(), settings.log_format)
    try:
        asyncio.run(serve(settings, bind_all(settings), EngineClient(settings.engine_config)))
    except StartError as error:
        _fail(error, 1)


def _fail(error: Exception, code: int) -> NoReturn:
    print(f"gear-serve: {error}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
