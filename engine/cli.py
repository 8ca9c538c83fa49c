"""The command line: one verb per function, nothing else. Exit codes: 0 done, 2 usage, 3 some failed, 4 plan refused."""

import errno
import json
import logging
import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine import __version__
from engine.errors import EXIT_FAILED, EXIT_REFUSED, EngineError, PlanError, printable
from engine.geometry import Box

if TYPE_CHECKING:
    from engine.request import Request

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Restore damaged pictures at any size.")
model_app = typer.Typer(no_args_is_help=True, help="Checkpoints and their cards.")
app.add_typer(model_app, name="model")


class Scale(StrEnum):
    """Enlargements of the network."""

    X1 = "1"
    X2 = "2"
    X4 = "4"
    X8 = "8"
    X16 = "16"


class Format(StrEnum):
    OME_ZARR = "ome-zarr"
    TIFF = "tiff"
    PNG = "png"
    JPEG = "jpeg"
    JP2 = "jp2"
    IIIF = "iiif"


class Compression(StrEnum):
    """Of TIFF; all lossless."""

    NONE = "none"
    LZW = "lzw"
    DEFLATE = "deflate"
    ZSTD = "zstd"


class Precision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Degradation(StrEnum):
    CLEAN = "clean"
    SCAN = "scan"


def _parse_bytes(text: str) -> int:
    """`4GB`, `512MB`, `1.5GiB` or a number of bytes."""
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "b": 1}
    lowered = text.strip().lower()
    unit = next((u for u in sorted(units, key=len, reverse=True) if lowered.endswith(u)), "")
    try:
        num_bytes = int(float(lowered.removesuffix(unit)) * units.get(unit, 1))
        if num_bytes > 0:
            return num_bytes
        raise ValueError
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{text!r} is not a size; write 4GB, 512MB or a number of bytes") from None


def _parse_box(text: str) -> Box:
    """`y,x,h,w` in input pixels."""
    try:
        y, x, h, w = (int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not y,x,h,w: four whole numbers with commas") from None
    return Box(y, x, y + h, x + w)


def _parse_local(text: str) -> Path:
    """A folder of this machine; what needs one says so, instead of looking for a folder called `s3:`."""
    if text.startswith("s3://"):
        raise typer.BadParameter(f"{text} is on an object store; copy the outputs to a folder first")
    return Path(text)


Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Pictures (PNG, JPEG, TIFF, WebP, JPEG 2000, OME-Zarr), folders with all below them, quoted patterns "
        "(** for sub-folders), lists (.txt, one path a line) or s3://bucket/prefix.",
        show_default=False,
    ),
]
Out = Annotated[
    str,
    typer.Option(
        "--out", help="For the outputs; a folder is made where it is missing.", metavar="DIR|s3://BUCKET/PREFIX"
    ),
]
LocalFolder = Annotated[
    Path, typer.Argument(help="Folder of finished outputs.", parser=_parse_local, metavar="DIR", show_default=False)
]
MaskOption = Annotated[
    str,
    typer.Option("--mask", help="Mask file (non-zero = missing), a folder of masks, or none.", metavar="FILE|DIR|none"),
]
ScaleOption = Annotated[Scale | None, typer.Option("--scale", help="Enlargement.")]
LongSide = Annotated[int | None, typer.Option("--long-side", min=1, help="Long side of the output in pixels.")]
BoxOption = Annotated[
    Box | None, typer.Option("--box", parser=_parse_box, metavar="y,x,h,w", help="Restore one region, input pixels.")
]
Model = Annotated[str | None, typer.Option("--model", help="Embedded name or .safetensors file.")]
DegradationOption = Annotated[Degradation, typer.Option("--degradation", help="What the picture went through.")]
Formats = Annotated[list[Format], typer.Option("--format", help="May be given more than once.")]
PrecisionOption = Annotated[Precision, typer.Option("--precision", help="auto is fp32.")]
MaxMemory = Annotated[
    int | None, typer.Option("--max-memory", parser=_parse_bytes, metavar="4GB", help="Limit of one process.")
]
Page = Annotated[int | None, typer.Option("--page", min=0, help="Page of a TIFF with several, counted from 0.")]
StripMetadata = Annotated[
    bool, typer.Option("--strip-metadata", help="Carry the colour profile, but no EXIF, XMP, IPTC or resolution.")
]
TiffCompression = Annotated[Compression, typer.Option("--tiff-compression", help="Of TIFF outputs; all lossless.")]
Replace = Annotated[bool, typer.Option("--replace", help="Swap earlier outputs of another plan.")]
MaxPixels = Annotated[int, typer.Option("--max-pixels", min=1, help="Refuse inputs with more pixels than this.")]
DEFAULT_FORMATS = [Format.OME_ZARR, Format.PNG]


@app.callback(invoke_without_command=True)
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more to stderr.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr
    )
    if version:
        typer.echo(__version__)
        raise typer.Exit


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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per picture on stdout.")] = False,
) -> None:
    """Fill the holes of pictures and raise their detail."""
    from engine.batch.inputs import find_inputs
    from engine.batch.run import RAY_ABOVE, restore_all
    from engine.batch.work import Order, Workers
    from engine.console import Console, Meter, exit_code
    from engine.objects import Prefix, place

    if address is not None and address.startswith("http"):
        from engine.batch.cluster import submit

        raise typer.Exit(submit(address, _without_address(sys.argv[1:])))
    with _typed_errors():
        request = _request(scale, long_side, box, precision, max_memory, page, strip_metadata, device)
        where = place(out)
        order = Order(
            where if isinstance(where, Path) else Path(tempfile.gettempdir()),
            request,
            tuple(dict.fromkeys(item.value for item in formats)),
            model,
            degradation.value,
            tiff_compression.value,
            max_pixels,
            replace,
            where if isinstance(where, Prefix) else None,
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
    from engine.restoration import Restorer
    from engine.tiling.plan import validate

    with _typed_errors():
        request = _request(scale, long_side, box, precision, max_memory, page, strip_metadata)
        restorer = Restorer(model=model, degradation=degradation.value, precision=precision.value)
        card, folder = restorer.checkpoint.card, out or Path()
        wanted = tuple(dict.fromkeys(fmt.value for fmt in formats))
        items = find_inputs(inputs, out=None if out is None else str(out), mask=mask)
        first = list(islice(items, 2))
        if len(first) == 1:
            job = first[0].job(folder, wanted, max_pixels=max_pixels, tiff_compression=tiff_compression.value)
            made, tiling, info = restorer.plan(job, request)
            for line in describe_plan(made, tiling, info, card, restorer.measured_rate()).split("\n"):
                _say(line)
            validate(made, out=folder, max_memory_bytes=max_memory)
            return
        total = estimate(chain(first, items), request, card, out=folder, formats=wanted, max_pixels=max_pixels)
        here, core = restorer.measured_rate(), core_rate(restorer)
        typer.echo(to_text(total, out=folder, here_per_s=here, core_per_s=core, num_workers=workers, speed=speed))
        check_disk(total, folder, num_workers=workers or 1)
    raise typer.Exit(total.exit_code)


@app.command()
def export(
    canvas: Annotated[
        str, typer.Argument(help="A finished .zarr, or the URL of a receipt (s3://…/NAME.json).", show_default=False)
    ],
    formats: Annotated[list[Format], typer.Option("--format", help="May be given more than once.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder; beside the canvas where it is not given.", parser=_parse_local, metavar="DIR"
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
    with _typed_errors():
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
            _say(str(path))


@app.command()
def verify(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Folders of outputs, canvases or receipts; s3://… prefixes or receipts.", show_default=False
        ),
    ],
) -> None:
    """Read every stored byte again; what is damaged is struck, and the next `restore` makes it anew."""
    from engine.objects import place
    from engine.upkeep import verify_outputs

    bad = 0
    with _typed_errors():
        for verdict in verify_outputs([place(path) for path in paths]):
            bad += not verdict.intact
            note = f" ({verdict.note})" if verdict.note else ""
            _say(f"{verdict.path}: {'intact' if verdict.intact else 'damaged'}{note}")
            for problem in verdict.problems:
                _say(f"  {problem.name}: {problem.kind}")
    raise typer.Exit(EXIT_FAILED if bad else 0)


@app.command()
def sign(
    out: LocalFolder,
    certificates: Annotated[
        Path, typer.Option("--certificate", help="PEM: the signer's certificate, then its intermediates.")
    ],
    key: Annotated[Path, typer.Option("--key", help="PEM: its private key, without a password.")],
) -> None:
    """Write a C2PA manifest beside every TIFF, PNG and JPEG output."""
    from engine.credentials import sign_outputs

    with _typed_errors():
        for path in sign_outputs(out, certificates=certificates, key=key):
            _say(str(path))


@app.command()
def bag(
    out: LocalFolder,
    folder: Annotated[Path, typer.Argument(metavar="BAG", help="The bag to make.", show_default=False)],
    organization: Annotated[str | None, typer.Option("--organization", help="Source-Organization of the bag.")] = None,
) -> None:
    """Make a BagIt bag of a folder of outputs, with PREMIS and METS for every picture."""
    from engine.bag import make_bag

    information = {} if organization is None else {"Source-Organization": organization}
    with _typed_errors():
        _say(str(make_bag(out, folder, information=information)))


@app.command()
def clean(
    out: Annotated[str, typer.Argument(help="Folder of outputs, or s3://BUCKET/PREFIX.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
) -> None:
    """List what killed runs left behind; with --yes, remove it."""
    from engine import leftovers, remote
    from engine.objects import Prefix, place

    with _typed_errors():
        where = place(out)
        if isinstance(where, Prefix):
            unnamed = remote.stale(where)
            listed = remote.clean(where, unnamed) if yes else unnamed
        else:
            stale = leftovers.stale(where)
            listed = leftovers.clean(stale) if yes else stale
        for leftover in listed:
            _say(f"{leftover.path}: {leftover.sort}, {leftover.num_bytes:,} bytes{', removed' if yes else ''}")


@app.command()
def status(
    out: LocalFolder,
    html: Annotated[bool, typer.Option("--html", help="Write a page with pictures, and print where it is.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    reviews: Annotated[
        Path | None, typer.Option("--reviews", help="CSV of the curators: name, review, note.", metavar="FILE.csv")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="First make a lost catalog again from receipts.")] = False,
) -> None:
    """Say how far a batch is, and what could not be restored."""
    with _typed_errors():
        from engine.batch.page import write_html
        from engine.batch.rebuild import rebuild as rebuild_catalog
        from engine.batch.report import status as status_of
        from engine.batch.report import to_json, to_text
        from engine.batch.reviews import import_reviews

        if rebuild:
            typer.echo(f"{rebuild_catalog(out):,} pictures added from their receipts", err=True)
        if reviews is not None:
            typer.echo(f"{import_reviews(out, reviews):,} reviews stored", err=True)
        if html:
            typer.echo(write_html(out))
        else:
            found = status_of(out)
            typer.echo(json.dumps(to_json(found)) if as_json else to_text(found))


@app.command()
def train(
    data: Annotated[Path, typer.Option("--data", help="Folder of pictures under an open licence.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the same folder resumes it.")],
    data_licence: Annotated[str, typer.Option("--data-licence", help="Of the pictures, for the card.")],
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
        Path | None, typer.Option("--start-from", help="Weights (.safetensors) to start from.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option("--features", help="torchvision's weights of VGG19, where the recipe compares them.")
    ] = None,
    workers: Annotated[
        str | None, typer.Option("--workers", metavar="N|MIN:MAX", help="Processes that train together, by Ray Train.")
    ] = None,
    address: Annotated[str | None, typer.Option("--address", help="Of a Ray cluster; a local one by default.")] = None,
) -> None:
    """Train a recipe; stops cleanly on a signal, and the same command goes on."""
    import torch

    from engine.train.recipes import RECIPES
    from engine.train.run import Run, finish
    from engine.train.run import train as train_run

    if recipe not in RECIPES:
        raise typer.BadParameter(f"{recipe!r} is not one of {', '.join(RECIPES)}", param_hint="--recipe")
    least, _, most = (workers or "1").partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise typer.BadParameter(f"{workers!r} is not N or MIN:MAX with 1 at least", param_hint="--workers")
    logging.getLogger().setLevel(logging.INFO)
    torch.set_num_threads(threads)
    with _typed_errors():
        run = Run(RECIPES[recipe](), data, out, data_licence, device.value, start_from=start_from, vgg19=features)
        run = run.shortened(steps) if steps is not None else run
        chosen = tuple(stages or ())
        if workers is None:
            train_run(run, chosen)
        else:
            from engine.train.loop import train_on_ray

            count = (int(least), int(most)) if most else int(least)
            train_on_ray(run, chosen, workers=count, address=address, threads=threads)
        card = finish(run, threads=threads, workers=int(most or least))
    _say(f"{out / (recipe + '.safetensors')}: {card.parameters:,} parameters")


@model_app.command("list")
def model_list() -> None:
    """The embedded checkpoints."""
    from engine.models.checkpoint import embedded, read_card

    with _typed_errors():
        for name, path in embedded().items():
            card = read_card(path)
            scales = ", ".join(f"x{scale}" for scale in card.scales)
            typer.echo(
                f"{name}: {card.task}, {card.degradation}, {scales}, {card.parameters:,} parameters, "
                f"{path.stat().st_size:,} bytes, {card.licence}"
            )


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

    least, _, most = replicas.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise typer.BadParameter(f"{replicas!r} is not MIN:MAX with 1 at least", param_hint="--replicas")
    limits = Limits(max_pixels=max_pixels, max_queue_megapixels=max_queue, retention_s=86400 * retention_days)
    with _typed_errors():
        _say(f"http://{host}:{port}/ serves {store}; Ctrl-C ends it, and what it has accepted goes on when it is back")
        run_service(
            store,
            host=host,
            port=port,
            keys_file=keys,
            limits=limits,
            replicas=(int(least), int(most)),
            model=model,
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

    with _typed_errors():
        show(canvas, _say, image=image, mask=mask, port=port)


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: Annotated[Path, typer.Option("--keys", help="File of keys; made where it is missing.")],
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", parser=_parse_bytes, metavar="50GB", help="Of its pictures.")
    ] = None,
) -> None:
    """Make a key for `engine serve` and print it; only its hash is stored."""
    from engine.serve.keys import MAX_BYTES, add_key

    with _typed_errors():
        typer.echo(add_key(keys, name, max_bytes=max_bytes or MAX_BYTES))


@app.command()
def doctor() -> None:
    """Check this installation: libraries, embedded models, and that a tile equals the whole."""
    from engine.doctor import diagnose

    healthy = True
    for line, good in diagnose():
        typer.echo(f"{'ok  ' if good else 'BAD '} {line}")
        healthy = healthy and good
    raise typer.Exit(0 if healthy else EXIT_FAILED)


@contextmanager
def _typed_errors() -> Generator[None]:
    """An error that stops everything: its sentence on stderr, and its exit code."""
    try:
        try:
            yield
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            from engine.store import storage_error

            raise storage_error(error, Path(error.filename)) from error
    except EngineError as error:
        _say(f"{error.code}: {error}", to_stderr=True)
        raise typer.Exit(EXIT_REFUSED if isinstance(error, PlanError) else EXIT_FAILED) from None


def _without_address(arguments: list[str]) -> list[str]:
    """The command line again, without the option that sent it elsewhere."""
    kept = [word for word in arguments if not word.startswith("--address=")]
    if "--address" in kept:
        at = kept.index("--address")
        del kept[at : at + 2]
    return kept


def _say(line: str, *, to_stderr: bool = False) -> None:
    """Prints one line, whatever names are in it, and whatever the terminal can show."""
    encoding = getattr(sys.stderr if to_stderr else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=to_stderr)


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


def main() -> None:
    """The `engine` command."""
    app()


if __name__ == "__main__":
    main()
