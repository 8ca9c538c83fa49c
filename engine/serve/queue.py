"""Who does what next: the queue of a service, without processes, files or a clock of its own.

A picture is begun, then drawn shard by shard, then finished; the steps are given out as tasks, one at a time to each
worker. Keys share the workers by the megapixels that they have had, not by the pictures that they have sent; within a
key what is looked at comes first, then what came first. A shard of a smaller level is given out when those that it is
made from are stored, so what is looked at from afar grows sharp early.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.errors import (
    DecoderUnavailable,
    InputError,
    ModelError,
    NotEnoughDisk,
    OutputBusy,
    PlanError,
    StorageFull,
    StorageReadOnly,
    codes,
)
from engine.geometry import Box
from engine.tiling.grid import Grid, ShardKey

TASK_S = 1.0
"""A task has as many shards as take about so long: short enough to turn to what is looked at."""
MOST_SHARDS = 8
LEAST_MEGAPIXELS = 0.5
"""What a task counts at least: to begin or to finish a small picture takes as long as to draw so many."""
MOST_LOOKS = 64
"""That are remembered of a picture before it is begun: a screen of tiles."""
MOST_LOSSES = 3
"""Workers that a picture may cost without anything done in between; then it is blamed."""
SILENT_S = 6.0
"""A worker that has not been heard of for so long is lost."""
WHOLE_S_PER_MEGAPIXEL = 0.5
"""By so much longer a task may take that reads, or checks, all of a picture: it does not hang."""
_SMOOTHING = 0.2
_OF_SURROUNDINGS = codes(OutputBusy, NotEnoughDisk, StorageFull, StorageReadOnly, DecoderUnavailable)
_OF_PICTURES = codes(InputError, PlanError, ModelError)


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class Kind(StrEnum):
    BEGIN = "begin"
    DRAW = "draw"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Task:
    """What one worker is to do for one picture."""

    number: int
    picture: str
    kind: Kind
    keys: tuple[ShardKey, ...] = ()

    def patience_s(self, megapixels: float) -> float:
        """By so much longer than the drawing of a few shards it may take, for a picture of so many megapixels."""
        return 0.0 if self.kind is Kind.DRAW else WHOLE_S_PER_MEGAPIXEL * megapixels


@dataclass(frozen=True, slots=True)
class Began:
    """What is known of a picture when it has been begun."""

    grid: Grid
    done: frozenset[ShardKey] = frozenset()
    """Stored by an earlier run."""


class Whose(StrEnum):
    """What a failed task failed for."""

    PICTURE = "picture"
    """It will fail again."""
    UNKNOWN = "unknown"
    """A few times more are tried."""
    SURROUNDINGS = "surroundings"
    """A full disk, say: it is tried until it goes."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a picture ended without being restored."""

    code: str
    detail: str

    @property
    def whose(self) -> Whose:
        if self.code in _OF_SURROUNDINGS:
            return Whose.SURROUNDINGS
        return Whose.PICTURE if self.code in _OF_PICTURES else Whose.UNKNOWN


_DIED = Failure(
    "process-died", f"{MOST_LOSSES} processes have ended while they worked on this picture; leave it out, or report it"
)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a picture is."""

    state: State
    share: float
    """Of the work done, 0 to 1."""
    position: int | None
    """Among the queued, counted from 1."""
    seconds_left: float | None
    """None where no rate is known yet."""


@dataclass(slots=True)
class _Picture:
    owner: str
    megapixels: float
    order: int
    began: Began | None = None
    waiting: dict[ShardKey, None] = field(default_factory=dict[ShardKey, None])
    """Of the full size and to be drawn, in this order."""
    looked_at: dict[ShardKey, None] = field(default_factory=dict[ShardKey, None])
    """Of those waiting, the first to draw."""
    ready: deque[ShardKey] = field(default_factory=deque[ShardKey])
    """Of smaller levels, with all that they are made from."""
    missing: dict[ShardKey, set[ShardKey]] = field(default_factory=dict[ShardKey, set[ShardKey]])
    """Of each shard of a smaller level, what it is made from and is not stored."""
    users: dict[ShardKey, list[ShardKey]] = field(default_factory=dict[ShardKey, list[ShardKey]])
    """Of each shard, those of the next level that are made from it."""
    done: set[ShardKey] = field(default_factory=set[ShardKey])
    tasks: dict[int, Task] = field(default_factory=dict[int, Task])
    looks: dict[tuple[Box, int], None] = field(default_factory=dict[tuple[Box, int], None])
    """What is looked at before it is begun."""
    losses: int = 0

    @property
    def all_drawn(self) -> bool:
        return self.began is not None and len(self.done) == self.began.grid.num_shards

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.ready)

    @property
    def share(self) -> float:
        return 0.0 if self.began is None else len(self.done) / self.began.grid.num_shards

    @property
    def megapixels_left(self) -> float:
        return self.megapixels * (1 - self.share)

    def megapixels_of(self, keys: Iterable[ShardKey]) -> float:
        """Their part of the picture's, which lie in its full size."""
        if self.began is None:
            return 0.0
        grid = self.began.grid
        pixels = sum(grid.box(key).size.num_pixels for key in keys if key.level == 0)
        return self.megapixels * pixels / grid.size.num_pixels

    @property
    def has_task(self) -> bool:
        """Whether there is something to give out now."""
        if self.began is None or self.all_drawn:
            return not self.tasks
        return self.num_waiting > 0


@dataclass(slots=True)
class _Worker:
    heard: float
    task: Task | None = None
    since: float = 0.0


class Queue:
    """All pictures that were accepted and have not ended. Times are seconds of any clock that only goes forward."""

    def __init__(self) -> None:
        self._pictures: dict[str, _Picture] = {}
        self._workers: dict[str, _Worker] = {}
        self._had: dict[str, float] = {}
        """Megapixels given out for each owner, while it has pictures here."""
        self._numbers = 0
        self._orders = 0
        self.megapixels_per_s: float | None = None
        """Of one worker, while it draws."""

    # What the service asks and tells.

    def add(self, picture: str, *, owner: str, megapixels: float) -> None:
        """Puts a picture at the end. One that is here already stays where it is."""
        if picture in self._pictures:
            return
        if all(other.owner != owner for other in self._pictures.values()):  # idle so far: no claims from before
            self._had[owner] = min(self._had.values(), default=0.0)
        self._orders += 1
        self._pictures[picture] = _Picture(owner, megapixels, self._orders)

    def drop(self, picture: str) -> None:
        """Forgets a picture; what a worker still does for it is not waited for."""
        found = self._pictures.pop(picture, None)
        if found is not None and all(other.owner != found.owner for other in self._pictures.values()):
            self._had.pop(found.owner, None)

    def look(self, picture: str, box: Box, *, level: int) -> None:
        """Someone sees this part of a picture (pixels of the level) now: its shards are drawn before all others."""
        found = self._pictures.get(picture)
        if found is None:
            return
        if found.began is None:
            found.looks[box, level] = None
            if len(found.looks) > MOST_LOOKS:
                del found.looks[next(iter(found.looks))]
            return
        grid = found.began.grid
        seen = box.scaled(1 << level).intersection(Box.of(grid.size))
        keys = [key for key in grid.keys_in(seen, level=0) if key in found.waiting]
        found.looked_at = {**dict.fromkeys(keys), **found.looked_at}

    @property
    def megapixels_left(self) -> float:
        return sum(picture.megapixels_left for picture in self._pictures.values())

    def megapixels_left_of(self, owner: str) -> float:
        return sum(picture.megapixels_left for picture in self._pictures.values() if picture.owner == owner)

    @property
    def num_workers(self) -> int:
        return len(self._workers)

    def progress(self) -> Mapping[str, Progress]:
        """Of all pictures here."""
        rate = (self.megapixels_per_s or 0.0) * max(1, self.num_workers)
        found: dict[str, Progress] = {}
        ahead, position = 0.0, 0
        for name, picture in sorted(self._pictures.items(), key=lambda item: item[1].order):
            ahead += picture.megapixels_left
            seconds_left = ahead / rate if rate else None
            if picture.began is None:
                position += 1
                found[name] = Progress(State.QUEUED, 0.0, position, seconds_left)
            else:
                found[name] = Progress(State.RUNNING, picture.share, None, seconds_left)
        return found

    # What workers ask and tell.

    def take(self, worker: str, *, now: float) -> Task | None:
        """The next task of a worker that has none: one that it had must have ended, or be lost."""
        assert worker not in self._workers or self._workers[worker].task is None
        self._workers[worker] = _Worker(now)
        picture = self._next()
        if picture is None:
            return None
        self._numbers += 1
        task = self._task(picture)
        found = self._pictures[picture]
        found.tasks[task.number] = task
        cost = max(LEAST_MEGAPIXELS, found.megapixels_of(task.keys))
        self._had[found.owner] = self._had.get(found.owner, 0.0) + cost
        self._workers[worker] = _Worker(now, task, now)
        return task

    def task_of(self, worker: str) -> Task | None:
        """What a worker is at."""
        found = self._workers.get(worker)
        return None if found is None else found.task

    def longest_s(self, *, now: float) -> float:
        """How long the worker has been at its task that has been so for longest, beside what such a task may take."""
        return max(
            (now - at.since - self._patience_s(at.task) for at in self._workers.values() if at.task), default=0.0
        )

    def _patience_s(self, task: Task) -> float:
        picture = self._pictures.get(task.picture)
        return 0.0 if picture is None else task.patience_s(picture.megapixels)

    def seconds_of(self, worker: str, *, now: float) -> float:
        """How long a worker has been at its task."""
        found = self._workers.get(worker)
        return 0.0 if found is None or found.task is None else now - found.since

    def hear(self, worker: str, *, now: float) -> None:
        """A sign of life. One that was given up is known again when it takes its next task."""
        if worker in self._workers:
            self._workers[worker].heard = now

    def silent(self, *, now: float) -> list[str]:
        """Workers to give up."""
        return [name for name, worker in self._workers.items() if now - worker.heard > SILENT_S]

    def lose(self, worker: str) -> tuple[str, Failure] | None:
        """A worker is gone; its task is given out again. The picture that has cost too many, and why it ends."""
        found = self._workers.pop(worker, None)
        if found is None or found.task is None:
            return None
        return self._give_back(found.task, _DIED)

    def fail(self, worker: str, failure: Failure) -> tuple[str, Failure] | None:
        """A task has failed: the picture that has ended with it."""
        at = self._workers.get(worker)
        if at is None or at.task is None:
            return None
        task, at.task = at.task, None
        if failure.whose is not Whose.PICTURE:
            found = self._pictures.get(task.picture)
            if found is not None and failure.whose is Whose.SURROUNDINGS:
                self._orders += 1
                found.order, found.losses = self._orders, found.losses - 1  # the others first, and no loss
            return self._give_back(task, failure)
        if task.picture not in self._pictures:
            return None
        self.drop(task.picture)
        return task.picture, failure

    def begun(self, worker: str, began: Began) -> None:
        """A task of kind BEGIN is done."""
        picture, task = self._end(worker)
        if picture is not None and task is not None:
            picture.began = began
            _lay_out(picture, began)
            for box, level in picture.looks:
                self.look(task.picture, box, level=level)
            picture.looks.clear()

    def drawn(self, worker: str, keys: Iterable[ShardKey], *, now: float) -> None:
        """Shards of the task are stored: all of them, or those before an error."""
        keys = list(keys)
        at = self._workers.get(worker)
        picture, task = self._end(worker)
        if picture is None or task is None or at is None:
            return
        for key in keys:
            _store(picture, key)
        megapixels = picture.megapixels_of(keys)
        if megapixels and now > at.since:
            rate = megapixels / (now - at.since)
            old = self.megapixels_per_s
            self.megapixels_per_s = rate if old is None else old + _SMOOTHING * (rate - old)
        _put_back(picture, [key for key in task.keys if key not in set(keys)])

    def finished(self, worker: str) -> str | None:
        """A task of kind FINISH is done: the picture, which is not here any more."""
        at = self._workers.get(worker)
        if at is None or at.task is None or at.task.picture not in self._pictures:
            return None
        name = at.task.picture
        self._end(worker)
        self.drop(name)
        return name

    def _give_back(self, task: Task, failure: Failure) -> tuple[str, Failure] | None:
        picture = self._pictures.get(task.picture)
        if picture is None or picture.tasks.pop(task.number, None) is None:
            return None
        _put_back(picture, task.keys)
        picture.losses += 1
        if picture.losses < MOST_LOSSES:
            return None
        self.drop(task.picture)
        return task.picture, failure

    def _end(self, worker: str) -> tuple[_Picture | None, Task | None]:
        """Takes a worker's task from it, as done."""
        at = self._workers.get(worker)
        if at is None or at.task is None:
            return None, None
        task, at.task = at.task, None
        picture = self._pictures.get(task.picture)
        if picture is None or picture.tasks.pop(task.number, None) is None:
            return None, None
        picture.losses = 0
        return picture, task

    def _next(self) -> str | None:
        """The picture that the next task is for: of the owner that has had the least."""
        best: tuple[tuple[float, bool, int], str] | None = None
        for name, picture in self._pictures.items():
            if picture.has_task:
                is_seen = bool(picture.looked_at or picture.looks)
                rank = (self._had.get(picture.owner, 0.0), not is_seen, picture.order)
                if best is None or rank < best[0]:
                    best = rank, name
        return None if best is None else best[1]

    def _task(self, name: str) -> Task:
        picture = self._pictures[name]
        if picture.began is None:
            return Task(self._numbers, name, Kind.BEGIN)
        if picture.all_drawn:
            return Task(self._numbers, name, Kind.FINISH)
        return Task(self._numbers, name, Kind.DRAW, tuple(self._keys(picture)))

    def _keys(self, picture: _Picture) -> list[ShardKey]:
        if picture.ready:
            return [picture.ready.popleft() for _ in range(min(MOST_SHARDS, len(picture.ready)))]
        source = picture.looked_at or picture.waiting
        keys: list[ShardKey] = []
        for key in list(source)[: self._shards_at_once(picture)]:
            picture.looked_at.pop(key, None)
            del picture.waiting[key]
            keys.append(key)
        return keys

    def _shards_at_once(self, picture: _Picture) -> int:
        if self.megapixels_per_s is None or picture.began is None:
            return 1
        shard_s = picture.megapixels_of([ShardKey(0, 0, 0)]) / self.megapixels_per_s
        return max(1, min(MOST_SHARDS, int(TASK_S / shard_s)))


def _lay_out(picture: _Picture, began: Began) -> None:
    grid = began.grid
    for level in range(1, len(grid.level_sizes)):
        for key in grid.keys(level):
            region = grid.box(key).scaled(2).intersection(Box.of(grid.level_size(level - 1)))
            sources = set(grid.keys_in(region, level=level - 1))
            picture.missing[key] = sources
            for source in sources:
                picture.users.setdefault(source, []).append(key)
    picture.waiting = dict.fromkeys(grid.keys(0))
    for key in sorted(began.done):
        _store(picture, key)


def _store(picture: _Picture, key: ShardKey) -> None:
    """A shard has its record."""
    picture.done.add(key)
    picture.waiting.pop(key, None)
    picture.looked_at.pop(key, None)
    if key in picture.ready:
        picture.ready.remove(key)
    for user in picture.users.get(key, ()):
        missing = picture.missing[user]
        missing.discard(key)
        if not missing and user not in picture.done and user not in picture.ready:
            picture.ready.append(user)


def _put_back(picture: _Picture, keys: Iterable[ShardKey]) -> None:
    """To be given out again, before all others."""
    full = [key for key in keys if key.level == 0]
    picture.waiting = {**dict.fromkeys(full), **picture.waiting}
    picture.ready.extendleft(reversed([key for key in keys if key.level > 0]))
