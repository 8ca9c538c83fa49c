"""The application itself: what all commands share."""

import errno
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from engine import __version__
from engine.errors import EXIT_FAILED, EXIT_REFUSED, EngineError, PlanError, printable

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Restore damaged pictures at any size.")
model_app = typer.Typer(no_args_is_help=True, help="Checkpoints and their cards.")
app.add_typer(model_app, name="model")


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


@contextmanager
def typed_errors() -> Generator[None]:
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
        say(f"{error.code}: {error}", to_stderr=True)
        raise typer.Exit(EXIT_REFUSED if isinstance(error, PlanError) else EXIT_FAILED) from None


def say(line: str, *, to_stderr: bool = False) -> None:
    """Prints one line, whatever names are in it, and whatever the terminal can show."""
    encoding = getattr(sys.stderr if to_stderr else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(printable(line).encode(encoding, "backslashreplace").decode(encoding), err=to_stderr)
