"""The endpoint from outside: what is sent comes back restored, whatever is killed, and nothing else is told."""

import io
import json
import os
import shutil
import signal
import time
import zipfile

import cv2
import numpy as np
import pytest
import zarr
from zarr.storage import ZipStore

from engine.request import Request
from engine.restoration import Restorer
from tests.serve.conftest import Service, hole, picture, png

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def restored(network, tmp_path_factory) -> np.ndarray:
    """What the engine itself makes of the picture."""
    restorer = Restorer(model=str(network), threads=1)
    scratch = tmp_path_factory.mktemp("scratch")
    return restorer.array(picture(), hole() > 0, Request(scale=16), scratch=scratch)


def decoded(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def test_a_picture_from_upload_to_result(service, restored):
    answer = service.submit(png(picture()), png(hole()), '{"scale": 16}')
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["Location"] == job["links"]["self"]
    assert (job["width"], job["height"]) == (130 * 16, 90 * 16)
    told: list[dict] = []
    with service.ask("GET", job["links"]["events"], stream=True) as events:
        for line in events.iter_lines():
            if line.startswith(b"data: "):
                told.append(json.loads(line[6:]))
    assert told[-1]["state"] == "done"
    assert [one["progress"] for one in told] == sorted(one["progress"] for one in told)

    result = {name: service.ask("GET", link) for name, link in job["links"]["result"].items()}
    assert {name: answer.status_code for name, answer in result.items()} == dict.fromkeys(result, 200)
    assert np.array_equal(decoded(result["png"].content), restored)
    tiff = cv2.imdecode(np.frombuffer(result["tiff"].content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(tiff, restored)
    assert 'filename="scan-restored.tif"' in result["tiff"].headers["Content-Disposition"]
    assert np.abs(decoded(result["jpeg"].content).astype(int) - restored).mean() < 6
    path = service.store.parent / "result.ozx"
    path.write_bytes(result["ome-zarr"].content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    array = zarr.open_group(ZipStore(path, mode="r"), mode="r")["0"]
    assert np.array_equal(np.moveaxis(array[:], 0, 2), restored)
    part = service.ask("GET", job["links"]["result"]["tiff"], headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, result["tiff"].content[100:200])

    for layer, size in (("restored", (2080, 1440)), ("original", (130, 90)), ("mask", (130, 90))):
        info = service.ask("GET", job["links"]["iiif"][layer] + "/info.json")
        assert (info.json()["width"], info.json()["height"]) == size
        assert info.headers["Access-Control-Allow-Origin"] == "*"
        assert info.headers["Content-Type"].startswith("application/ld+json")
        head = service.ask("HEAD", job["links"]["iiif"][layer] + "/info.json")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["Access-Control-Allow-Origin"] == "*"
        assert service.ask("OPTIONS", job["links"]["iiif"][layer] + "/info.json").status_code == 204
    tile = service.ask("GET", job["links"]["iiif"]["restored"] + "/512,512,512,512/512,512/0/default.png")
    assert np.array_equal(decoded(tile.content), restored[512:1024, 512:1024])
    for known in (tile.headers["ETag"], f'"other", W/{tile.headers["ETag"]}', "*"):
        again = service.ask("GET", tile.url[len(service.url) :], headers={"If-None-Match": known})
        assert again.status_code == 304
        assert again.headers["Cache-Control"] == tile.headers["Cache-Control"]
    other = service.ask("GET", tile.url[len(service.url) :], headers={"If-None-Match": '"other"'})
    assert other.content == tile.content
    base = service.ask("GET", job["links"]["iiif"]["restored"], allow_redirects=False)
    assert base.status_code == 303
    found = service.ask("GET", job["links"]["manifest"]).json()
    body = found["items"][0]["items"][0]["items"][0]["body"]
    assert body["type"] == "Choice"
    assert [item["label"]["en"][0] for item in body["items"]][:2] == ["Restored", "Original"]
    assert "generated" in found["requiredStatement"]["value"]["en"][0]
    assert service.ask("GET", body["items"][0]["service"][0]["id"][len(service.url) :] + "/info.json").ok

    for array in service.store.glob("pictures/*/out/restored.zarr/0"):
        if json.loads((array / "zarr.json").read_text())["shape"] == [3, 1440, 2080]:
            shutil.rmtree(array / "c")
    lost = service.ask("GET", job["links"]["iiif"]["restored"] + "/0,0,99,99/max/0/default.png")
    assert lost.status_code == 503
    assert "shards are missing" in lost.text
    assert str(service.store) not in lost.text

    assert job["id"] in [one["id"] for one in service.ask("GET", "/v1/restorations").json()]
    assert service.ask("DELETE", job["links"]["self"]).status_code == 204
    for link in (job["links"]["self"], tile.url[len(service.url) :], job["links"]["result"]["png"]):
        assert service.ask("GET", link).status_code == 404


def test_what_was_restored_before_is_waited_for_and_shared(service):
    image = png(picture(seed=1))
    first = service.submit(image, options='{"scale": 2}', Prefer="wait=60")
    assert first.status_code == 200
    assert first.json()["state"] == "done"
    no_mask = first.json()["links"]["iiif"]["restored"].replace("~restored~", "~mask~") + "/info.json"
    assert service.ask("GET", no_mask).status_code == 404  # not 409: it will never be there
    before = set((service.store / "pictures").iterdir())
    second = service.submit(image, options='{"scale": 2}')
    assert second.status_code == 200  # it is done
    assert second.json()["id"] != first.json()["id"]
    assert set((service.store / "pictures").iterdir()) == before
    service.ask("DELETE", first.json()["links"]["self"])
    assert service.ask("GET", second.json()["links"]["result"]["png"]).ok  # it was shared, and is the other's still


def test_the_same_request_sent_twice_is_one_job(service):
    image = png(picture(seed=2))
    sent = [service.submit(image, **{"Idempotency-Key": "k1"}).json()["id"] for _ in range(2)]
    assert sent[0] == sent[1]
    other = service.submit(png(picture(seed=3)), **{"Idempotency-Key": "k1"})
    assert (other.status_code, other.json()["code"]) == (409, "conflict")


BAD = {
    "not a picture": (b"hello" * 20, None, "{}", 422, "unreadable-input"),
    "a script": (b"#!/bin/sh\necho hello world", None, "{}", 415, "disguised-input"),
    "a mask of another size": (png(picture()), png(hole(50, 50)), "{}", 422, "mask-mismatch"),
    "no such scale": (png(picture()), None, '{"scale": 3}', 400, "bad-request"),
    "a scale in words": (png(picture()), None, '{"scale": "4"}', 400, "bad-request"),
    "an unknown option": (png(picture()), None, '{"skale": 4}', 400, "bad-request"),
    "options that are no JSON": (png(picture()), None, "{", 400, "bad-request"),
    "more than 16 times": (png(picture()), None, '{"long_side_px": 99999}', 413, "output-too-large"),
    "a page that is not there": (png(picture()), None, '{"page": 3}', 415, "unsupported-input"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_code_and_leaves_nothing(service, name):
    image, mask, options, status, code = BAD[name]
    before = set((service.store / "pictures").iterdir())
    answer = service.submit(image, mask, options)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == status
    assert str(service.store) not in answer.text
    assert "/" not in answer.json()["detail"].replace("and/or", "")
    assert set((service.store / "pictures").iterdir()) == before
    assert list((service.store / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("image", "mask", "code"),
    [
        (png(picture()), png(np.full((90, 130), 255, np.uint8)), "nothing-known"),
        (png(picture())[:2000], None, "unreadable-input"),
    ],
    ids=["everything is missing", "the file is cut"],
)
def test_what_only_decoding_finds_is_told_later(service, image, mask, code):
    job = service.submit(image, mask).json()
    ended = service.ended(job)
    assert (ended["state"], ended["problem"]["code"]) == ("failed", code)
    assert str(service.store) not in ended["problem"]["detail"]
    for address in (job["links"]["result"]["png"], job["links"]["iiif"]["restored"] + "/info.json"):
        never = service.ask("GET", address)
        assert (never.status_code, never.json()["code"]) == (404, "not-found")


def test_pages_of_other_sites_and_names_change_nothing(service):
    files = {"image": ("a.png", png(picture()))}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "evil.example"}):
        answer = service.ask("POST", "/v1/restorations", files=files, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert service.ask("GET", "/livez", headers={"Host": "rebound.example"}).status_code == 403
    good = service.ask("GET", "/livez", headers={"Origin": service.url})
    assert good.ok
    assert "Access-Control-Allow-Origin" not in good.headers


def test_the_page_and_the_description_are_served(service):
    page = service.ask("GET", "/")
    assert "Restore a picture" in page.text
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    assert service.ask("GET", "/viewer/viewer.js").ok
    description = service.ask("GET", "/openapi.json").json()
    assert description["openapi"].startswith("3.1")
    assert "/v1/restorations" in description["paths"]
    metrics = service.ask("GET", "/metrics").text
    assert "engine_queue_megapixels" in metrics
    assert 'route="/v1/restorations"' in metrics


def test_killed_with_accepted_jobs_all_of_them_end_the_same(home, network):
    running = Service(home / "store", network)
    running.start()
    jobs = [running.submit(png(picture(seed=n)), png(hole()), '{"scale": 8}').json() for n in range(6)]
    try:
        assert any(running.ask("GET", job["links"]["self"]).json()["state"] != "done" for job in jobs)
        running.kill()
        running.start()
        results = []
        for job in jobs:
            ended = running.ended(job)
            assert ended["state"] == "done", ended
            results.append(running.ask("GET", ended["links"]["result"]["png"]).content)
        restorer = Restorer(model=str(network), threads=1)
        for n, data in enumerate(results):
            expected = restorer.array(picture(seed=n), hole() > 0, Request(scale=8), scratch=home)
            assert np.array_equal(decoded(data), expected)
    finally:
        taken = running.stop()
    assert taken < 25


def test_a_killed_replica_costs_nothing_but_time(service, restored):
    job = service.submit(png(picture(seed=9)), png(hole()), '{"scale": 16}').json()
    until = time.monotonic() + 60
    state = "queued"
    while state == "queued" and time.monotonic() < until:
        time.sleep(0.02)
        state = service.ask("GET", job["links"]["self"]).json()["state"]
    replicas = [one for one in service.processes() if "ServeReplica:engine:Replica" in " ".join(one.cmdline())]
    assert replicas
    assert state == "running"
    for replica in replicas:  # whichever is at it
        os.kill(replica.pid, signal.SIGKILL)
    ended = service.ended(job)
    assert ended["state"] == "done"
    expected = Restorer(model=str(service.model), threads=1).array(
        picture(seed=9), hole() > 0, Request(scale=16), scratch=service.store.parent
    )
    assert np.array_equal(decoded(service.ask("GET", ended["links"]["result"]["png"]).content), expected)


def test_keys_keep_owners_apart(home, network):
    from engine.serve.keys import add_key

    path = home / "keys"
    keys = {name: {"Authorization": f"Bearer {add_key(path, name)}"} for name in ("one", "two")}
    running = Service(home / "store", network, ("--keys", str(path)))
    running.start()
    try:
        job = running.ask(
            "POST", "/v1/restorations", files={"image": ("a.png", png(picture()))}, headers=keys["one"]
        ).json()
        routes = running.ask("GET", "/openapi.json").json()["paths"]
        asked = 0
        for route, methods in routes.items():
            if route in ("/livez", "/readyz"):
                continue
            address = route.format(
                job_id=job["id"],
                identifier=job["id"] if "manifest" in route else f"{job['id']}~restored",
                region="full",
                size="max",
                rotation="0",
                quality_format="default.jpg",
            )
            for method in methods:
                asked += 1
                assert running.ask(method, address).status_code == 401, (method, route)
                wrong = {"Authorization": "Bearer wrong"}
                assert running.ask(method, address, headers=wrong).status_code == 401
                if "{" in route:
                    assert running.ask(method, address, headers=keys["two"]).status_code == 404, (method, route)
                    if method == "get":  # the address is one
                        own = running.ask(method, address, headers=keys["one"], stream=True)
                        assert own.status_code in (200, 409), (method, route)
                        own.close()
        assert asked >= 9
        body = io.BytesIO(b"x" * (8 << 20))
        started = time.monotonic()
        refused = running.ask("POST", "/v1/restorations", data=body, headers={"Content-Length": str(1 << 40)})
        assert refused.status_code == 401
        assert time.monotonic() - started < 5  # before the body
        assert running.ask("GET", "/v1/restorations", headers=keys["two"]).json() == []
        assert running.ask("GET", job["links"]["iiif"]["original"] + "/info.json").status_code in (200, 409)
        assert running.ask("GET", job["links"]["events"]).ok  # who has the address may look
        other = job["links"]["events"].replace(job["id"], "0" * 32)
        assert running.ask("GET", other).status_code == 401
    finally:
        running.stop()


def test_a_name_that_others_reach_needs_keys(home, network):
    running = Service(home / "store", network, ("--host", "0.0.0.0"))
    with pytest.raises(AssertionError, match="0 keys protect"):
        running.start()
