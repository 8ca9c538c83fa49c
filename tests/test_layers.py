"""The architecture's own tests: what loads what."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _loaded_by(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after `statement`."""
    program = f"import sys; {statement}; sys.stdout.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_engine_loads_neither_torch_nor_ray():
    loaded = _loaded_by("import engine; engine.__version__")
    assert "engine" in loaded
    assert not loaded & {"torch", "ray", "zarr", "cv2", "numpy"}


@pytest.mark.parametrize("module", ["engine.image", "engine.mask", "engine.tiling.canvas", "engine.tiling.plan"])
def test_pictures_and_storage_load_neither_torch_nor_ray(module):
    loaded = _loaded_by(f"import {module}")
    assert module in loaded
    assert not loaded & {"torch", "ray"}


def test_the_layers_hold():
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout
