"""What the processes of a running batch take: memory by role, Ray's object store, unfinished pictures on the disk.

Does nothing by itself.
"""

import os
import re
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from _batch_setup import Command, Ended, command_line

ROLES = {
    "nursery.serve": "child",
    "TileActor": "tile actor",
    "Preparer": "preparer",
    "_Feed": "feed",
    "ray::finish": "task",
    "ray::Read": "reader",
    "warden.serve": "decoder",
    "engine.cli": "driver",
    "ray::IDLE": "idle",
}
"""By a part of the command line, the first that fits; all other processes are Ray's own."""
OWN = "ray's own"
WORKERS = ("child", "tile actor", "preparer", "feed", "task", "reader")


def share_token() -> None:
    """Lets this process ask the clusters that its commands start: Ray's token for them is one of this run alone.

    Ray reads it when it is imported, so that is left to `Store`.
    """
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ["GRPC_VERBOSITY"] = "ERROR"  # a cluster that is taken down is no news


class Watch:
    """Looks at a command's processes until it ends.

    A process's peak is the kernel's own (VmHWM), so that only what is taken within `every_s` of its end may be missed.
    """

    def __init__(self, command: Command, out: Path, *, every_s: float = 0.5) -> None:
        self._command, self._out, self._every_s = command, out, every_s
        self._peaks: dict[tuple[int, float], int] = {}
        self._roles: dict[tuple[int, float], str] = {}
        self._store: Store | None = None
        self.most_staged = 0
        """Unfinished pictures whose work lay on the disk at once."""
        self.most_store_bytes = 0
        self.spilled_bytes = 0

    def ended(self) -> Ended:
        """Waits for the end of the command; ends it where watching it fails."""
        try:
            while self._command.is_running:
                self._look()
                time.sleep(self._every_s)
        except BaseException:
            self._command.kill()
            raise
        return self._command.wait()

    def peaks(self) -> dict[str, int]:
        """The largest peak of each role, in bytes."""
        found: dict[str, int] = {}
        for process, peak in self._peaks.items():
            role = self._roles[process]
            found[role] = max(found.get(role, 0), peak)
        return dict(sorted(found.items()))

    def figures(self) -> dict[str, Any]:
        return {
            "peak_rss_mib": {role: round(peak / 2**20, 1) for role, peak in self.peaks().items()},
            "most_staged_unfinished": self.most_staged,
            "object_store_most_bytes": self.most_store_bytes,
            "spilled_bytes": self.spilled_bytes,
        }

    def _look(self) -> None:
        processes = self._command.processes()
        for process in processes:
            with suppress(psutil.Error, OSError):
                key = process.pid, process.create_time()
                peak, name = _peak(process.pid), command_line(process)
                if peak:
                    self._peaks[key] = peak
                    self._roles[key] = _role(name, self._roles.get(key))
        self.most_staged = max(self.most_staged, _num_staged(self._out))
        self._look_at_store(processes)

    def _look_at_store(self, processes: Iterable[psutil.Process]) -> None:
        if self._store is None:
            self._store = Store.of(processes)
        if self._store is not None and (found := self._store.stats()) is not None:
            self.most_store_bytes = max(self.most_store_bytes, found.object_store_bytes_used)
            self.spilled_bytes = max(self.spilled_bytes, found.spilled_bytes_total)


class Store:
    """The object store of another driver's cluster of one node.

    Ray tells of it by a private call only (seen with 2.60).
    """

    def __init__(self, address: str, port: int) -> None:
        self._node = address, port

    @classmethod
    def of(cls, processes: Iterable[psutil.Process]) -> "Store | None":
        """That of the cluster which the processes belong to; None where none has started yet."""
        lines = [command_line(process) for process in processes]
        gcs = next((match[1] for line in lines if (match := re.search(r"--gcs-address=(\S+)", line))), None)
        if gcs is None or not any("ray::" in line for line in lines):
            return None
        from ray._private.internal_api import get_state_from_address

        nodes = get_state_from_address(gcs).node_table()
        return next((cls(node["NodeManagerAddress"], node["NodeManagerPort"]) for node in nodes if node["Alive"]), None)

    def stats(self) -> Any:  # noqa: ANN401 - a protobuf message
        """None while the cluster is taken down."""
        from grpc import RpcError
        from ray._private.internal_api import get_memory_info_reply

        try:
            return get_memory_info_reply(None, *self._node, timeout_seconds=5).store_stats
        except RpcError:
            return None


def _peak(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def _role(line: str, before: str | None) -> str:
    """A process of Ray is idle before and after its work."""
    role = next((role for part, role in ROLES.items() if part in line), OWN)
    return before if before is not None and role in ("idle", OWN) else role


def _num_staged(out: Path) -> int:
    return sum(1 for _ in out.glob("*.inprogress.zarr"))
