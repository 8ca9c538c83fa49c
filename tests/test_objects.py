"""Whole objects in a folder and in an object store: the same promises, whatever the network does."""

import hashlib
import pickle
import subprocess
import sys

import pytest

from engine import objects
from engine.errors import PlanError, StorageError, StorageReadOnly, UnreadableInput
from engine.objects import Folder, Objects, Prefix, local_copy, objects_at, place


@pytest.fixture(params=["folder", "prefix"])
def store(request, tmp_path) -> Objects:
    return Folder(tmp_path) if request.param == "folder" else request.getfixturevalue("prefix")


def test_an_object_is_stored_replaced_told_and_deleted(store):
    store.put("deep/er/object", b"a long first version")
    store.put("deep/er/object", memoryview(b"short"))
    assert store.get("deep/er/object") == b"short"
    assert store.size("deep/er/object") == 5
    digest = store.digest("deep/er/object")
    assert (digest.sha256, digest.num_bytes) == (hashlib.sha256(b"short").hexdigest(), 5)
    assert list(store.keys()) == ["deep/er/object"]
    store.delete("deep/er/object")
    store.delete("deep/er/object")
    assert list(store.keys()) == []


def test_what_is_not_there_is_none_and_has_no_digest(store):
    assert store.get("nothing") is None
    assert store.size("nothing") is None
    with pytest.raises(StorageError):
        store.digest("nothing")


def test_create_keeps_what_is_there(store):
    assert store.create("record", b"first")
    assert not store.create("record", b"second")
    assert store.get("record") == b"first"


@pytest.mark.parametrize("key", ["a b", "100%", "%20", "#1", "ü ö", "a+b", "x?y", "[1]*", "\\back", "~", "'\"<&"])
def test_any_printable_name_is_a_key(store, key):
    store.put(f"{key}/{key}.json", b"bytes")
    assert store.get(f"{key}/{key}.json") == b"bytes"
    assert list(store.keys()) == [f"{key}/{key}.json"]


def test_a_listing_has_every_object_of_this_prefix_alone(prefix):
    for number in range(3):
        (prefix / "a").put(f"{number:04}", b"x" * number)
    (prefix / "ab").put("other", b"x")
    assert [(entry.key, entry.num_bytes) for entry in (prefix / "a").entries()] == [
        ("0000", 0),
        ("0001", 1),
        ("0002", 2),
    ]


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///a", "s3://b//a", "s3://b/a/../c", "s3://b/./a", "s3://b/a\nb", "gs://b/a"]
)
def test_names_that_lead_elsewhere_are_refused(url):
    with pytest.raises(PlanError):
        place(url)


def test_a_url_and_its_parts():
    prefix = place("s3://bucket/deep/scan.json/")
    assert isinstance(prefix, Prefix)
    assert str(prefix) == "s3://bucket/deep/scan.json"
    assert (prefix.name, prefix.parent) == ("scan.json", Prefix("bucket", "deep"))
    assert pickle.loads(pickle.dumps(prefix)) == prefix
    assert str(place("s3://bucket")) == "s3://bucket/"
    assert objects_at(prefix) is prefix


@pytest.mark.parametrize("action", ["lose-answer", "busy-but-done", "lose-request", "busy"])
def test_a_create_whose_answer_is_lost_is_ours(s3, prefix, action):
    fault = s3.fail(action, "PUT", "record", times=2)
    assert prefix.create("record", b"first")
    assert fault.met > 2 or (action == "lose-answer" and fault.met >= 1)
    assert prefix.get("record") == b"first"
    assert not prefix.create("record", b"second")


@pytest.mark.parametrize("action", ["lose-answer", "busy-but-done", "lose-request", "busy"])
def test_a_conditional_replacement_whose_answer_is_lost_is_ours(s3, prefix, action):
    prefix.put("pointer", b"old")
    _, tag = prefix.read("pointer")
    fault = s3.fail(action, "PUT", "pointer")
    assert prefix.replace("pointer", b"new", over=tag)
    assert prefix.get("pointer") == b"new"
    assert fault.met >= 1
    assert not prefix.replace("pointer", b"late", over=tag)
    assert prefix.get("pointer") == b"new"


def test_a_create_that_lost_its_answer_does_not_take_over_what_another_made(s3, prefix):
    """The request is lost, and before it is repeated another writer stores the record."""
    prefix.put("record", b"theirs")
    fault = s3.fail("lose-request", "PUT", "record", times=2)
    assert not prefix.create("record", b"ours")
    assert fault.met > 2
    assert prefix.get("record") == b"theirs"


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("PUT", lambda prefix: prefix.put("object", b"bytes")),
        ("GET", lambda prefix: prefix.get("object")),
        ("HEAD", lambda prefix: prefix.size("object")),
        ("POST", lambda prefix: prefix.delete("object")),
        ("GET", lambda prefix: list(prefix.keys())),
    ],
)
@pytest.mark.parametrize("action", ["lose-answer", "busy"])
def test_a_busy_store_is_asked_again(s3, prefix, method, act, action):
    prefix.put("object", b"bytes")
    times = 1 if (method, action) == ("POST", "lose-answer") else 2  # a deletion is looked after, not repeated
    fault = s3.fail(action, method, "", times=times)
    act(prefix)
    assert fault.met > times or (method == "POST" and fault.met >= 1)
    assert method != "POST" or prefix.size("object") is None


def test_what_is_given_up_names_the_key_and_both_numbers(s3, prefix, monkeypatch):
    monkeypatch.setattr(objects, "MAX_RETRIES", 2)
    s3.fail("busy", "PUT", "object", times=100)
    with pytest.raises(
        StorageError, match=r"s3://archive/\w+/object: .* after \d+\.\d s, where 2 retries within 180 s"
    ):
        prefix.put("object", b"bytes")
    assert s3.count("PUT", "object") == 3


def test_a_missing_permission_is_told_apart(s3, prefix):
    s3.fail("deny", "PUT", "object", times=100)
    with pytest.raises(StorageReadOnly, match="credentials"):
        prefix.put("object", b"bytes")
    with pytest.raises(StorageReadOnly, match="credentials"):
        prefix.create("object", b"bytes")
    assert s3.count("PUT", "object") == 2


def test_a_missing_bucket_is_told(s3):
    with pytest.raises(StorageError, match="no bucket elsewhere"):
        Prefix("elsewhere").put("object", b"bytes")


def test_a_slow_store_is_waited_for(s3, prefix):
    fault = s3.fail("delay", "PUT", "object", seconds=0.5)
    prefix.put("object", b"bytes")
    assert fault.met >= 1
    assert prefix.get("object") == b"bytes"


@pytest.mark.parametrize("num_bytes", [0, 1, 100, 12 << 20])
def test_a_file_is_uploaded_whole_in_parts_where_it_is_long(s3, prefix, tmp_path, monkeypatch, num_bytes):
    monkeypatch.setattr(objects, "MULTIPART_BYTES", 5 << 22)
    if num_bytes > 100:
        monkeypatch.setattr(objects, "MULTIPART_BYTES", 5 << 20)
        monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (num_bytes // 256) + bytes(num_bytes % 256))
    prefix.upload("file.tif", file)
    assert prefix.digest("file.tif") == Folder(tmp_path).digest("file")
    assert s3.count("PUT", "partNumber") == (3 if num_bytes > 100 else 0)


def test_a_picture_is_fetched_under_its_name(prefix, tmp_path):
    prefix.put("in/scan 1.png", b"pixels")
    assert local_copy(str(tmp_path / "here.png"), tmp_path / "scratch") == tmp_path / "here.png"
    assert not (tmp_path / "scratch").exists()
    file = local_copy(str(prefix / "in/scan 1.png"), tmp_path / "scratch")
    assert file == tmp_path / "scratch" / "scan 1.png"
    assert file.read_bytes() == b"pixels"
    with pytest.raises(UnreadableInput, match="no such object"):
        local_copy(str(prefix / "in/other.png"), tmp_path / "scratch")


def test_folders_need_no_client_of_object_stores():
    code = "import sys, engine.objects; print([name for name in ('obstore', 'zarr', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
