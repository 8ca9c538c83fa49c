"""Probes every file of a folder in a process of its own, where no decoder and no other program may start.

Prints one JSON line: what each file was refused with, the processor seconds it took, and by how much the memory grew.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import imagecodecs
import pyvips
import tifffile

from engine.errors import EngineError
from engine.image import probe
from engine.memory import process_memory

_STARTING = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "os.spawn")
started: list[str] = []


def _watch(event: str, _: tuple[Any, ...]) -> None:
    if event in _STARTING:
        started.append(event)


def _decoder(*_: object, **__: object) -> NoReturn:
    started.append("decoder")
    raise AssertionError("a decoder was started")


def main(folder: Path) -> None:
    warm = folder / "warm.png"
    probe(warm)  # the libraries' own first use
    warm.unlink()
    for name in ("pngload_source", "jpegload_source", "tiffload_source", "webpload_source"):
        setattr(pyvips.Image, name, _decoder)
    imagecodecs.jpeg2k_decode = _decoder
    tifffile.TiffFile = _decoder
    sys.addaudithook(_watch)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: getrusage's is inherited and never falls
    before = process_memory("VmHWM")
    found: dict[str, tuple[str, str, float]] = {}
    for path in sorted(folder.iterdir()):
        seconds = math.inf
        for _ in range(3):  # the least: on a busy machine the processor itself is slower
            begun = time.process_time()
            try:
                code, said = "accepted", str(probe(path))
            except EngineError as error:
                code, said = error.code, str(error)
            except Exception as error:
                code, said = "untyped", repr(error)
            seconds = min(seconds, time.process_time() - begun)
        found[path.name] = (code, said, seconds)
    grown_bytes = process_memory("VmHWM") - before
    sys.stdout.write(json.dumps({"found": found, "started": started, "grown_bytes": grown_bytes}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
