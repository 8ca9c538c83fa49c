"""What is told of a batch is what its catalog holds, and nothing in a name or message can change the page."""

import base64
import io
import json
import os
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from typer.testing import CliRunner

from engine.batch.catalog import CatalogWriter, add_reviews, catalog_folder, load_catalog
from engine.batch.page import MOST_LISTED, MOST_SHOWN, write_html
from engine.batch.parts import Output
from engine.batch.report import MOST_SPANS, duration, status, summarize, to_json, to_text
from engine.batch.thumbnail import LONG_SIDE_PX, Thumbnail, after, before, of_file
from engine.cli import app
from engine.errors import UnreadableInput
from engine.geometry import Size
from engine.outputs import batch_lock
from engine.store import FileLock
from engine.tiling.canvas import Canvas
from engine.tiling.execute import run
from engine.tiling.grid import Grid
from engine.tiling.plan import Plan
from engine.tiling.pyramid import HalveShard
from tests.batch.test_catalog import refused, restored, row, write

NOW = datetime(2026, 11, 21, 15, 0, 0, tzinfo=UTC)


def note_job(out, total: int, started: datetime) -> None:
    path = out / "_batch" / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"total": total, "request_id": "r" * 64}))
    os.utime(path, (started.timestamp(),) * 2)


@pytest.fixture
def running(tmp_path):
    lock = FileLock.try_take(batch_lock(tmp_path))
    assert lock is not None
    yield tmp_path
    lock.release()


def test_counts_rate_and_time_left(running):
    note_job(running, 1000, NOW - timedelta(hours=2))
    minutes = [row(str(n), finished=NOW - timedelta(minutes=n)) for n in range(60)]
    write(running, *minutes, refused("bad"), row("older", request_id="other", finished=NOW - timedelta(days=3)))
    add_reviews(running, {"1": ("accepted", None)})
    found = summarize(running, load_catalog(running), now=NOW)
    assert (found.running, found.total, found.finished) == (True, 1000, 62)
    assert found.counts == {"done": 61, "refused": 1, "failed": 0}
    assert found.reviews == {"pending": 60, "accepted": 1, "rejected": 0}
    assert found.megapixels == pytest.approx(61 * 1.5)
    assert found.rate == pytest.approx(6 / 300)  # at 0, 1 ... 5 minutes before now
    assert found.megapixel_rate == pytest.approx(6 * 1.5 / 300)
    assert found.left_s == pytest.approx((1000 - 61) * 50)  # what was made for another request says nothing of this one
    assert summarize(running, load_catalog(running), total=61, now=NOW).left_s == 0


def test_the_rate_of_a_young_batch_is_over_its_own_time(running):
    note_job(running, 100, NOW - timedelta(seconds=20))
    write(running, *(row(str(n), finished=NOW - timedelta(seconds=n)) for n in range(10)))
    write(running, *(row(f"earlier {n}", finished=NOW - timedelta(seconds=60 + n)) for n in range(10)))
    assert summarize(running, load_catalog(running), now=NOW).rate == pytest.approx(0.5)


def test_an_ended_batch_has_the_rate_of_its_last_minutes_and_no_time_left(tmp_path):
    note_job(tmp_path, 100, NOW - timedelta(hours=9))
    write(tmp_path, *(row(str(n), finished=NOW - timedelta(hours=8, seconds=n)) for n in range(600)))
    found = summarize(tmp_path, load_catalog(tmp_path), now=NOW)
    assert (found.running, found.left_s) == (False, None)
    assert found.rate == pytest.approx(1, rel=0.01)


def test_failures_come_newest_first_with_their_reasons_counted(tmp_path):
    bad = [refused(str(n)) for n in range(3)]
    bad.append(row("x", status="failed", reason="worker-lost", message="Look at it.", finished=NOW))
    write(tmp_path, *bad, row("good"))
    found = status(tmp_path)
    assert found.failures[0].name == "x"
    assert list(found.reasons.items()) == [("unreadable-input", 3), ("worker-lost", 1)]
    assert to_json(found)["failures"][0]["name"] == "x"


@pytest.mark.parametrize(
    "apart", [timedelta(milliseconds=1), timedelta(seconds=7), timedelta(hours=5), timedelta(days=9)]
)
def test_the_series_holds_every_picture_in_few_spans_without_gaps(apart, tmp_path):
    count = 400
    write(tmp_path, *(row(str(n), finished=NOW + n * apart) for n in range(count)), refused("bad"))
    series = status(tmp_path).series
    assert (sum(span.done for span in series), sum(span.not_done for span in series)) == (count, 1)
    assert len(series) <= MOST_SPANS
    begins = [span.begin for span in series]
    assert {later - earlier for earlier, later in pairwise(begins)} <= {timedelta(seconds=series[0].seconds)}


def test_a_folder_without_a_batch_is_refused(tmp_path):
    with pytest.raises(UnreadableInput, match="holds no batch"):
        status(tmp_path)


def test_a_batch_that_has_finished_nothing_yet_is_shown(running):
    (running / "_batch" / "job.json").write_text("no JSON")
    found = status(running)
    assert (found.finished, found.total, found.rate, found.left_s, found.series) == (0, None, 0, None, ())
    assert "0 pictures finished" in to_text(found)
    assert write_html(running).exists()


def test_the_text_obeys_no_name(tmp_path):
    write(tmp_path, refused("a\x1b[2J\u202e\udcff\nb"))
    text = to_text(status(tmp_path))
    assert "a\\x1b[2J\\u202e\\udcff\\nb: refused, unreadable-input" in text
    assert text.isascii()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "1 h 30 min"), (7200, "2 h 0 min"), (200_000, "2 d 8 h")],
)
def test_durations_are_told_in_two_units(seconds, said):
    assert duration(seconds) == said


# The page


class Page(HTMLParser):
    """Tags with their attributes and all text, and whether tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def page(out) -> Page:
    found = Page(write_html(out).read_text(encoding="utf-8"))
    assert found.open == []
    return found


def test_names_and_messages_are_text_on_the_page(tmp_path):
    evil = "<script>alert(1)</script>\"'&{style}\u202e\udcff"
    write(
        tmp_path,
        row(evil, image="x" + evil),
        refused("b" + evil),
        row("c", status="failed", reason=evil, message=evil),
    )
    add_reviews(tmp_path, {evil: ("rejected", evil)})
    found = page(tmp_path)
    assert {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "base", "form"} == set()
    assert not any(
        name.startswith("on") or name in ("href", "style")
        for tag, attributes in found.tags
        for name in attributes
        if tag != "span"
    )
    assert "".join(found.text).count("<script>alert(1)</script>\"'&{style}\\u202e\\udcff") >= 5


def test_the_page_asks_for_nothing_and_tells_readers_where_they_are(tmp_path):
    write(tmp_path, *(row(str(n)) for n in range(3)), refused("bad"))
    found = page(tmp_path)
    assert all(
        attributes["src"].startswith("data:image/jpeg;base64,") for tag, attributes in found.tags if tag == "img"
    )
    assert not re.search(r"url\(|@import|https?:", (tmp_path / "_batch" / "status.html").read_text())
    policy = next(a["content"] for tag, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    headings = [tag for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1
    assert all(int(later[1]) - int(earlier[1]) <= 1 for earlier, later in pairwise(headings))
    labelled = {a["aria-labelledby"] for _, a in found.tags if "aria-labelledby" in a}
    assert labelled == {a["id"] for _, a in found.tags if "id" in a}
    assert ("html", {"lang": "en"}) in found.tags


def test_a_large_archive_makes_a_page_of_bounded_size(tmp_path):
    with CatalogWriter(tmp_path) as writer:
        for number in range(3000):
            writer.add(row(f"{number:05d}", image="gone"))
            writer.add(refused(f"bad {number:05d}"))
    found = page(tmp_path)
    text = "".join(found.text)
    assert sum(tag == "h3" for tag, _ in found.tags) == MOST_SHOWN
    assert f"newest {MOST_LISTED:,}" in text
    assert "00000" in text
    assert "02975" in text
    assert (tmp_path / "_batch" / "status.html").stat().st_size < 2_000_000


def test_damaged_parts_are_named(tmp_path):
    write(tmp_path, row("a"))
    (catalog_folder(tmp_path) / "part-<x>.parquet").write_bytes(b"x")
    assert "part-<x>.parquet" in "".join(page(tmp_path).text)
    assert "part-<x>.parquet" in to_text(status(tmp_path))


# Thumbnails


def colours(thumbnail: Thumbnail | str) -> np.ndarray:
    """Mean of the left and of the right half, RGB."""
    assert isinstance(thumbnail, Thumbnail), thumbnail
    with Image.open(io.BytesIO(thumbnail.jpeg)) as image:
        assert image.size == (thumbnail.size.w, thumbnail.size.h)
        assert not image.info.keys() & {"exif", "icc_profile"}
        pixels = np.asarray(image.convert("RGB")).astype(float)
    half = pixels.shape[1] // 2
    return np.array([pixels[:, : half - 4].mean((0, 1)), pixels[:, half + 4 :].mean((0, 1))])


def two_colours(h: int = 400, w: int = 800) -> np.ndarray:
    pixels = np.zeros((h, w, 3), np.uint8)
    pixels[:, : w // 2] = (200, 40, 20)
    pixels[:, w // 2 :] = (20, 60, 220)
    return pixels


def known(path, **changes: object):
    found = path.stat()
    return row(path.stem, image=str(path), image_bytes=found.st_size, image_mtime_ns=found.st_mtime_ns, **changes)


@pytest.mark.parametrize("form", ["png", "jpg", "tif", "webp", "jp2", "16 bit", "float", "alpha"])
def test_an_input_of_any_kind_is_shown(form, tmp_path):
    pixels = two_colours()
    path = tmp_path / f"a.{form if form in ('png', 'jpg', 'tif', 'webp', 'jp2') else 'tif'}"
    match form:
        case "16 bit":
            tifffile.imwrite(path, pixels.astype(np.uint16) * 257, photometric="rgb")
        case "float":
            tifffile.imwrite(path, (pixels / 255).astype(np.float32), photometric="rgb")
        case "alpha":
            opaque = np.full((*pixels.shape[:2], 1), 255, np.uint8)
            tifffile.imwrite(path, np.concatenate([pixels, opaque], 2), photometric="rgb", extrasamples=[2])
        case _:
            Image.fromarray(pixels).save(path)
    found = before(known(path))
    assert isinstance(found, Thumbnail)
    assert found.size == Size(LONG_SIDE_PX // 2, LONG_SIDE_PX)
    assert np.abs(colours(found) - [(200, 40, 20), (20, 60, 220)]).max() < 12


def test_a_turned_input_is_shown_upright(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(two_colours()).save(
        path, exif=exif, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    assert colours(before(known(path)))[0][2] > 150


def test_small_pictures_are_not_enlarged(tmp_path):
    Image.fromarray(two_colours(10, 20)).save(tmp_path / "a.png")
    assert of_file(tmp_path / "a.png").size == Size(10, 20)


def test_an_input_that_is_gone_changed_or_damaged_is_told(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(two_colours()).save(path)
    made = known(path)
    path.write_bytes(path.read_bytes()[:300])
    assert before(made) == "the input was changed since"
    assert before(known(path)) == "cannot be shown (damaged)"
    path.write_bytes(b"%PDF-1.7" + bytes(100))
    assert before(known(path)) == "cannot be shown (disguised-input)"
    path.unlink()
    assert before(made) == "the input is not here any more"
    assert before(row(image="s3://bucket/a.png")) == "the input is not here any more"
    assert before(row(image="a\0b")) == "the input is not here any more"


def test_an_output_is_shown_from_a_reduced_level_of_its_canvas(tmp_path):
    size, pixels = Size(700, 1400), two_colours(700, 1400)
    plan = Plan("a", size, 3, "uint8", Grid(size, 128, 256), "a", "none", "lite", "b", {"scale": 1}, 0, 0)
    folder = tmp_path / "1890"
    with Canvas.open(plan, folder) as canvas:
        half = HalveShard(canvas)
        work = lambda key: half(key) if key.level else pixels[plan.grid.box(key).slices]  # noqa: E731
        assert list(run(canvas, plan.grid.all_keys(), work))
        canvas.publish(folder / "a.zarr", replace=False)
    for level in range(2):  # not needed
        (folder / "a.zarr" / str(level) / "c" / "0" / "0" / "0").unlink()
    made = row("1890/a", outputs=(Output("png", "a.png", None, 1), Output("ome-zarr", "a.zarr", "x", 1)))
    found = after(tmp_path, made)
    assert isinstance(found, Thumbnail)
    assert found.size == Size(160, 320)
    assert np.abs(colours(found) - [(200, 40, 20), (20, 60, 220)]).max() < 12
    assert (
        after(tmp_path, row("1890/b", outputs=(Output("ome-zarr", "b.zarr", "x", 1),))) == "cannot be shown (storage)"
    )


def test_an_output_is_shown_from_its_file(tmp_path):
    (tmp_path / "1890").mkdir()
    Image.fromarray(two_colours()).save(tmp_path / "1890" / "a.png")
    made = row("1890/a", outputs=(Output("iiif", "a.iiif", "x", 1), Output("png", "a.png", "x", 1)))
    assert colours(after(tmp_path, made))[0][0] > 150
    assert after(tmp_path, row("1890/a", outputs=())) == "no output that can be shown"
    assert (
        after(tmp_path, row("1890/b", outputs=(Output("tiff", "b.tif", "x", 1),))) == "the output is not here any more"
    )


def test_pictures_are_on_the_page(tmp_path):
    path = tmp_path / "in.png"
    Image.fromarray(two_colours()).save(path)
    write(tmp_path, known(path, outputs=(Output("png", "in.png", "x", 1),)))
    images = [attributes for tag, attributes in page(tmp_path).tags if tag == "img"]
    assert [image["alt"] for image in images] == ["in, before", "in, after"]
    data = base64.b64decode(images[0]["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (320, 160)


# The command


def call(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["status", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_command(tmp_path):
    assert call(tmp_path)[0] == 3
    assert call(tmp_path / "typo", "--rebuild")[0] == 3
    assert not (tmp_path / "typo").exists()
    restored(tmp_path, "1890/a")
    code, said = call(tmp_path, "--rebuild")
    assert (code, "1 pictures finished" in said) == (0, True)
    table = tmp_path / "reviews.csv"
    table.write_text("name,review\n1890/a,accepted\n")
    code, said = call(tmp_path, "--reviews", table, "--json")
    assert json.loads(said)["reviews"] == {"pending": 0, "accepted": 1, "rejected": 0}
    assert call(tmp_path, "--html") == (0, f"{tmp_path / '_batch' / 'status.html'}\n")
    table.write_text("name,review\nx,accepted\n")
    assert call(tmp_path, "--reviews", table)[0] == 4
