"""The front desk of a service: what it accepts, what it knows of each job, what it tells the scheduler.

All is done on one event loop; what touches the disk or takes time runs in threads.
"""

import asyncio
import hmac
import logging
import secrets
import shutil
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import (
    BodyTooLarge,
    Conflict,
    InputError,
    MaskMismatch,
    NotFound,
    OutputTooLarge,
    QueueFull,
    StoreFull,
    TooManyPixels,
    TooManyRequests,
)
from engine.geometry import Box, Size
from engine.header import SUFFIXES, format_of, read_header
from engine.isolate import probe_in_child
from engine.request import Request, output_size, render_scale
from engine.serve.archive import Archive, End, Job, Options, Picture, new_id, stored_bytes, work_of
from engine.serve.gallery import Gallery
from engine.serve.keys import ANYBODY, Owner
from engine.serve.queue import LEAST_MEGAPIXELS, Failure, Progress, State
from engine.serve.upload import File, Form, receive
from engine.store import free_bytes, write_atomic
from engine.tiling.grid import Grid
from engine.tiling.plan import canvas_bytes

if TYPE_CHECKING:
    from engine.serve.cluster import Snapshot

log = logging.getLogger(__name__)

FOLLOW_S = 0.2
SWEEP_S = 60.0
RETRY_S = 5.0
"""What a client is told to wait where no rate is known."""
READY_WITHIN_S = 10.0
"""The scheduler has answered within, or the service is not ready."""
HUNG_S = 60.0
"""The longest task may take, or the service is not ready; its replica is given more time."""
MOST_LOOKS = 1000
MOST_STREAMS = 64
"""Of events, for each owner."""
MOST_JOBS_OF_A_PICTURE = 1000
MOST_DRAWN_AT_ONCE_PX = 1 << 25
"""Of the input, for a shard of a smaller output: a task that takes minutes looks as if it hung."""
_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before anything is decoded."""

    max_bytes: int = 2 << 30
    """Of one request's body."""
    max_pixels: int = 1 << 28
    """Of an input."""
    max_output_pixels: int = 1 << 34
    max_queue_megapixels: float = 20_000.0
    """Of output, waiting or drawn, of all keys together; one key may fill half of it, where there are keys."""
    max_waiting_uploads: int = 64
    retention_s: float = 7 * 86400.0
    """After their end pictures are removed."""
    keep_free_bytes: int = 1 << 30
    """Of the disk."""


@dataclass(slots=True, eq=False)
class _Upload:
    """On its way, or about to be accepted."""

    owner: str
    megapixels: float
    """That are kept for it: as many as the owner's last picture has, until more is known."""


@dataclass(slots=True)
class Desk:
    """See the module. `scheduler` is a handle of `engine.serve.cluster.Scheduler`."""

    archive: Archive
    scheduler: Any
    limits: Limits
    model_sha256: str = ""
    """Of the weights that restore."""
    gallery: Gallery = field(default_factory=Gallery)
    told: "Snapshot | None" = None
    told_at: float = float("-inf")
    _secret: bytes = b""
    _looks: dict[tuple[str, Box, int], None] = field(default_factory=dict[tuple[str, Box, int], None])
    _fresh: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])
    """Accepted and not in a snapshot yet: owners and megapixels."""
    _last: dict[str, float] = field(default_factory=dict[str, float])
    """Megapixels of an owner's last picture: no body is read where one more like it would find no room."""
    _uploads: set[_Upload] = field(default_factory=set[_Upload])
    _known: tuple[str, int] = "", 0
    """A generation of the scheduler, and how many of its ends are stored."""
    _repeated: set[str] = field(default_factory=set[str])
    """Jobs that were sent again with their idempotency key."""
    _exporting: dict[str, asyncio.Lock] = field(default_factory=dict[str, asyncio.Lock])
    _accepting: asyncio.Lock = field(default_factory=asyncio.Lock)
    _untold: bool = False
    """Whether the scheduler may not know of all that is to be done."""
    _streams: Counter[str] = field(default_factory=Counter[str])
    """Of events, by owner."""

    def __post_init__(self) -> None:
        path = self.archive.root / "secret"
        if not path.exists():
            write_atomic(path, secrets.token_bytes(32))
            path.chmod(0o600)
        self._secret = path.read_bytes()

    # What is asked.

    def job(self, job_id: str, owner: Owner | None) -> Job:
        """A job of an owner, or of anybody's where the caller may look at it otherwise. Raises NotFound."""
        job = self.archive.jobs.get(job_id)
        if job is None or (owner is not None and job.owner != owner.name):
            raise NotFound("0 jobs of this key have this id")
        return job

    def token(self, job_id: str) -> str:
        """Who has it may look at a job: it is in the addresses that are given out."""
        return hmac.new(self._secret, job_id.encode(), sha256).hexdigest()[: 2 * _TOKEN_BYTES]

    def is_token(self, job_id: str, token: str) -> bool:
        return hmac.compare_digest(self.token(job_id).encode(), token.encode())

    def progress(self, picture: str) -> tuple[Progress, Failure | None]:
        """How far a picture is."""
        end = self.archive.ends.get(picture)
        if end is not None:
            state = State.DONE if end.failure is None else State.FAILED
            return Progress(state, 1.0 if end.failure is None else 0.0, None, 0.0), end.failure
        found = None if self.told is None else self.told.progress.get(picture)
        return found or Progress(State.QUEUED, 0.0, None, None), None

    def folder(self, job: Job) -> Path:
        return self.archive.folder(job.picture)

    def look(self, job: Job, box: Box, *, level: int) -> None:
        """Someone sees a part of a picture that is not finished."""
        self._looks[job.picture, box, level] = None
        if len(self._looks) > MOST_LOOKS:  # while the scheduler is away
            del self._looks[next(iter(self._looks))]

    @property
    def is_ready(self) -> bool:
        """Whether new work would be done: the scheduler answers, a worker lives, none hangs, the disk has room."""
        if self.told is None or time.monotonic() - self.told_at > READY_WITHIN_S or self.told.longest_s > HUNG_S:
            return False
        return self.told.num_workers > 0 and free_bytes(self.archive.root) > self.limits.keep_free_bytes

    # What is accepted.

    def check_room(self, owner: Owner, *, num_bytes: int, megapixels: float) -> None:
        """Raises TooManyRequests, QueueFull or StoreFull where there is no room for more work."""
        self._check_queue(owner, megapixels)
        self._check_store(owner, num_bytes)

    def _check_queue(self, owner: Owner, megapixels: float) -> None:
        to_come = [*self._fresh.values(), *((upload.owner, upload.megapixels) for upload in self._uploads)]
        left = sum(mp for _, mp in to_come)
        of_owner = sum(mp for name, mp in to_come if name == owner.name)
        rate = None
        if self.told is not None:
            left += self.told.megapixels_left
            of_owner += self.told.megapixels_left_of.get(owner.name, 0.0)
            rate = self.told.megapixels_per_s
        most = self.limits.max_queue_megapixels
        retry_s = RETRY_S if not rate else min(600.0, max(1.0, 0.1 * left / rate))
        if owner != ANYBODY and of_owner and of_owner + megapixels > most / 2:
            raise TooManyRequests(
                f"{of_owner:.0f} megapixels of this key wait, {most / 2:.0f} are its share; wait for some to be done",
                retry_after_s=retry_s,
            )
        if left and left + megapixels > most:
            raise QueueFull(f"{left:.0f} megapixels wait, {most:.0f} are the most; wait", retry_after_s=retry_s)

    def _check_store(self, owner: Owner, num_bytes: int) -> None:
        used = self.archive.bytes_of(owner.name)
        if used + num_bytes > owner.max_bytes:
            raise StoreFull(
                f"{used + num_bytes:,} bytes are needed for this key's pictures, it may have {owner.max_bytes:,}; "
                "delete some"
            )
        free = free_bytes(self.archive.root) - self.limits.keep_free_bytes - self._promised_bytes
        if num_bytes > free:
            raise StoreFull(f"{num_bytes:,} bytes are needed, {max(0, free):,.0f} are free; come back later")

    @property
    def _promised_bytes(self) -> float:
        """What the pictures that have not ended may still take: half of it as a canvas, which grows."""
        running = [one for one in list(self.archive.pictures.values()) if one.id not in self.archive.ends]
        return sum(one.projected_bytes * (1 - self.progress(one.id)[0].share / 2) for one in running)

    def _check_uploads(self, owner: Owner) -> None:
        uploads = sum(upload.owner == owner.name for upload in self._uploads)
        if owner != ANYBODY and uploads >= self.limits.max_waiting_uploads / 2:
            raise TooManyRequests(f"{uploads} uploads of this key are on their way, its share; wait", retry_after_s=1.0)
        if len(self._uploads) >= self.limits.max_waiting_uploads:
            raise QueueFull(f"{len(self._uploads)} uploads are on their way, the most at once; wait", retry_after_s=1.0)

    async def submit(
        self,
        owner: Owner,
        body: AsyncIterator[bytes],
        *,
        content_type: str | None,
        content_length: int | None,
        idempotency_key: str | None,
        parse_options: Callable[[bytes], Options],
    ) -> tuple[Job, bool]:
        """Takes an upload; whether it is a new job. Durable when this returns. Raises what says why not."""
        if (content_length or 0) > self.limits.max_bytes:
            raise BodyTooLarge(
                f"{content_length:,} bytes are to come, {self.limits.max_bytes:,} are the most; send less"
            )
        self._check_uploads(owner)
        is_known = idempotency_key is not None and self.archive.find_job(owner.name, idempotency_key) is not None
        most = self.limits.max_queue_megapixels / 10  # one that is large does not keep all others out
        expected = max(LEAST_MEGAPIXELS, min(most, self._last.get(owner.name, 0.0)))
        if not is_known:
            self.check_room(owner, num_bytes=content_length or 0, megapixels=expected)
        upload = _Upload(owner.name, 0.0 if is_known else expected)
        self._uploads.add(upload)
        try:
            folder = await asyncio.to_thread(self.archive.incoming)
            try:
                form = await receive(
                    body,
                    content_type,
                    folder,
                    max_bytes=self.limits.max_bytes,
                    keep_free_bytes=self.limits.keep_free_bytes,
                    early=lambda path, options: self._check_beginning(
                        path, None if options is None else parse_options(options)
                    ),
                )
                options = parse_options(form.texts.get("options", b"{}"))
                picture = await asyncio.to_thread(self._probed, owner, form, options, folder)
                name = form.files["image"].name
                job = Job(new_id(), owner.name, picture.id, name, time.time(), idempotency_key)
                return await self._accept(owner, upload, folder, picture, job)
            finally:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        finally:
            self._uploads.remove(upload)

    async def _accept(
        self, owner: Owner, upload: _Upload, folder: Path, picture: Picture, job: Job
    ) -> tuple[Job, bool]:
        async with self._accepting:  # or the same request, sent twice at once, were two jobs
            key = job.idempotency_key
            if key is not None and (known := self.archive.find_job(owner.name, key)):
                if (same := self.archive.pictures.get(known.picture)) is None or same.work != picture.work:
                    raise Conflict("the idempotency key was used for 1 other picture; choose a new one for this")
                self._repeated.add(known.id)
                return known, False
            self._last[owner.name], upload.megapixels = picture.megapixels, 0.0
            if self.archive.needs_work(picture.work):
                self.check_room(owner, num_bytes=picture.projected_bytes, megapixels=picture.megapixels)
            elif (jobs := self.archive.num_jobs(picture.work)) >= MOST_JOBS_OF_A_PICTURE:
                raise TooManyRequests(
                    f"{jobs} jobs are of this very picture, {MOST_JOBS_OF_A_PICTURE} are the most; use one of them",
                    retry_after_s=RETRY_S,
                )
            upload.megapixels = picture.megapixels
            job = await asyncio.to_thread(self.archive.accept, folder, picture, job)
            upload.megapixels = 0.0
        accepted = self.archive.pictures.get(job.picture)  # another one of equal work, or already deleted
        if accepted is not None and accepted.id not in self.archive.ends:
            self._fresh[accepted.id] = owner.name, accepted.megapixels
            try:
                await self._add([accepted])
            except Exception:  # it is accepted, whatever becomes of the scheduler
                self._untold = True
                log.warning("the scheduler does not answer", exc_info=True)
        return job, True

    async def leave(self, job: Job) -> None:
        """Who has sent a picture and waited for it has left: it is cancelled, unless it was sent again meanwhile."""
        async with self._accepting:  # or it were told that it is accepted, and removed then
            gone = None if job.id in self._repeated else await asyncio.to_thread(self._forget, job)
        await self._remove(gone)

    def _forget(self, job: Job) -> tuple[str, Path] | None:
        """The picture to be dropped with a job, and where its folder lies now."""
        gone = self.archive.drop(job.id)
        self._repeated.discard(job.id)
        if gone is not None:
            self.gallery.forget(self.archive.folder(gone[0]))
            self._fresh.pop(gone[0], None)
        return gone

    async def delete(self, job: Job) -> None:
        """Ends a job and removes what only it needs."""
        await self._remove(await asyncio.to_thread(self._forget, job))

    async def _remove(self, gone: tuple[str, Path] | None) -> None:
        if gone is not None:
            picture, aside = gone
            await asyncio.to_thread(shutil.rmtree, aside, ignore_errors=True)
            try:
                await self.scheduler.drop.remote(picture)
            except Exception:  # it is started anew, and will not be told of this picture
                log.warning("the scheduler does not answer", exc_info=True)

    @asynccontextmanager
    async def exporting(self, job: Job, owner: Owner) -> AsyncGenerator[None]:
        """While a file is made of a finished picture: one after another for each key. Raises StoreFull and NotFound."""
        async with self._exporting.setdefault(owner.name, asyncio.Lock()):
            picture = self.archive.pictures.get(job.picture)
            if picture is None:
                raise NotFound("the job was deleted")
            self._check_store(owner, picture.projected_bytes)
            try:
                yield
            except Exception:
                if job.id not in self.archive.jobs:
                    raise NotFound("the job was deleted") from None
                raise

    @contextmanager
    def watching(self, job: Job) -> Generator[None]:
        """While events of a job are sent. Raises TooManyRequests where its owner has too many such streams."""
        if self._streams[job.owner] >= MOST_STREAMS:
            raise TooManyRequests(
                f"{self._streams[job.owner]} streams of events of this key are open, the most; end some",
                retry_after_s=RETRY_S,
            )
        self._streams[job.owner] += 1
        try:
            yield
        finally:
            self._streams[job.owner] -= 1

    def _check_beginning(self, path: Path, options: Options | None) -> None:
        """Of an upload on its way: refuses what its header, and options that came before, already say is too much."""
        with path.open("rb") as file:
            kind = format_of(file.read(16))
            if kind is None:
                return  # said when all of it is there, with the reason
            file.seek(0)
            try:
                size = read_header(file, path.with_suffix(SUFFIXES[kind][0])).size
            except InputError:
                return  # the header may not be complete
        if size.num_pixels > self.limits.max_pixels:
            raise TooManyPixels(
                f"image: the header says {size.num_pixels:,} pixels, {self.limits.max_pixels:,} are the most; send less"
            )
        if options is not None:
            self._output(size, options)

    def _output(self, size: Size, options: Options) -> Size:
        """Of a picture of a size. Raises what says why there is none."""
        request = Request(scale=options.scale, long_side_px=options.long_side_px)
        render_scale(request, size)  # or it is more than the network enlarges
        output = output_size(request, size)
        if output.num_pixels > self.limits.max_output_pixels:
            raise OutputTooLarge(
                f"the output would have {output.num_pixels:,} pixels, {self.limits.max_output_pixels:,} are the most; "
                "ask for a lower scale"
            )
        at_once = Box.of(Grid(output).shard_shape(0)).intersection(Box.of(output)).size.num_pixels
        drawn = at_once * size.num_pixels // output.num_pixels
        if drawn > MOST_DRAWN_AT_ONCE_PX:
            raise TooManyPixels(
                f"{size.num_pixels:,} pixels become {output.num_pixels:,}: {drawn:,} are drawn at once, "
                f"{MOST_DRAWN_AT_ONCE_PX:,} are the most; ask for a larger long side, and reduce the result"
            )
        return output

    def _probed(self, owner: Owner, form: Form, options: Options, folder: Path) -> Picture:
        """What was uploaded, with names that say what it is, as far as headers tell."""
        image, mask = form.files["image"], form.files.get("mask")
        path = _named(image)
        try:
            info = probe_in_child(path, max_pixels=self.limits.max_pixels, page=options.page)
            masked = None if mask is None else _named(mask)
            if masked is not None:
                found = probe_in_child(masked, max_pixels=self.limits.max_pixels)
                if found.size != info.size:
                    raise MaskMismatch(
                        f"mask: is {found.size} px, the image is {info.size} px; make them the same size"
                    )
        except InputError as error:
            raise type(error)(str(error).replace(f"{folder}/", "")) from None
        output = self._output(info.size, options)
        sizes = (output, info.size) if mask is None else (output, info.size, info.size)
        projected = 2 * sum(canvas_bytes(Grid(size), info.channels, info.dtype) for size in sizes)
        return Picture(
            id=new_id(),
            work=work_of(
                owner.name,
                image.sha256,
                None if mask is None else mask.sha256,
                options,
                model_sha256=self.model_sha256,
            ),
            owner=owner.name,
            image=path.name,
            mask=None if masked is None else masked.name,
            options=options,
            size=info.size,
            output=output,
            projected_bytes=projected + form.num_bytes,
        )

    # What goes on.

    async def follow(self) -> None:
        """Asks the scheduler where it is, for ever, and tells it what it does not know."""
        while True:
            try:
                await self._follow_once()
            except Exception:
                log.warning("the scheduler does not answer, or the disk takes nothing", exc_info=True)
            await asyncio.sleep(FOLLOW_S)

    async def keep_clean(self) -> None:
        """Removes what has expired, for ever; beside `follow`, for it may take long."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep(time.time())
            except Exception:
                log.warning("the disk takes nothing", exc_info=True)

    async def sweep(self, now: float) -> int:
        """Removes what has ended long ago; how many jobs."""
        expired = self.archive.expired(now - self.limits.retention_s)
        for job in expired:
            await self.delete(job)
        await asyncio.to_thread(self.archive.tidy)
        return len(expired)

    async def _follow_once(self) -> None:
        looks, self._looks = list(self._looks), {}
        told: Snapshot = await self.scheduler.snapshot.remote(looks, *self._known)
        if told.generation != self._known[0]:
            self._known, self._untold = (told.generation, 0), True
        for number, (picture, failure) in enumerate(told.ended, start=told.first + 1):
            if number > self._known[1]:
                try:
                    await asyncio.to_thread(self._end, picture, failure)
                except Exception:
                    log.warning("the end of %s cannot be stored yet", picture, exc_info=True)
                    break  # it is told again
                self._known = told.generation, number
        else:
            if self._untold:
                await self._add(self.archive.unfinished())
                self._untold = False
        for picture in [name for name in self._fresh if name in told.progress or name in self.archive.ends]:
            del self._fresh[picture]
        self.told, self.told_at = told, time.monotonic()

    def _end(self, picture: str, failure: Failure | None) -> None:
        folder = self.archive.folder(picture)
        if picture in self.archive.pictures and picture not in self.archive.ends:
            self.archive.end(picture, End(time.time(), failure, stored_bytes(folder)))
        self.gallery.forget(folder)

    async def _add(self, pictures: list[Picture]) -> None:
        await self.scheduler.add.remote([(picture.id, picture.owner, picture.megapixels) for picture in pictures])


def _named(file: File) -> Path:
    """Gives an uploaded file the suffix of what it holds, or, where that is unknown, of what it is called."""
    with file.path.open("rb") as opened:
        kind = format_of(opened.read(16))
    known = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}
    called = Path(file.name).suffix.lower()
    suffix = SUFFIXES[kind][0] if kind is not None else called if called in known else ".bin"
    path = file.path.with_suffix(suffix)
    file.path.rename(path)
    return path
