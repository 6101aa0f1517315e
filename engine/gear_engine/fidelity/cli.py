"""`gear-fidelity`: what each preset changes, for your model and your text.

The real page format runs through the engine's own attention, against the uncompressed float32 model.
"""

import os
import sys
from collections.abc import Callable
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
    num_texts: Annotated[
        int | None, typer.Option(help="Texts, spread over all there is. Default: 4, to tune 2.", min=1)
    ] = None,
    ablation: Annotated[
        list[str] | None, typer.Option(help="Also this preset with its parts taken away; may be repeated.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to write freely after each fixed prompt; 0 leaves that out.", min=0)
    ] = 256,
    retrieval: Annotated[bool, typer.Option(help="Hide facts in the texts and ask for them.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw bits against KL into this PNG.")] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find the smallest format that meets --target-kl.")] = False,
    target_kl: Annotated[float | None, typer.Option(help="With --tune: the most KL, in nats, such as 0.002.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --tune: the preset file to write. Default: MODEL-klX.json here.")
    ] = None,
) -> None:
    """Compare KV caches with the exact model: KL divergence on real text, retrieval, error by layer, free writing.

    Ctrl-C ends it early and keeps what was measured. With --tune, find the smallest format, layer by layer, and write
    a preset file for gear-serve --preset FILE.
    """
    if tune or target_kl is not None or output:
        if preset or ablation or json or plot:
            _fail(
                "--tune compares with the shipped presets and writes one: drop --preset, --ablation, --json and --plot"
            )
        _tune(tune, model, text or [], target_kl, output, context, num_texts or 2)
        return
    for file in (json, plot):
        _check_writable(file)
    from gear_compression.config import ConfigError
    from gear_engine.fidelity.run import Request, run
    from gear_engine.fidelity.texts import TextError
    from gear_engine.protocol import EngineStartError

    try:
        report = run(
            Request(model, text or [], preset or [], ablation or [], context, num_texts or 4, new_tokens, retrieval)
        )
    except (ConfigError, EngineStartError, TextError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail(
            "interrupted before anything was measured: fewer presets (--preset) or a shorter --context go faster", 130
        )
    from rich.console import Console

    from gear_engine.fidelity.report import plot as draw
    from gear_engine.fidelity.report import tables, write_json

    console = Console()
    for table in tables(report):
        console.print(table, "")
    saved = [
        _saved(json, lambda file: write_json(report, file)),
        _saved(plot, lambda file: draw(report, file)),
    ]
    if not all(saved):
        raise typer.Exit(2)
    if report.interrupted:
        raise typer.Exit(130)


def _saved(file: Path | None, write: Callable[[Path], None]) -> bool:
    """Whether that worked. A full disk must not cost what was measured: it is on the screen already."""
    if file is None:
        return True
    try:
        write(file)
    except OSError as error:
        _say(f"cannot write {file}: {error.strerror}; the tables above are all that is kept. Make room and run again")
        return False
    return True


def _tune(
    tune: bool,
    model: str | None,
    text: list[Path],
    target_kl: float | None,
    output: Path | None,
    context: int,
    num_texts: int,
) -> None:
    if not tune or target_kl is None or not target_kl > 0:
        _fail("to tune, pass --tune and --target-kl with a number above 0, such as 0.002")
    from rich.console import Console

    from gear_engine.fidelity.texts import TextError
    from gear_engine.fidelity.tune import default_output, report, tune_model
    from gear_engine.fidelity.tune_search import TuneError
    from gear_engine.protocol import EngineStartError

    output = output or default_output(model, target_kl)
    if output.exists():
        _fail(f"{output} is there already: remove it or pass another --output")
    if not os.access(output.parent, os.W_OK):
        _fail(f"cannot write to {output.parent}: pass another --output")
    try:
        tuned = tune_model(model, text, target_kl, output, context, num_texts)
    except (EngineStartError, TextError, TuneError) as error:
        _fail(str(error))
    Console().print(report(tuned, target_kl))
    print(f"wrote {output}: gear-serve --preset {output}")
    if tuned.interrupted:
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


def _fail(message: str, status: int = 2) -> NoReturn:
    _say(message)
    raise typer.Exit(status)


def _say(message: str) -> None:
    print(f"gear-fidelity: {message}", file=sys.stderr)


def main() -> None:
    app()
