"""On PYTHONPATH, Python loads this in every process: each then notes the shards that it draws.

`ENGINE_NOTES` is a folder. Its file `shards` gets a line per step, `begun` or `drawn`, with process, plan and shard. A
process that finds the file `stop` there takes it away and stops itself when its shard is drawn and not yet stored;
where the file says `shared`, only one that has not the picture for itself.
"""

import os
import signal
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

WATCHED = "engine.tiling.execute"


class Finder(PathFinder):
    """Finds the one module as it is found otherwise, and wraps its `run` when it has been loaded."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ANN401
        if fullname != WATCHED:
            return None
        spec = super().find_spec(fullname, path, target)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            watch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch(module: ModuleType) -> None:
    """Has `run` note what it draws."""
    run, folder = module.run, Path(os.environ["ENGINE_NOTES"])

    def noting_run(canvas: Any, keys: Any, work: Any) -> Any:  # noqa: ANN401
        def noting(key: Any) -> Any:  # noqa: ANN401
            note(folder, f"begun {os.getpid()} {canvas.plan.plan_id} {key.name}\n")
            drawn = work(key)
            note(folder, f"drawn {os.getpid()} {canvas.plan.plan_id} {key.name}\n")
            stop_where_asked(folder, is_shared=not canvas.is_owned)
            return drawn

        return run(canvas, keys, noting)

    module.run = noting_run  # type: ignore[attr-defined]


def note(folder: Path, line: str) -> None:
    with (folder / "shards").open("a") as file:  # one short write at the end: lines of many processes do not mix
        file.write(line)


def stop_where_asked(folder: Path, *, is_shared: bool) -> None:
    with suppress(FileNotFoundError):
        if is_shared or (folder / "stop").read_text() != "shared":
            (folder / "stop").rename(folder / f"stopped-{os.getpid()}")
            os.kill(os.getpid(), signal.SIGSTOP)


if "ENGINE_NOTES" in os.environ:
    sys.meta_path.insert(0, Finder)
