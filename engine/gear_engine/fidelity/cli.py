"""`gear-fidelity`: what each preset changes, for your model and your text.

The real page format runs through the engine's own attention, against the uncompressed float32 model.
"""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def fidelity(
    model: Annotated[str | None, typer.Argument(help="A model folder, a .gguf file or a hub name.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text to compare on; may be repeated.")] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="What to compare, presets or baselines; may be repeated. Default: all.")
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of each text.", min=64)] = 2048,
    num_texts: Annotated[int, typer.Option(help="Texts, spread over all there is.", min=1)] = 4,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw bits against KL into this PNG.")] = None,
) -> None:
    """Compare KV caches with the exact model on real text: KL divergence, top-1 agreement, perplexity."""
    for file in (json, plot):
        _check_writable(file)
    from gear_compression.config import ConfigError
    from gear_engine.fidelity.run import run
    from gear_engine.fidelity.texts import TextError
    from gear_engine.protocol import EngineStartError

    try:
        report = run(model, text or [], preset, context, num_texts)
    except (ConfigError, EngineStartError, TextError) as error:
        _fail(str(error))
    from dataclasses import asdict

    import orjson
    from rich.console import Console

    from gear_engine.fidelity.report import plot as draw
    from gear_engine.fidelity.report import table

    Console().print(table(report))
    if json:
        json.write_bytes(orjson.dumps(asdict(report), option=orjson.OPT_INDENT_2))
    if plot:
        draw(report, plot)
    if report.interrupted:
        raise typer.Exit(130)


def _check_writable(file: Path | None) -> None:
    """Before an hour of work, not after it."""
    if file is None:
        return
    try:
        with file.open("ab"):
            pass
    except OSError as error:
        _fail(f"cannot write {file}: {error.strerror}; choose another path")


def _fail(message: str) -> NoReturn:
    print(f"gear-fidelity: {message}", file=sys.stderr)
    raise typer.Exit(2)


def main() -> None:
    app()
