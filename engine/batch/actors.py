# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
"""The actors of a batch, as Ray sees them: small, and soon there again when killed.

Their work is done by children of the machine's nursery, which have the network's libraries loaded.
"""

from contextlib import suppress
from typing import Any, cast

import ray

from engine.batch.lane import Batch, answer
from engine.batch.nursery import Child, LostChildError, folder_of

MOST_DEATHS = 100
"""Of children at one work: pictures that kill are put aside before."""


class Forwarder:
    """Has a child do each work, and a new one where it has died."""

    def __init__(self, made: bytes) -> None:
        """`made`: see `engine.batch.tiles.make`."""
        self._made = made
        self._child = self._adopted()

    def __call__(self, batch: Batch) -> Batch:
        return answer(batch, self._act)

    def _act(self, row: bytes) -> bytes:
        living = {
            node["NodeID"]: (node["NodeManagerAddress"], node["NodeManagerPort"])
            for node in cast("list[dict[str, Any]]", ray.nodes())
            if node["Alive"]
        }
        for _ in range(MOST_DEATHS):
            try:
                return self._child.ask("engine.batch.tiles:act", row, living)
            except LostChildError:
                self._child.close()
                self._child = self._adopted()
        raise RuntimeError(f"{MOST_DEATHS} processes have died at one work")

    def _adopted(self) -> Child:
        """A new child, or the one that a killed process of this actor has left at work."""
        context = ray.get_runtime_context()
        node = context.get_node_id()
        home = folder_of(node)
        for _ in range(MOST_DEATHS):
            with suppress(LostChildError):
                child = Child(home, context.get_actor_id() or "")
                child.ask("engine.batch.tiles:make", self._made, node, str(home))
                return child
        raise RuntimeError(f"{MOST_DEATHS} processes have died before any work")


class Preparer(Forwarder):
    """Looks at pictures, see `engine.batch.tiles.Preparing`."""


class TileActor(Forwarder):
    """Restores pictures and draws parts of them, see `engine.batch.tiles.Restoring`."""


def finish(body: bytes) -> bytes:
    """As `engine.batch.tiles.finish`. Raises LostChildError."""
    child = Child(folder_of(ray.get_runtime_context().get_node_id()))
    try:
        return child.ask("engine.batch.tiles:finish", body)
    finally:
        child.close()
