"""`engine view`: a finished output in the page of the service, before and after."""

import signal
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import requests

from engine.restoration import restore
from tests.serve.conftest import hole, picture, png


@pytest.mark.parametrize("beside", [True, False], ids=["with what it was made from", "alone"])
def test_a_finished_output_is_shown_and_nothing_else_is_taken(network, tmp_path, beside):
    image, mask = tmp_path / "scan.png", tmp_path / "scan.mask.png"
    image.write_bytes(png(picture()))
    mask.write_bytes(png(hole()))
    made = restore(image, out=tmp_path / "out", mask=mask, scale=4, model=str(network), formats=("ome-zarr", "png"))
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = cv2.imread(str(made.outputs[1]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "engine.cli", "view", str(made.outputs[0]), "--port", str(port)]
    command += ["--image", str(image), "--mask", str(mask)] if beside else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        line = running.stdout.readline().strip()
        url, _, job = line.partition("/#")
        job_id, _, token = job.partition(".")
        told = None
        for _ in range(200):
            try:
                told = requests.get(f"{url}/v1/restorations/{job_id}?token={token}", timeout=10).json()
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        assert told is not None
        assert (told["state"], told["width"], told["height"]) == ("done", 520, 360)
        assert set(told["links"]["iiif"]) == (
            {"restored", "original", "mask", "difference"} if beside else {"restored"}
        )
        for address in told["links"]["iiif"].values():
            assert requests.get(f"{url}{address}/full/max/0/default.png", timeout=30).ok
        whole = requests.get(f"{url}{told['links']['iiif']['restored']}/full/max/0/default.png", timeout=30)
        assert np.array_equal(cv2.imdecode(np.frombuffer(whole.content, np.uint8), cv2.IMREAD_COLOR), expected)
        for fmt in ("png", "ome-zarr"):
            assert requests.get(url + told["links"]["result"][fmt], timeout=30).ok
        for shard in (made.outputs[0] / "0" / "c").rglob("[0-9]"):
            if shard.is_file():
                shard.unlink()
        kept = requests.get(whole.url, timeout=30)  # from memory
        assert (kept.content, kept.headers["ETag"]) == (whole.content, whole.headers["ETag"])
        assert not requests.get(whole.url.replace("full/max", "0,0,64,64/max"), timeout=30).ok
        refused = requests.post(f"{url}/v1/restorations", files={"image": image.read_bytes()}, timeout=30)
        assert refused.json()["code"] == "too-many-pixels"
        running.send_signal(signal.SIGINT)
        running.wait(30)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_what_is_no_finished_output_is_refused(tmp_path):
    command = [sys.executable, "-m", "engine.cli", "view", str(tmp_path), "--port", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert str(tmp_path) in ended.stderr
