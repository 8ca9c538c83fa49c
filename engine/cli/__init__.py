"""The command line: one verb per function, nothing else. Exit codes: 0 done, 2 usage, 3 some failed, 4 plan refused."""

from engine.cli import pictures, keeping, training, service  # isort: skip  # each adds its commands, in this order
from engine.cli.app import app

__all__ = ["app", "keeping", "main", "pictures", "service", "training"]


def main() -> None:
    """The `engine` command."""
    app()
