"""`gear-plan`: what would fit, before anything is downloaded onto a server or taken from it."""

from typing import Annotated

import typer

from gear_engine.config import EngineConfig
from gear_engine.protocol import EngineStartError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="A model folder, a .gguf file or a hub name.")] = None,
    preset: Annotated[str, typer.Option(help="How pages are stored: a name, or a preset file.")] = "near-lossless",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or auto, as for gear-serve.")] = "auto",
    quantization: Annotated[str, typer.Option(help="none, or fp8: 8-bit weights, as for gear-serve.")] = "none",
    memory: Annotated[str, typer.Option(help="A fraction of the machine's memory, or a size such as 8GiB.")] = "auto",
    swap_space: Annotated[
        str, typer.Option(help="Host memory to swap pages out to: a size such as 2GiB, or 0.")
    ] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and answer.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Sequences in a batch; 64 on a CPU, 256 on a GPU.")] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens in a step; 512 on a CPU, 2048 on a GPU.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto: a GPU where there is one.")] = "auto",
) -> None:
    """Print the memory table that gear-serve would start with."""
    from gear_engine.start import planned_memory

    config = EngineConfig(
        model=model,
        preset=preset,
        dtype=dtype,
        quantization=quantization,
        memory=memory,
        swap_space=swap_space,
        max_model_len=max_model_len,
        max_running=max_running,
        device=device,
        max_batch_tokens=max_batch_tokens,
    )
    try:
        typer.echo(planned_memory(config).table(preset))
    except EngineStartError as error:
        typer.echo(f"gear-plan: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    app()
