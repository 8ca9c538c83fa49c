"""The command line: one verb per function, nothing else. Exit codes: 0 done, 2 usage, 3 some failed, 4 plan refused."""

import os

from engine.cli import pictures, keeping, training, service  # isort: skip  # each adds its commands, in this order
from engine.cli.app import app

__all__ = ["app", "keeping", "main", "pictures", "service", "training"]


def main() -> None:
    """The `engine` command."""
    # Threads of torch that wait for each other spin, and keep those of other processes from the cores that they want.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
