"""A batch on three nodes of one machine; a node with tile actors is lost when the first pictures have ended.

Run by test_nodes.py in a process of its own, which may use one Ray cluster only.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from engine.batch.inputs import find_inputs
from engine.batch.pipeline import Pipeline
from engine.batch.work import Order, Workers
from engine.request import Request

LOST_AFTER = 8  # pictures


def main(source: str, out: str, model: str, told: str) -> None:
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells it so
    arguments: dict[str, Any] = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "num_cpus": 2})
    nodes = [cluster.add_node(**arguments, num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    order = Order(Path(out), Request(scale=4), ("ome-zarr",), model)
    ends: dict[str, list[object]] = {}
    lost = 0
    for outcome in Pipeline(order, Workers(2)).run(find_inputs([source], out=out)):
        assert outcome.item.name not in ends
        ends[outcome.item.name] = [outcome.status, outcome.reason, outcome.attempts]
        if len(ends) >= LOST_AFTER and not lost:
            node = max(nodes, key=tile_actors)
            lost = tile_actors(node)
            cluster.remove_node(node, allow_graceful=False)
    Path(told).write_text(json.dumps({"ends": ends, "lost": lost}))
    ray.shutdown()
    cluster.shutdown()


def tile_actors(node: Any) -> int:
    """How many of them the node runs."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return sum("TileActor" in " ".join(process.cmdline()) for process in raylet.children())


if __name__ == "__main__":
    main(*sys.argv[1:])
