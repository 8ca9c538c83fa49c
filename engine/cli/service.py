"""Commands for the endpoint and its page."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from engine.cli.app import app, say, typed_errors
from engine.cli.options import Model, parse_bytes, parse_span


@app.command()
def serve(
    store: Annotated[Path, typer.Option("--store", help="Folder for what is accepted and made.")] = Path("store"),
    host: Annotated[str, typer.Option("--host", help="Address to listen on; another than loopback needs --keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option("--keys", help="File of keys, see `engine key`.")] = None,
    max_pixels: Annotated[int, typer.Option("--max-pixels", min=1, help="Of an input.")] = 1 << 28,
    max_queue: Annotated[float, typer.Option("--max-queue", min=1, help="Megapixels of output that may wait.")] = 2e4,
    replicas: Annotated[str, typer.Option("--replicas", metavar="MIN:MAX", help="Processes that restore.")] = "1:2",
    retention_days: Annotated[
        float, typer.Option("--retention-days", min=0, help="Ended pictures are kept so long.")
    ] = 7,
    model: Model = None,
) -> None:
    """Restore pictures that are sent over HTTP, and show them while they are restored."""
    from engine.serve.desk import Limits
    from engine.serve.server import serve as run_service

    logging.getLogger("engine.serve").setLevel(logging.INFO)  # a line for each request
    span = parse_span(replicas, "--replicas")
    limits = Limits(max_pixels=max_pixels, max_queue_megapixels=max_queue, retention_s=86400 * retention_days)
    with typed_errors():
        run_service(
            store,
            host=host,
            port=port,
            keys_file=keys,
            limits=limits,
            replicas=span,
            model=model,
            told=lambda address: say(
                f"{address} serves {store}; Ctrl-C ends it, and what it has accepted goes on when it is back"
            ),
        )


@app.command()
def view(
    canvas: Annotated[Path, typer.Argument(help="A finished OME-Zarr, such as restored/scan.zarr.")],
    image: Annotated[Path | None, typer.Option("--image", help="What it was made from, to be shown beside it.")] = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Its mask: a file, or a folder of masks.")] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
) -> None:
    """Look at a finished picture in the browser, on this machine alone."""
    from engine.serve.showing import show

    with typed_errors():
        show(canvas, say, image=image, mask=mask, port=port)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Annotated[Path, typer.Option("--keys", help="File of keys; made where it is missing.")],
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", parser=parse_bytes, metavar="50GB", help="Of its pictures.")
    ] = None,
) -> None:
    """Make a key for `engine serve` and print it; only its hash is stored."""
    from engine.serve.keys import MAX_BYTES, add_key

    with typed_errors():
        typer.echo(add_key(keys, name, max_bytes=max_bytes or MAX_BYTES))
