"""Commands that look after outputs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from engine.cli.app import app, say, typed_errors
from engine.cli.options import LocalFolder
from engine.errors import EXIT_FAILED


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
    with typed_errors():
        for verdict in verify_outputs([place(path) for path in paths]):
            bad += not verdict.intact
            note = f" ({verdict.note})" if verdict.note else ""
            say(f"{verdict.path}: {'intact' if verdict.intact else 'damaged'}{note}")
            for problem in verdict.problems:
                say(f"  {problem.name}: {problem.kind}")
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

    with typed_errors():
        for path in sign_outputs(out, certificates=certificates, key=key):
            say(str(path))


@app.command()
def bag(
    out: LocalFolder,
    folder: Annotated[Path, typer.Argument(metavar="BAG", help="The bag to make.", show_default=False)],
    organization: Annotated[str | None, typer.Option("--organization", help="Source-Organization of the bag.")] = None,
) -> None:
    """Make a BagIt bag of a folder of outputs, with PREMIS and METS for every picture."""
    from engine.bag import make_bag

    information = {} if organization is None else {"Source-Organization": organization}
    with typed_errors():
        say(str(make_bag(out, folder, information=information)))


@app.command()
def clean(
    out: Annotated[str, typer.Argument(help="Folder of outputs, or s3://BUCKET/PREFIX.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
) -> None:
    """List what killed runs left behind; with --yes, remove it."""
    from engine import leftovers, remote
    from engine.objects import Prefix, place

    with typed_errors():
        where = place(out)
        if isinstance(where, Prefix):
            unnamed = remote.stale(where)
            listed = remote.clean(where, unnamed) if yes else unnamed
        else:
            stale = leftovers.stale(where)
            listed = leftovers.clean(stale) if yes else stale
        for leftover in listed:
            say(f"{leftover.path}: {leftover.sort}, {leftover.num_bytes:,} bytes{', removed' if yes else ''}")


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
    with typed_errors():
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
def doctor() -> None:
    """Check this installation: libraries, embedded models, and that a tile equals the whole."""
    from engine.doctor import diagnose

    healthy = True
    for line, good in diagnose():
        typer.echo(f"{'ok  ' if good else 'BAD '} {line}")
        healthy = healthy and good
    raise typer.Exit(0 if healthy else EXIT_FAILED)
