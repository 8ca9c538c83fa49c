"""Commands that make outputs."""

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.cli.app import app, say, typed_errors
from engine.cli.options import (
    DEFAULT_FORMATS,
    AsJson,
    BoxOption,
    Compression,
    Degradation,
    DegradationOption,
    Device,
    Fidelity,
    Format,
    Formats,
    Inputs,
    LongSide,
    MaskOption,
    MaxMemory,
    MaxPixels,
    Model,
    Out,
    Page,
    Precision,
    PrecisionOption,
    Replace,
    Scale,
    ScaleOption,
    StripMetadata,
    TiffCompression,
    parse_local,
)
from engine.geometry import Box

if TYPE_CHECKING:
    from engine.request import Request


@app.command()
def restore(
    inputs: Inputs,
    out: Out,
    mask: MaskOption = "none",
    scale: ScaleOption = None,
    long_side: LongSide = None,
    box: BoxOption = None,
    model: Model = None,
    degradation: DegradationOption = Degradation.CLEAN,
    fidelity: Fidelity = None,
    formats: Formats = DEFAULT_FORMATS,
    precision: PrecisionOption = Precision.AUTO,
    device: Annotated[Device, typer.Option("--device", help="What the network runs on.")] = Device.CPU,
    max_memory: MaxMemory = None,
    max_pixels: MaxPixels = 1 << 30,
    page: Page = None,
    strip_metadata: StripMetadata = False,
    tiff_compression: TiffCompression = Compression.DEFLATE,
    replace: Replace = False,
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes on a Ray cluster; 0: here, above 64 pictures all cores.")
    ] = 0,
    address: Annotated[
        str | None, typer.Option("--address", help="Cluster: http://HEAD:8265 to submit there, auto from inside.")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try pictures again that were refused.")] = False,
    stall_after: Annotated[
        float, typer.Option("--stall-after", min=1, help="Seconds at one picture after which its process is ended.")
    ] = 600.0,
    gpu_share: Annotated[
        float, typer.Option("--gpu-share", min=0, max=1, help="Of a GPU, for each process of the workers.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Fill the holes of pictures and raise their detail."""
    from engine.batch.inputs import find_inputs
    from engine.batch.run import RAY_ABOVE, restore_all
    from engine.batch.work import Order, Workers
    from engine.console import Console, Meter, exit_code
    from engine.mask import DETECTED
    from engine.objects import Prefix, place

    if address is not None and address.startswith("http"):
        from engine.batch.cluster import submit

        raise typer.Exit(submit(address, _without_address(sys.argv[1:])))
    with typed_errors():
        request = _request(scale, long_side, box, precision, max_memory, page, strip_metadata, device)
        where = place(out)
        order = Order(
            where if isinstance(where, Path) else Path(tempfile.gettempdir()),
            request,
            tuple(dict.fromkeys(item.value for item in formats)),
            model,
            degradation.value,
            fidelity,
            tiff_compression.value,
            max_pixels,
            replace,
            where if isinstance(where, Prefix) else None,
            mask == DETECTED,
        )
        restorer = order.restorer()
        items = list(find_inputs(inputs, out=str(where), mask=mask))
        if not workers and (address is not None or (len(items) > RAY_ABOVE and order.remote is None)):
            workers = os.cpu_count() or 1
        with Console(num_pictures=len(items), as_json=as_json) as console:
            console.say(f"model {restorer.checkpoint.card.name}, degradation {restorer.checkpoint.card.degradation}")
            meter = Meter(console)
            ends: list[tuple[str, str | None]] = []
            for outcome in restore_all(
                items,
                order,
                restorer,
                workers=Workers(workers, address, stall_after, gpu_share) if workers else None,
                retry_failed=retry_failed,
                progress=meter,
                drawn=console.drawn,
            ):
                meter.close()
                console.tell(outcome)
                ends.append((outcome.status, outcome.reason))
    raise typer.Exit(exit_code(ends))


@app.command()
def plan(
    inputs: Inputs,
    out: Annotated[Path | None, typer.Option("--out", help="Where the outputs would go.")] = None,
    mask: MaskOption = "none",
    scale: ScaleOption = None,
    long_side: LongSide = None,
    box: BoxOption = None,
    model: Model = None,
    degradation: DegradationOption = Degradation.CLEAN,
    fidelity: Fidelity = None,
    formats: Formats = DEFAULT_FORMATS,
    precision: PrecisionOption = Precision.AUTO,
    max_memory: MaxMemory = None,
    max_pixels: MaxPixels = 1 << 30,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Several pictures: also for so many workers.")
    ] = None,
    speed: Annotated[float, typer.Option("--speed", min=0.001, help="Of a worker, in cores of this machine.")] = 1.0,
    page: Page = None,
    strip_metadata: StripMetadata = False,
    tiff_compression: TiffCompression = Compression.DEFLATE,
) -> None:
    """Say what a restoration would take, and write nothing."""
    from itertools import chain, islice

    from engine.batch.estimate import check_disk, core_rate, estimate, to_text
    from engine.batch.inputs import find_inputs
    from engine.console import describe_plan
    from engine.mask import DETECTED
    from engine.restoration import Restorer
    from engine.tiling.plan import validate

    with typed_errors():
        request = _request(scale, long_side, box, precision, max_memory, page, strip_metadata)
        restorer = Restorer(model=model, degradation=degradation.value, fidelity=fidelity, precision=precision.value)
        card, folder, detect = restorer.checkpoint.card, out or Path(), mask == DETECTED
        wanted = tuple(dict.fromkeys(fmt.value for fmt in formats))
        items = find_inputs(inputs, out=None if out is None else str(out), mask=mask)
        first = list(islice(items, 2))
        if len(first) == 1:
            job = first[0].job(
                folder, wanted, max_pixels=max_pixels, tiff_compression=tiff_compression.value, detect=detect
            )
            made, tiling, info = restorer.plan(job, request)
            for line in describe_plan(made, tiling, info, card, restorer.measured_rate()).split("\n"):
                say(line)
            validate(made, out=folder, max_memory_bytes=max_memory)
            return
        total = estimate(
            chain(first, items), request, card, out=folder, formats=wanted, max_pixels=max_pixels, detect=detect
        )
        here, core = restorer.measured_rate(), core_rate(restorer)
        typer.echo(to_text(total, out=folder, here_per_s=here, core_per_s=core, num_workers=workers, speed=speed))
        check_disk(total, folder, num_workers=workers or 1)
    raise typer.Exit(total.exit_code)


@app.command("mask")
def find_damage(
    inputs: Inputs,
    out: Annotated[Path, typer.Option("--out", help="Folder.", parser=parse_local, metavar="DIR")],
    model: Annotated[str, typer.Option("--model", help="Embedded name or .safetensors file.")] = "detector",
    threshold: Annotated[
        float | None, typer.Option("--threshold", min=0.01, max=0.99, help="Lower finds more; the model's by default.")
    ] = None,
    max_pixels: MaxPixels = 1 << 30,
    page: Page = None,
    replace: Replace = False,
    as_json: AsJson = False,
) -> None:
    """Write the masks of the damage that is found, to be edited and given back with --mask."""
    from engine.batch.inputs import find_inputs
    from engine.batch.work import Order, find_damage_of
    from engine.console import Console, exit_code
    from engine.detection import DamageDetector
    from engine.request import Request

    with typed_errors():
        order = Order(out, Request(page=page), (), max_pixels=max_pixels, replace=replace)
        items, detector = list(find_inputs(inputs, out=str(out))), DamageDetector(model, threshold=threshold)
        with Console(num_pictures=len(items), as_json=as_json) as console:
            ends: list[tuple[str, str | None]] = []
            for item in items:
                outcome = find_damage_of(item, order, detector)
                console.tell(outcome)
                ends.append((outcome.status, outcome.reason))
    raise typer.Exit(exit_code(ends))


@app.command()
def export(
    canvas: Annotated[
        str, typer.Argument(help="A finished .zarr, or the URL of a receipt (s3://…/NAME.json).", show_default=False)
    ],
    formats: Annotated[list[Format], typer.Option("--format", help="May be given more than once.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder; beside the canvas where it is not given.", parser=parse_local, metavar="DIR"
        ),
    ] = None,
    tiff_compression: TiffCompression = Compression.DEFLATE,
    replace: Replace = False,
) -> None:
    """Write a finished canvas in another format."""
    from engine.objects import Prefix, place
    from engine.restoration import export_finished

    wanted = tuple(dict.fromkeys(item.value for item in formats))
    if Format.OME_ZARR.value in wanted:
        raise typer.BadParameter("a canvas is OME-Zarr already; choose another", param_hint="--format")
    with typed_errors():
        source = place(canvas)
        if isinstance(source, Prefix) and out is None:
            raise typer.BadParameter("a folder is needed for what comes from an object store", param_hint="--out")
        for path in export_finished(
            source,
            out=out or Path(canvas).parent,
            formats=wanted,
            tiff_compression=tiff_compression.value,
            replace=replace,
        ):
            say(str(path))


def _without_address(arguments: list[str]) -> list[str]:
    """The command line again, without the option that sent it elsewhere."""
    kept = [word for word in arguments if not word.startswith("--address=")]
    if "--address" in kept:
        at = kept.index("--address")
        del kept[at : at + 2]
    return kept


def _request(
    scale: Scale | None,
    long_side: int | None,
    box: Box | None,
    precision: Precision,
    max_memory: int | None,
    page: int | None,
    strip_metadata: bool,
    device: Device = Device.CPU,
) -> "Request":
    from engine.request import Request

    if scale is not None and long_side is not None:
        raise typer.BadParameter("give --scale or --long-side, not both", param_hint="--scale")
    return Request(
        scale=int((scale or Scale.X1).value),
        long_side_px=long_side,
        box=box,
        precision=precision.value,
        device=device.value,
        max_memory_bytes=max_memory,
        page=page,
        strip_metadata=strip_metadata,
    )
