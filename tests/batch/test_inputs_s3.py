"""Pictures and masks under a prefix of an object store, listed from a server on this machine."""

import http.client
from urllib.parse import quote

import pytest
from moto.server import ThreadedMotoServer

from engine.batch.inputs import Item, find_inputs
from engine.errors import PlanError, UnreadableInput


@pytest.fixture(scope="module")
def server():
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield running.get_host_and_port()
    running.stop()


@pytest.fixture
def put(server, monkeypatch):
    """Stores empty objects in the bucket `bucket`, which each test has for itself."""
    host, port = server
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")

    def request(method: str, path: str) -> None:
        connection = http.client.HTTPConnection(host, port)
        connection.request(method, path)
        assert connection.getresponse().status == 200
        connection.close()

    request("POST", "/moto-api/reset")
    request("PUT", "/bucket")
    return lambda *keys: [request("PUT", f"/bucket/{quote(key)}") for key in keys]


def found(*sources: str, **options: str | None) -> list[Item]:
    return list(find_inputs(sources, out=options.pop("out", None), **options))


def test_a_prefix_is_searched_like_a_folder(put):
    put("in/b.tif", "in/1890/scan 7é.png", "in/1890/", "in/a.zarr/zarr.json", "in/a.zarr/0/c.png", "in/notes.txt")
    put("in/b.mask.png", "in/out.zarr/_engine/plan.json", "in/made/0123/_engine/plan.json", "in/made/0123/x.png")
    put("in/_batch/x.png", "in/.hidden/x.png", "in/sub/a%20b.png", "elsewhere/x.png", "inner/x.png")
    expected = [
        ("a", "s3://bucket/in/a.zarr"),
        ("b", "s3://bucket/in/b.tif"),
        ("1890/scan 7é", "s3://bucket/in/1890/scan 7é.png"),
        ("sub/a%20b", "s3://bucket/in/sub/a%20b.png"),
    ]
    for source in ("s3://bucket/in", "s3://bucket/in/"):
        assert [(item.name, item.image) for item in found(source)] == expected
    assert [item.name for item in found("s3://bucket/in/b.tif", "s3://bucket/in/a.zarr")] == ["b", "a"]
    assert len(found("s3://bucket")) == 6


def test_masks_lie_under_a_prefix_too(put, tmp_path):
    put("in/a.tif", "in/1890/b.tif", "in/1890/b.mask.png", "in/c.png", "m/a.png", "m/1890/b.png", "in/m/c.png")
    assert [item.mask for item in found("s3://bucket/in", mask="s3://bucket/m")[::2]] == [
        "s3://bucket/m/a.png",
        "s3://bucket/m/1890/b.png",
    ]
    assert "no c.png" in found("s3://bucket/in", mask="s3://bucket/m")[1].error
    (beside,) = [item for item in found("s3://bucket/in", mask="s3://bucket/in") if item.name == "1890/b"]
    assert beside.mask == "s3://bucket/in/1890/b.mask.png"
    inside = {item.name: item.mask for item in found("s3://bucket/in", mask="s3://bucket/in/m")}
    assert inside == {"a": None, "c": "s3://bucket/in/m/c.png", "1890/b": None}
    (tmp_path / "a.png").touch()
    assert found("s3://bucket/in/a.tif", mask=str(tmp_path))[0].mask == f"{tmp_path}/a.png"
    assert found("s3://bucket/in/a.tif", mask="s3://bucket/m/one.png")[0].mask == "s3://bucket/m/one.png"


def test_a_store_that_cannot_be_listed_is_named(put):
    put("in/a.png", "in/tab\t/b.png", "in/odd//c.png")
    items = found("s3://bucket/in/a.png")
    assert items == [Item("s3://bucket/in/a.png", "a", None, None)]
    with pytest.raises(UnreadableInput, match=r"s3://nobody/in: cannot be listed .*(NoSuchBucket|404)"):
        found("s3://nobody/in")
    with pytest.raises(UnreadableInput, match="cannot be listed"):
        found("s3://bucket/in")
    with pytest.raises(UnreadableInput, match="0 pictures"):
        found("s3://bucket/empty")
    with pytest.raises(PlanError, match="inside the input folder"):
        found("s3://bucket/in", out="s3://bucket/in/out")
