"""The loss of a machine: the same bytes, and nobody is blamed."""

import json
import subprocess
import sys

import pytest

from engine.batch.work import DONE, Order
from engine.request import Request
from tests.batch import node_job
from tests.batch.test_pipeline import outputs, pictures, undisturbed
from tests.networks import TINY, random_checkpoint


@pytest.mark.timeout(400)
def test_a_lost_node_is_invisible_in_the_output(folder, tmp_path):
    items = pictures(folder / "in", [f"scan {n}" for n in range(40)], h=90, w=120, masked=False)
    items += pictures(folder / "in", ["large"], h=700, w=1600, masked=False)
    model = str(random_checkpoint(tmp_path, TINY))
    expected = undisturbed(items, Order(folder, Request(scale=4), ("ome-zarr",), model), folder / "expected")
    arguments = [folder / "in", folder / "out", model, tmp_path / "told.json"]
    subprocess.run([sys.executable, node_job.__file__, *arguments], check=True, capture_output=True)
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["lost"] > 0
    assert {name: end[:2] for name, end in told["ends"].items()} == {item.name: [DONE, None] for item in items}
    assert {end[2] for end in told["ends"].values()} == {1}
    assert outputs(folder / "out") == expected
