"""Restore damaged pictures at any size: holes filled, detail raised, out of core.

The public names load on first use, so that ``import engine`` needs neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.restoration import restore as restore

__all__ = ["restore"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module("engine.restoration"), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
