"""Commands for checkpoints."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from engine.cli.app import app, model_app, say, typed_errors
from engine.cli.options import Device, Graph, parse_span

Exported = Annotated[str, typer.Option("--model", help="Embedded name or .safetensors file.")]
Enlargement = Annotated[int, typer.Option("--scale", help="Of the enlargement.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder.")]
Overwrite = Annotated[bool, typer.Option("--replace", help="Overwrite what exists.")]


@app.command()
def train(
    data: Annotated[
        str,
        typer.Option("--data", help="Pictures under an open licence, also in tars.", metavar="DIR|s3://BUCKET/PREFIX"),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the same folder resumes it.")],
    data_licence: Annotated[str, typer.Option("--data-licence", help="Of the pictures, for the card.")],
    licence: Annotated[
        str | None, typer.Option("--licence", help="Of the weights, for the card; by default that of the pictures.")
    ] = None,
    recipe: Annotated[str, typer.Option("--recipe", help="Name of the recipe.")] = "lite",
    stages: Annotated[
        list[str] | None, typer.Option("--stage", help="Only these stages, in the recipe's order.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Of the whole run, shared among its stages as the recipe does.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each process.")] = 1,
    device: Annotated[Device, typer.Option("--device", help="What the network runs on.")] = Device.CPU,
    start_from: Annotated[
        str | None, typer.Option("--start-from", help="Model (name or file) whose weights to start from.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="torchvision's weights of VGG19, where the recipe compares them.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="Model (name or file) that the recipe's student learns from.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Gradient checkpointing: less memory, more time.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="By torch.compile, which needs a C++ compiler.")] = False,
    workers: Annotated[
        str | None, typer.Option("--workers", metavar="N|MIN:MAX", help="Processes that train together, by Ray Train.")
    ] = None,
    address: Annotated[str | None, typer.Option("--address", help="Of a Ray cluster; a local one by default.")] = None,
) -> None:
    """Train a recipe; stops cleanly on a signal, and the same command goes on."""
    import torch

    from engine.objects import place
    from engine.train.checkpoints import owned
    from engine.train.recipes import RECIPES
    from engine.train.run import Run, finish, unfinished
    from engine.train.run import train as train_run

    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe!r} is not one of {', '.join(RECIPES)}", param_hint="--recipe")
    asked = workers or "1"
    span = parse_span(asked if ":" in asked else f"{asked}:{asked}", "--workers")
    logging.getLogger().setLevel(logging.INFO)
    torch.set_num_threads(threads)
    with typed_errors(), owned(out):
        run = Run(
            RECIPES[recipe](),
            place(data),
            out,
            data_licence,
            licence,
            device.value,
            start_from=start_from,
            vgg19=features,
            teacher=teacher,
            recompute=recompute,
            compiled=compiled,
        )
        run = run.shortened(steps) if steps is not None else run
        chosen = tuple(stages or ())
        if workers is None:
            train_run(run, chosen)
        else:
            from engine.train.loop import train_on_ray

            train_on_ray(run, chosen, workers=span if ":" in asked else span[0], address=address, threads=threads)
        card = finish(run, threads=threads, workers=asked)
        left = unfinished(run, chosen)
    say(f"{out / (recipe + '.safetensors')}: {card.parameters:,} parameters")
    if left is not None:
        say(f"stopped: {left}; the same command goes on")


@model_app.command("list")
def model_list() -> None:
    """The embedded checkpoints."""
    from engine.models.card import embedded, read_card

    with typed_errors():
        for name, path in embedded().items():
            card = read_card(path)
            scales = ", ".join(f"x{scale}" for scale in card.scales)
            typer.echo(
                f"{name}: {card.task}, {card.degradation}, {scales}, {card.parameters:,} parameters, "
                f"{path.stat().st_size:,} bytes, {card.licence}"
            )


@model_app.command("export")
def model_export(
    to: Annotated[Graph, typer.Option("--to", help="Format.")],
    model: Exported = "lite",
    scale: Enlargement = 4,
    out: Folder = Path(),
    replace: Overwrite = False,
) -> None:
    """Write the enlargement as one graph for other programs; it is run there once and compared."""
    from engine.models.checkpoint import load
    from engine.models.export import export

    with typed_errors():
        path, difference = export(load(model), out, to=to.value, scale=scale, replace=replace)
    say(f"{path}: {path.stat().st_size:,} bytes, differs from torch by {difference:.1e} at most")


@model_app.command("quantize")
def model_quantize(
    data: Annotated[Path, typer.Option("--data", help="Folder of sharp pictures of the kind that is to come.")],
    model: Exported = "lite",
    scale: Enlargement = 4,
    out: Folder = Path(),
    replace: Overwrite = False,
) -> None:
    """Write the enlargement as ONNX in 8 bit integers, and tell what it loses on other crops of the pictures."""
    from engine.models.checkpoint import load
    from engine.train.quantize import quantize

    with typed_errors():
        path, loss_db = quantize(load(model), data, out, scale=scale, replace=replace)
    say(f"{path}: {path.stat().st_size:,} bytes, loses {loss_db:.3f} dB")
