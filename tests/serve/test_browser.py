"""The page in a real Chromium: dropped, painted, watched, zoomed, compared, downloaded."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.serve.conftest import picture

pytestmark = pytest.mark.timeout(600)
REPOSITORY = Path(__file__).resolve().parents[2]
WALK = Path(__file__).with_name("browser")
OFFLINE = "ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENOTCACHED|[Cc]ould not resolve"


@pytest.fixture(scope="module")
def node() -> str:
    """Where node is; what the page and the walk need is installed from their lock files."""
    found = shutil.which("node")
    if found is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm, for OpenSeadragon and a Chromium")
    for command, folder in (
        (["make", "viewer"], REPOSITORY),
        (["npm", "ci", "--silent", "--no-audit", "--no-fund", "--prefer-offline"], WALK),
    ):
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        if re.search(OFFLINE, ended.stderr):
            pytest.skip(f"{' '.join(command)} needs the network: {ended.stderr[-300:]}")
        assert ended.returncode == 0, ended.stderr[-3000:]
    return found


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_a_curator_restores_a_picture(service, node, tmp_path, width, height):
    image = tmp_path / "scan.png"
    cv2.imwrite(str(image), picture(512, 512, seed=width))
    command = [node, "walk.mjs", service.url, str(image), str(tmp_path), str(width), str(height)]
    ended = subprocess.run(command, cwd=WALK, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["errors"] == []
    assert seen["foreign"] == []  # nothing comes from elsewhere
    assert seen["shares"] == sorted(seen["shares"])
    assert any(0 < share < 1 for share in seen["shares"])  # the progress was seen
    assert seen["zoom"] == pytest.approx(1.0, rel=1e-3)
    assert seen["full"] >= 2
    assert seen["slider"] == {"value": pytest.approx(200, abs=60), "changed": True}
    assert seen["download"] == "scan-restored.tif"
    assert not seen["wide"]  # nothing to be scrolled sideways
    restored = cv2.imread(str(tmp_path / "download.tif"), cv2.IMREAD_UNCHANGED)
    assert restored.shape == (8192, 8192, 3)
    assert np.abs(cv2.resize(restored, (64, 64), interpolation=cv2.INTER_AREA).astype(int)).max() > 0
