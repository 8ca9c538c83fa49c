"""A batch leaves the same bytes, whatever is killed on the way.

    python bench/batch_kills.py [workers|driver|node|zombie|stopped|two|s3 ...] [--seeds N] [--every S] [--trial]

workers: SIGKILL of a random tile actor every 5 s (`--every`). driver: `kill -9` of all processes at 20 points, then the
same command. node: one of three nodes is removed. zombie: a node stops (SIGSTOP) with a shard drawn and not stored; it
wakes when another has drawn that shard, or when the job has ended; a picture that it was finishing is refused until
then (output-busy), and made by the same command after it. stopped: a process that draws stops alone. two: two
drivers on one output. s3: outputs on an object store (moto), killed and with lost answers.

Each is compared with a run that nothing disturbs. `bench/noting` tells which shards were drawn, by which process; the
records of a canvas tell which were finished. `--trial`: a job of a few shards, to try the script; nothing is recorded.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
from _batch_setup import (
    REPOSITORY,
    TILE_ACTOR,
    Command,
    Ended,
    Picture,
    command_line,
    differing,
    digests,
    end_all,
    make_pictures,
    record,
    restore_arguments,
    spread,
    workspace,
)

from engine.batch.inputs import find_inputs
from engine.batch.run import restore_all
from engine.batch.work import DONE, Order
from engine.errors import OutputBusy
from engine.geometry import Size
from engine.receipt import plan_id_of
from engine.request import Request
from engine.tiling.canvas import Canvas, ledger_folder
from engine.tiling.execute import run
from engine.tiling.ledger import keys_in

if TYPE_CHECKING:
    from engine.objects import Prefix

SCALE = 1
"""Every pixel outside of holes is kept: most of the time goes into reading, storing and recording."""
LARGE_PX, SINGLE_PX = 4096, 256
"""A large picture's side (7 shards with its pyramid), and the longest side of a small one."""
REMOTE_PX = 1500
"""The height of a large picture on an object store, whose stand-in is slow: it is three times as wide, of 8 shards."""
WORKERS = 2
NUM_POINTS = 20
LONGEST_S = 3600.0
WAKING_S = 10.0
"""For what a zombie may write."""
STALL_S = 20.0


class Note(NamedTuple):
    """One step of one process with one shard."""

    step: str
    pid: int
    shard: tuple[str, str]
    """Its plan and its key."""


@dataclass(frozen=True, slots=True)
class Work:
    """The pictures of a measurement, and where its runs go."""

    folder: Path
    workers: int = WORKERS
    seeds: int = 3
    is_trial: bool = False
    kill_every_s: float = 5.0
    tags: Iterator[int] = field(default_factory=lambda: iter(range(1_000_000)))

    def make(self, *, large: int, small: int, large_px: int = LARGE_PX) -> int:
        """Every eighth large picture is three times as wide; every second small one has holes. How many pictures."""
        side = random.Random(0)
        widths = [large_px * (3 if n % 8 == 0 else 1) for n in range(large)]
        pictures = [Picture(f"large/{n}.png", Size(large_px, width)) for n, width in enumerate(widths)]
        sizes = [Size(side.randint(64, SINGLE_PX), side.randint(64, SINGLE_PX)) for _ in range(small)]
        suffixes = ("png", "jpg", "tif")
        pictures += [Picture(f"small/{n}.{suffixes[n % 3]}", size, n % 2 == 1) for n, size in enumerate(sizes)]
        return make_pictures(self.folder / "in", pictures, seed=0, masks=self.folder / "masks")

    def job(self, out: "Path | Prefix | None" = None, **environment: str) -> "Job":
        """A job of its own folder of notes, and of an output folder where none is given."""
        notes = Path(mkdtemp(prefix="notes-", dir=self.folder))
        return Job(self, out or self.folder / f"out-{next(self.tags)}", notes, environment)


@dataclass(frozen=True, slots=True)
class Job:
    """One output, made by one command as often as it takes."""

    work: Work
    out: "Path | Prefix"
    notes: Path
    environment: Mapping[str, str]

    @property
    def told_environment(self) -> dict[str, str]:
        path = f"{REPOSITORY / 'bench' / 'noting'}{os.pathsep}{REPOSITORY}"
        return {"PYTHONPATH": path, "ENGINE_NOTES": str(self.notes), **self.environment}

    def start(self, *more: str) -> Command:
        folder = self.work.folder
        out = self.out if isinstance(self.out, Path) else str(self.out)
        arguments = restore_arguments(
            folder / "in", out, workers=self.work.workers, scale=SCALE, masks=folder / "masks"
        )
        return Command([*arguments, *more], environment=self.told_environment)

    def noted(self) -> list[Note]:
        """What all processes have noted so far."""
        with suppress(FileNotFoundError):
            whole, _, _ = (self.notes / "shards").read_text().rpartition("\n")  # the last line may be in the writing
            lines = whole.splitlines()
            return [Note(step, int(pid), (plan, key)) for step, pid, plan, key in map(str.split, lines)]
        return []

    def begun(self) -> list[tuple[str, str]]:
        """The shards that were begun, each time."""
        return [note.shard for note in self.noted() if note.step == "begun"]

    def wait_begun(self, count: int, command: Command) -> None:
        """Until so many shards were begun, or the command has ended."""
        while command.is_running and len(self.begun()) < count:
            time.sleep(0.02)

    def recorded(self) -> set[tuple[str, str]]:
        """The shards that have a record, in canvases published and in progress."""
        assert isinstance(self.out, Path)
        found: set[tuple[str, str]] = set()
        for canvas in self.out.rglob("*.zarr"):
            plan_id = plan_id_of(canvas)
            if plan_id is not None:
                found |= {(plan_id, key.name) for key in keys_in(ledger_folder(canvas))}
        return found

    def found(self) -> dict[str, str]:
        assert isinstance(self.out, Path)
        return digests(self.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASURED), help="all where none is given")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between kills of workers")
    parser.add_argument("--trial", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.what) - MEASURED.keys():
        parser.error(f"not measured: {', '.join(unknown)}")
    good = True
    for name in options.what or MEASURED:
        with workspace() as folder:
            figures = MEASURED[name](
                Work(folder, seeds=options.seeds, is_trial=options.trial, kill_every_s=options.every)
            )
        good &= figures["holds"]
        for key, value in figures.items():
            print(f"{name:8} {key:28} {value}", flush=True)
        if not options.trial:
            record(f"kills {name}", figures)
    raise SystemExit(0 if good else 1)


def told_wrong(ended: Ended, count: int) -> dict[str, int]:
    """Of `count` pictures: how many a run did not tell of as done, and how often it told of one again."""
    names = [one["input"] for one in ended.told]
    done = {one["input"] for one in ended.told if one["status"] == DONE}
    return {"lost": count - len(done), "duplicated": len(names) - len(set(names))}


def undisturbed(work: Work) -> tuple[Job, Ended]:
    job = work.job()
    ended = job.start().wait(timeout_s=LONGEST_S).checked()
    print(f"undisturbed: {ended.seconds:.1f} s, {len(set(job.begun()))} shards", flush=True)
    return job, ended


# ---------------------------------------------------------------- workers


def workers(work: Work) -> dict[str, Any]:
    count = work.make(**(SMALL if work.is_trial else {"large": 52, "small": 48}))
    calm, first = undisturbed(work)
    expected, shards = calm.found(), calm.recorded()
    seconds: list[float] = []
    again: list[float] = []
    kills: list[int] = []
    bad = {"files_that_differ": 0, "lost": 0, "duplicated": 0}
    attempts = 1
    for seed in range(work.seeds):
        job = work.job()
        command = job.start()
        kills.append(kill_actors(command, random.Random(seed), every_s=work.kill_every_s))
        ended = command.wait(timeout_s=LONGEST_S).checked()
        bad["files_that_differ"] += len(differing(job.found(), expected))
        for name, value in told_wrong(ended, count).items():
            bad[name] += value
        attempts = max(attempts, *(one["attempts"] for one in ended.told))
        begun = job.begun()
        again.append((len(begun) - len(set(begun))) / len(set(begun)))
        assert job.recorded() == shards  # a record is a file of its own that is created once: never two of a shard
        seconds.append(ended.seconds)
        print(f"seed {seed}: {ended.seconds:.1f} s, {kills[-1]} kills, {again[-1]:.1%} again", flush=True)
    ratios = [each / first.seconds for each in seconds]
    return {
        "pictures": count,
        "shards": len(shards),
        "undisturbed_s": round(first.seconds, 1),
        "undisturbed_drawn_again": len(calm.begun()) - len(set(calm.begun())),
        "kill_every_s": work.kill_every_s,
        "kills": kills,
        "share_drawn_again": spread(again, digits=4),
        "time_ratio": spread(ratios),
        "most_attempts": attempts,
        **bad,
        "holds": not any(bad.values()) and max(again) <= 0.10 and max(ratios) <= 1.35,
    }


def kill_actors(command: Command, chance: random.Random, *, every_s: float) -> int:
    """Kills a random tile actor every so often until the command ends; how many."""
    kills = 0
    while not command.tile_actors() and command.is_running:
        time.sleep(0.1)
    due = time.monotonic() + every_s
    while command.is_running:
        time.sleep(0.05)
        if time.monotonic() >= due:
            due += every_s
            actors = command.tile_actors()
            if actors:
                with suppress(psutil.NoSuchProcess):
                    chance.choice(actors).kill()
                    kills += 1
    return kills


# ---------------------------------------------------------------- driver


def driver(work: Work) -> dict[str, Any]:
    count = work.make(**(SMALL if work.is_trial else {"large": 4, "small": 24}))
    calm, first = undisturbed(work)
    expected, total = calm.found(), len(calm.recorded())
    chance = random.Random(0)
    num_points = 3 if work.is_trial else NUM_POINTS
    differ = drawn_again = lost = 0
    kept: list[int] = []
    for point in range(num_points):
        job, pause_s = work.job(), chance.uniform(0, 0.5)
        while True:
            command = job.start()
            job.wait_begun(1 + total * point // num_points, command)
            time.sleep(pause_s)
            if command.is_running:
                break
            command.wait().checked()  # ended before: once more, without a pause
            job, pause_s = work.job(), 0.0
        command.kill()
        finished, before = job.recorded(), len(job.begun())
        ended = job.start().wait(timeout_s=LONGEST_S).checked()
        drawn_again += len(finished.intersection(job.begun()[before:]))
        differ += len(differing(job.found(), expected))
        lost += told_wrong(ended, count)["lost"]
        kept.append(len(finished))
        print(f"point {point + 1}: {len(finished)} of {total} shards recorded, {differ} files differ", flush=True)
    looks = look_up(work, calm, total)
    return {
        "pictures": count,
        "shards": total,
        "undisturbed_s": round(first.seconds, 1),
        "points": num_points,
        "recorded_when_killed": kept,
        "files_that_differ": differ,
        "lost": lost,
        "recorded_and_drawn_again": drawn_again,
        **looks,
        "holds": not (differ or lost or drawn_again)
        and all(looks[name]["median"] <= 1 for name in ("finished_ms_per_shard", "resumed_ms_per_shard")),
    }


def look_up(work: Work, job: Job, total: int) -> dict[str, Any]:
    """What finished work costs in this process: of pictures in the catalog, and of the shards of a canvas."""
    assert isinstance(job.out, Path)
    order = Order(job.out, Request(scale=SCALE), ("ome-zarr",), "lite")
    restorer = order.restorer()
    finished: list[float] = []
    resumed: list[float] = []
    for _ in range(3):
        started = time.perf_counter()
        items = list(find_inputs([str(work.folder / "in")], out=str(job.out), mask=str(work.folder / "masks")))
        assert all(outcome.looked_up for outcome in restore_all(items, order, restorer))
        finished.append((time.perf_counter() - started) / total * 1000)
        started, count = time.perf_counter(), 0
        for path in sorted((job.out / "large").glob("*.zarr")):
            with Canvas.load(path) as canvas:
                count += sum(end.reused for end in run(canvas, canvas.grid.all_keys(), never))
        resumed.append((time.perf_counter() - started) / count * 1000)
    return {"finished_ms_per_shard": spread(finished), "resumed_ms_per_shard": spread(resumed)}


def never(_: object) -> Any:  # noqa: ANN401
    raise AssertionError("a finished shard is not drawn")


# ---------------------------------------------------------------- nodes


class Nodes:
    """Three nodes of a cluster on this machine, and the processes of each."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from ray.cluster_utils import Cluster

        self._before = {process.pid for process in psutil.Process().children(recursive=True)}
        self._seen: dict[int, psutil.Process] = {}
        self._files = TemporaryDirectory(prefix="n-", ignore_cleanup_errors=True)  # short: sockets lie below it
        there = {"TMPDIR": self._files.name, "RAY_TMPDIR": self._files.name, "RAY_worker_niceness": "0"}
        os.environ.update({**environment, **there})  # Ray's processes inherit it
        common: dict[str, Any] = {"object_store_memory": 128 << 20, "include_dashboard": False}
        self.cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **common})
        self.others: list[Any] = [self.cluster.add_node(num_cpus=2, object_store_memory=128 << 20) for _ in range(2)]
        self.cluster.wait_for_nodes()

    @property
    def arguments(self) -> list[str]:
        return ["--address", self.cluster.address]

    def processes(self, node: Any) -> list[psutil.Process]:  # noqa: ANN401
        """The raylet of a node and all that it has started; its nursery, whose server comes first."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [*self.nursery(node), raylet, *raylet.children(recursive=True)]

    def nursery(self, node: Any) -> list[psutil.Process]:  # noqa: ANN401
        """The server of a node's nursery, which has left its parent, and its children."""
        found = [one for one in psutil.process_iter() if f"engine-{node._node_id[:24]}" in command_line(one)]
        pids = {one.pid for one in found}
        return sorted(found, key=lambda one: one.ppid() in pids)

    def of(self, pid: int) -> Any | None:  # noqa: ANN401
        """The node, not the head, that has a process."""
        return next((node for node in self.others if pid in {one.pid for one in self.processes(node)}), None)

    def note_processes(self) -> None:
        """Remembers all that run, for those of a lost node have no parent any more."""
        nurseries = [process for node in self.others for process in self.nursery(node)]
        for process in [*psutil.Process().children(recursive=True), *nurseries]:
            if process.pid not in self._before:
                self._seen[process.pid] = process

    def end(self) -> None:
        self.note_processes()
        end_all(lambda: [one for one in self._seen.values() if one.is_running() and one.status() != "zombie"])
        for process in self._seen.values():
            with suppress(psutil.Error):
                process.wait(1)
        self.cluster.shutdown()  # for what Ray remembers in this process
        self._files.cleanup()


@contextmanager
def nodes(job: Job) -> Generator[Nodes]:
    before = dict(os.environ)
    try:
        made = Nodes(job.told_environment)
        try:
            yield made
        finally:
            made.end()
    finally:
        os.environ.clear()
        os.environ.update(before)


def node(work: Work) -> dict[str, Any]:
    count = work.make(**(SMALL if work.is_trial else {"large": 20, "small": 40}))
    calm, first = undisturbed(work)
    expected, total = calm.found(), len(calm.recorded())
    differ = lost = blamed = on_lost_node = 0
    seconds: list[float] = []
    attempts = 1
    for seed in range(work.seeds):
        job, chance = work.job(), random.Random(seed)
        with nodes(job) as there:
            command = job.start(*there.arguments)
            job.wait_begun(int(total * chance.uniform(0.2, 0.6)), command)
            lost_node = None
            while lost_node is None and command.is_running:
                busy = [one for one in there.others if any(TILE_ACTOR in command_line(p) for p in there.processes(one))]
                lost_node = chance.choice(busy) if busy else None
            if lost_node is None:
                raise SystemExit(f"the job had ended before a node was removed: {command.wait().said[-2000:]}")
            there.note_processes()
            on_lost_node += sum(TILE_ACTOR in command_line(process) for process in there.processes(lost_node))
            there.cluster.remove_node(lost_node, allow_graceful=False)
            ended = command.wait(timeout_s=LONGEST_S).checked()
        differ += len(differing(job.found(), expected))
        lost += told_wrong(ended, count)["lost"]
        attempts = max(attempts, *(one["attempts"] for one in ended.told))
        blamed += sum(one["reason"] is not None for one in ended.told)
        seconds.append(ended.seconds)
        print(f"seed {seed}: {ended.seconds:.1f} s, {differ} files differ", flush=True)
    return {
        "pictures": count,
        "shards": total,
        "undisturbed_s": round(first.seconds, 1),
        "seconds": spread(seconds, digits=1),
        "tile_actors_on_lost_nodes": on_lost_node,
        "files_that_differ": differ,
        "lost": lost,
        "blamed": blamed,
        "most_attempts": attempts,
        "holds": not (differ or lost or blamed) and attempts == 1 and on_lost_node > 0,
    }


# ---------------------------------------------------------------- zombies


def zombie(work: Work) -> dict[str, Any]:
    count = work.make(**(SMALL if work.is_trial else {"large": 20, "small": 40}))
    calm, first = undisturbed(work)
    expected, total = calm.found(), len(calm.recorded())
    differ = lost = blamed = taken_over = after_waking = later = 0
    for seed in range(work.seeds):
        for wakes_at_end in (False, True):
            job = work.job()
            with nodes(job) as there:
                command = job.start(*there.arguments)
                job.wait_begun(int(total * random.Random(seed).uniform(0.1, 0.5)), command)
                pid, stopped = stop_node(job, there, command)
                there.note_processes()
                shard = [note.shard for note in job.noted() if note.pid == pid][-1]
                waits = command.is_running
                while waits:
                    time.sleep(0.1)
                    taken = any(note.shard == shard and note.pid != pid for note in job.noted())
                    waits = command.is_running and (wakes_at_end or not taken)
                was_running, steps = command.is_running, len(job.noted())
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).send_signal(signal.SIGCONT)  # its raylet sleeps on and cannot end it
                time.sleep(WAKING_S)
                for process in stopped:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGCONT)
                ended = command.wait(timeout_s=LONGEST_S)
                if left := sum(one["reason"] == OutputBusy.code for one in ended.told):
                    later += left  # what a sleeper holds nobody takes from it; it is awake now
                    ended = job.start(*there.arguments).wait(timeout_s=LONGEST_S)
                ended.checked()
                taken_over += sum(note.shard == shard and note.step == "drawn" for note in job.noted()) > 1
                after_waking += any(note.pid == pid for note in job.noted()[steps:])
            differ += len(differing(job.found(), expected))
            lost += told_wrong(ended, count)["lost"]
            blamed += sum(one["reason"] is not None for one in ended.told)
            when = "in mid-job" if was_running else "after the end"
            print(f"seed {seed}: {ended.seconds:.1f} s, woke {when}, {differ} files differ", flush=True)
    return {
        "pictures": count,
        "shards": total,
        "undisturbed_s": round(first.seconds, 1),
        "zombies": 2 * work.seeds,
        "shards_taken_over": taken_over,
        "zombies_that_went_on_drawing": after_waking,
        "pictures_left_for_the_next_run": later,
        "files_that_differ": differ,
        "lost": lost,
        "blamed": blamed,
        "holds": not (differ or lost or blamed) and taken_over > 0,
    }


def stop_node(job: Job, there: Nodes, command: Command) -> tuple[int, list[psutil.Process]]:
    """Stops a node with a shard drawn and not stored: the process that has it, and the others that were stopped."""
    servers: list[psutil.Process] = []
    for node in [there.cluster.head_node, *there.others]:  # a server would see that a child of it was stopped alone
        servers += there.nursery(node)[:1]
    for server in servers:
        server.suspend()
    while True:
        pid = stop_one(job, command, what="shared")  # what has a picture for itself keeps it while it sleeps
        found = there.of(pid)
        if found is not None:
            break
        os.kill(pid, signal.SIGCONT)  # on the head, which has to stay
        (job.notes / f"stopped-{pid}").unlink()
    others = [process for process in there.processes(found) if process.pid != pid]
    for process in others:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    for server in servers:
        if server.pid not in {process.pid for process in others}:
            server.resume()
    return pid, others


def stop_one(job: Job, command: Command, *, what: str = "") -> int:
    """Has the next process that has drawn a shard stop itself; which."""
    (job.notes / "asked").write_text(what)
    (job.notes / "asked").rename(job.notes / "stop")
    while not (found := list(job.notes.glob("stopped-*"))):
        if not command.is_running:
            raise SystemExit(f"the job had ended before a process stopped: {command.wait().said[-2000:]}")
        time.sleep(0.02)
    return int(found[0].name.partition("-")[2])


def stopped(work: Work) -> dict[str, Any]:
    count = work.make(**SMALL)
    calm, first = undisturbed(work)
    expected = calm.found()
    differ = lost = woken = 0
    seconds: list[float] = []
    for seed in range(1 if work.is_trial else work.seeds):
        job = work.job()
        command = job.start("--stall-after", f"{STALL_S:g}")
        job.wait_begun(1 + seed, command)
        pid = stop_one(job, command)
        while command.is_running:
            time.sleep(0.1)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
            woken += 1
            time.sleep(WAKING_S)
        ended = command.wait().checked()
        differ += len(differing(job.found(), expected))
        lost += told_wrong(ended, count)["lost"]
        seconds.append(ended.seconds)
        print(f"seed {seed}: {ended.seconds:.1f} s, {differ} files differ", flush=True)
    return {
        "pictures": count,
        "undisturbed_s": round(first.seconds, 1),
        "stall_after_s": STALL_S,
        "seconds": spread(seconds, digits=1),
        "alive_at_the_end": woken,
        "files_that_differ": differ,
        "lost": lost,
        "holds": not (differ or lost),
    }


# ---------------------------------------------------------------- two drivers


def two(work: Work) -> dict[str, Any]:
    count = work.make(**SMALL)
    calm, first = undisturbed(work)
    expected, total = calm.found(), len(calm.recorded())
    differ = lost = refused = again = 0
    ways = ("at once", "in mid-job")
    for seed in range(work.seeds):
        for way in ways:
            job = work.job()
            one = job.start()
            if way == "in mid-job":
                job.wait_begun(int(total * random.Random(seed).uniform(0.1, 0.7)), one)
            ends = [command.wait(timeout_s=LONGEST_S) for command in (job.start(), one)]
            good = [ended for ended in ends if ended.exit_code == 0]
            refused += sum(ended.exit_code != 0 and "output-busy" in ended.said for ended in ends)
            lost += min((told_wrong(ended, count)["lost"] for ended in good), default=count)
            differ += len(differing(job.found(), expected))
            again += len(job.begun()) - len(set(job.begun()))
            print(f"seed {seed}, {way}: exits {[ended.exit_code for ended in ends]}, {differ} files differ", flush=True)
    runs = work.seeds * len(ways)
    return {
        "pictures": count,
        "shards": total,
        "undisturbed_s": round(first.seconds, 1),
        "pairs": runs,
        "refused": refused,
        "drawn_again": again,
        "files_that_differ": differ,
        "lost": lost,
        "holds": not (differ or lost) and refused == runs,
    }


# ---------------------------------------------------------------- object store


def s3(work: Work) -> dict[str, Any]:
    sys.path.append(str(REPOSITORY))  # the store's stand-in is one of the tests'
    from engine.objects import Prefix
    from tests.faults.s3_proxy import BUCKET, s3_proxy

    count = work.make(large=1, small=3 if work.is_trial else 8, large_px=REMOTE_PX)
    work = replace(work, workers=0)  # outputs on an object store take one process
    differ = lost = drawn_again = 0
    with s3_proxy() as proxy:
        os.environ.update(proxy.environment)
        ThreadingHTTPServer.handle_error = unmoved
        tags = iter(range(1_000_000))

        def job() -> Job:
            proxy.requests.clear()
            proxy.faults.clear()
            return work.job(Prefix(BUCKET, f"out-{next(tags)}"))

        calm = job()
        first = calm.start().wait(timeout_s=LONGEST_S).checked()
        expected, requests = stored(calm), len(proxy.requests)
        print(f"undisturbed: {first.seconds:.1f} s, {requests} requests", flush=True)
        points = [(n, seed) for seed in range(work.seeds) for n in range(2 if work.is_trial else NUM_POINTS // 2)]
        parts = max(n for n, _ in points) + 1
        for n, seed in points:
            killed, wanted = job(), int(requests * (n + random.Random(f"{seed} {n}").random()) / parts)
            command = killed.start()
            while command.is_running and len(proxy.requests) < wanted:
                time.sleep(0.002)
            command.kill()
            finished, before = recorded_remotely(killed), len(killed.begun())
            ended = killed.start().wait(timeout_s=LONGEST_S).checked()
            drawn_again += len(finished.intersection(killed.begun()[before:]))
            differ += len(differing(stored(killed), expected))
            lost += told_wrong(ended, count)["lost"]
            print(f"killed at request {wanted}: {len(finished)} shards recorded, {differ} files differ", flush=True)
        struck = 0
        for action in ("lose-answer", "lose-request", "busy-but-done"):
            disturbed = job()
            faults = [
                proxy.fail(action, "PUT", key, skip=skip)
                for key in (r"/ledger/", r"/plan", r"/c/0/", r"out-\d+/[^?]*\.json$")
                for skip in range(0, 40, 3)
            ]
            ended = disturbed.start().wait(timeout_s=LONGEST_S).checked()
            struck += sum(fault.met > fault.skip for fault in faults)
            differ += len(differing(stored(disturbed), expected))
            lost += told_wrong(ended, count)["lost"]
            drawn_again += len(disturbed.begun()) - len(set(disturbed.begun()))
            print(f"{action}: {struck} requests struck so far, {differ} files differ", flush=True)
    return {
        "pictures": count,
        "objects": len(expected),
        "requests": requests,
        "undisturbed_s": round(first.seconds, 1),
        "points": len(points),
        "requests_struck": struck,
        "files_that_differ": differ,
        "lost": lost,
        "recorded_and_drawn_again": drawn_again,
        "holds": not (differ or lost or drawn_again) and struck > 0,
    }


def unmoved(*_: object, **__: object) -> None:
    """A killed client hangs up, and that is no news of a server."""


def stored(job: Job) -> dict[str, str]:
    """As `digests`, of an object store: what the pointers name, and the pointers themselves without time and place."""
    from engine import remote

    found: dict[str, str] = {}
    assert not isinstance(job.out, Path)
    for name in pictures_of(job.out):
        folder, _, last = name.rpartition("/")
        out = job.out / folder if folder else job.out
        pointer = remote.read_pointer(out, last)
        if pointer is None or pointer.receipt is None:
            continue
        for fmt, place in remote.places(out, pointer.receipt).items():
            for key in sorted(place.keys()) if fmt == "ome-zarr" else [""]:
                found[f"{name} {fmt} {key}"] = hashlib.sha256(place.get(key) or b"").hexdigest()
        told = {key: value for key, value in pointer.receipt.items() if key not in ("finished", "prefix")}
        found[name] = hashlib.sha256(repr(sorted(told.items())).encode()).hexdigest()
    return found


def pictures_of(out: "Prefix") -> list[str]:
    """The names of pictures that have a pointer: `<name>.json` outside of the parts of a plan."""
    keys = [key for key in out.keys() if key.endswith(".json")]  # noqa: SIM118  no mapping
    return [key.removesuffix(".json") for key in keys if not any(len(part) == 64 for part in key.split("/"))]


def recorded_remotely(job: Job) -> set[tuple[str, str]]:
    """The shards that have a record, of all plans."""
    assert not isinstance(job.out, Path)
    found: set[tuple[str, str]] = set()
    for key in job.out.keys():  # noqa: SIM118  no mapping
        place, is_record, name = key.partition("/_engine/ledger/")
        if is_record:
            plan_id = next(part for part in place.split("/") if len(part) == 64)
            found.add((plan_id, name.removesuffix(".json")))
    return found


SMALL = {"large": 4, "small": 8}
MEASURED: dict[str, Callable[[Work], dict[str, Any]]] = {
    "workers": workers,
    "driver": driver,
    "node": node,
    "zombie": zombie,
    "stopped": stopped,
    "two": two,
    "s3": s3,
}

if __name__ == "__main__":
    main()
