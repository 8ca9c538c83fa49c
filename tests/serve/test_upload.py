"""Uploads: whole files on the disk, however the bytes come, and a refusal before anything is too much."""

import asyncio
import hashlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import BadRequest, BodyTooLarge, EngineError, SlowClient, StoreFull, TooManyPixels
from engine.serve import upload
from engine.serve.upload import EARLY_BYTES, MOST_TEXT_BYTES, receive

BOUNDARY = "xyzzy"
KIND = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, data: bytes, *, filename: str | None = None, more: str = "") -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n{more}\r\n'
    return head.encode() + data + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


def taken(data: bytes, folder, *, size: int = 1000, kind: str | None = KIND, max_bytes: int = 1 << 30, early=None):
    return asyncio.run(
        receive(
            pieces(data, size),
            kind,
            folder,
            max_bytes=max_bytes,
            keep_free_bytes=1000,
            early=early or (lambda path, options: None),
        )
    )


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_files_arrive_whole_in_any_pieces(tmp_path, size):
    pixels, mask = bytes(range(256)) * 20, b"--xyzzy\r\n--xyzz" * 9
    data = body(
        part("options", b'{"scale": 4}'), part("mask", mask, filename="m.png"), part("image", pixels, filename="é.png")
    )
    form = taken(data, tmp_path, size=size)
    assert form.texts == {"options": b'{"scale": 4}'}
    assert form.num_bytes == len(data)
    for name, content in (("image", pixels), ("mask", mask)):
        assert form.files[name].path.read_bytes() == content
        assert form.files[name].sha256 == hashlib.sha256(content).hexdigest()
        assert form.files[name].num_bytes == len(content)
    assert form.files["image"].name == "é.png"


IMAGE = part("image", b"pixels", filename="a.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends after 0 bytes"),
        (b"nonsense", "malformed"),
        (body(), "0 files are called `image`"),
        (body(part("options", b"{}")), "0 files are called `image`"),
        (IMAGE, "without its last boundary"),
        (body(IMAGE, IMAGE), "sent twice"),
        (body(IMAGE, part("other", b"")), "not `image`"),
        (body(part("image", b"http://somewhere/a.png")), "no address is ever fetched"),
        (body(part("image", b"", filename="a.png")), "has 0 bytes"),
        (body(IMAGE, part("options", b"x" * (MOST_TEXT_BYTES + 1))), "more than 16,384 bytes"),
        (body(*(part("options", b"") for _ in range(10_000))), "sent twice"),
        (body(part("image", b"x", filename="a.png", more="X: y\r\n" * 50)), "malformed"),
        (body(part("image", b"x", filename="a.png", more=f"X: {'y' * 10**6}\r\n")), "malformed"),
    ],
)
def test_what_is_no_upload(tmp_path, data, message):
    with pytest.raises(BadRequest, match=message):
        taken(data, tmp_path)


@pytest.mark.parametrize(
    "kind", [None, "", "image/png", "multipart/form-data", f"multipart/form-data; boundary={'x' * 71}", "multipart/é"]
)
def test_other_kinds_of_bodies(tmp_path, kind):
    with pytest.raises(BadRequest, match="multipart/form-data"):
        taken(body(IMAGE), tmp_path, kind=kind)


def test_no_byte_more_than_allowed(tmp_path):
    data = body(part("image", b"x" * 5000, filename="a.png"))
    taken(data, tmp_path, max_bytes=len(data))
    with pytest.raises(BodyTooLarge, match=f"{len(data) - 1:,} bytes"):
        taken(data, tmp_path, max_bytes=len(data) - 1)


def test_the_disk_is_never_filled(tmp_path, monkeypatch):
    def free(folder) -> int:
        return 300_000 - sum(path.stat().st_size for path in folder.iterdir())

    monkeypatch.setattr("engine.serve.upload.free_bytes", free)
    taken(body(part("image", b"x" * 290_000, filename="a.png")), tmp_path)
    (tmp_path / "image").unlink()
    with pytest.raises(StoreFull, match="bytes have come"):
        taken(body(part("image", b"x" * 310_000, filename="a.png")), tmp_path)
    assert free(tmp_path) >= 1000


def test_the_header_is_looked_at_while_the_rest_is_on_its_way(tmp_path):
    seen: list[int] = []

    def early(path, options) -> None:
        seen.append(path.stat().st_size)
        told.append(options)
        raise TooManyPixels("image: too many")

    told: list[bytes | None] = []
    image, options = part("image", b"x" * (4 << 20), filename="a.png"), part("options", b'{"scale": 2}')
    for data in (body(image, options), body(options, image)):
        with pytest.raises(TooManyPixels):
            taken(data, tmp_path, size=16 << 10, early=early)
        assert EARLY_BYTES <= seen[-1] < EARLY_BYTES + (32 << 10)
    assert told == [None, b'{"scale": 2}']


def test_who_sends_nothing_or_next_to_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(upload, "SILENCE_S", 0.2)

    async def silent() -> AsyncIterator[bytes]:
        yield body(IMAGE)[:20]
        await asyncio.sleep(30)

    async def dripping() -> AsyncIterator[bytes]:
        for at in range(10_000):
            yield body(part("image", b"x" * 10_000, filename="a.png"))[at : at + 1]
            await asyncio.sleep(0.01)

    for client in (silent, dripping):
        with pytest.raises(SlowClient):
            asyncio.run(
                receive(
                    client(), KIND, tmp_path, max_bytes=1 << 20, keep_free_bytes=0, early=lambda path, options: None
                )
            )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_body_is_taken_or_refused(tmp_path, data):
    text = body(part("options", b"{}"), part("mask", b"m" * 50, filename="m.png"), IMAGE)
    at = data.draw(st.integers(0, len(text) - 1))
    cut = data.draw(st.integers(0, 30))
    mutant = text[:at] + data.draw(st.binary(max_size=30)) + text[at + cut :]
    try:
        form = taken(mutant, tmp_path, size=data.draw(st.integers(1, 400)))
    except EngineError:
        return
    assert "image" in form.files
