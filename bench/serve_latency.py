"""How soon the endpoint shows something: the first restored tile after an upload, and tiles of a finished picture.

    python bench/serve_latency.py [--repeats N] [--side OUTPUT_PX] [--seconds S] [--rate N]

first   From the end of the upload of a 512 px picture (x16, with a mask, service warm) until a tile at full size comes
        that is final; the client asks for it every 250 ms, as the page does.
tiles   Random tiles of all levels of a finished picture, so many a second whether they are answered or not: what the
        service says that it took (Server-Timing; also apart, for those asked for the first time, which are not kept
        yet), and what the client has seen from the moment when it meant to ask. Beside it a plain read of the same
        chunks, without HTTP.
"""

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import requests
from _batch_setup import record
from _serve_setup import Endpoint, endpoint, form

from engine.geometry import Box
from engine.tiling.canvas import Canvas

TILE_PX = 512
RESTING_S = 5.0
"""Until a replica has ended what it is at, and the next picture finds an idle service."""
FIRST_S, P50_S, P99_S = 2.0, 0.005, 0.025


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=20)
    options = parser.parse_args()
    with endpoint("--replicas", "1:1") as service:
        ended(service, submit(service.url, seed=0, side=64))  # warm
        firsts = [first_tile(service.url, seed) for seed in range(1, options.repeats + 1)]
        print(f"first final tile: {', '.join(f'{each:.2f}' for each in firsts)} s", flush=True)
        job = ended(service, submit(service.url, seed=99, side=options.side // 16))
        figures = tiles(service, job, seconds=options.seconds, rate=options.rate)
    first = statistics.median(firsts)
    holds = first <= FIRST_S and figures["p50_ms"] <= 1000 * P50_S and figures["p99_ms"] <= 1000 * P99_S
    found = {"first_final_tile_s": [round(each, 2) for each in firsts], "side_px": options.side, **figures}
    print({**found, "holds": holds})
    record("latency", {**found, "holds": holds}, into="serve")
    raise SystemExit(0 if holds else 1)


def submit(url: str, *, seed: int, side: int) -> dict[str, Any]:
    answer = requests.post(f"{url}/v1/restorations", files=form(seed, side, scale=16), timeout=60)
    answer.raise_for_status()
    return answer.json()


def ended(service: Endpoint, job: dict[str, Any]) -> dict[str, Any]:
    job = service.ended(job)
    assert job["state"] == "done", job
    return job


def first_tile(url: str, seed: int) -> float:
    job = submit(url, seed=seed, side=512)
    started = time.monotonic()
    address = f"{url}{job['links']['iiif']['restored']}/4096,4096,512,512/512,512/0/default.jpg"
    while True:
        answer = requests.get(address, timeout=60)
        if answer.ok and "max-age" in answer.headers["Cache-Control"]:
            taken = time.monotonic() - started
            requests.delete(url + job["links"]["self"], timeout=60)
            time.sleep(RESTING_S)
            return taken
        time.sleep(0.25)


def tiles(service: Endpoint, job: dict[str, Any], *, seconds: float, rate: float) -> dict[str, Any]:
    chance = random.Random(0)
    base = service.url + job["links"]["iiif"]["restored"]
    info = requests.get(f"{base}/info.json", timeout=60).json()
    asked: list[tuple[int, Box]] = []
    for _ in range(int(seconds * rate)):
        factor = chance.choice(info["tiles"][0]["scaleFactors"][:-1])
        side = TILE_PX * factor
        y, x = (chance.randrange(max(1, info[name] // side)) for name in ("height", "width"))
        asked.append((factor, Box(y, x, y + 1, x + 1).scaled(side)))
    taken: list[float] = []
    inside_ms: dict[int, float] = {}
    lock, session = threading.Lock(), threading.local()

    def ask(n: int, due: float, factor: int, box: Box) -> None:
        if not hasattr(session, "client"):
            session.client = requests.Session()
        path = f"{box.x0},{box.y0},{box.size.w},{box.size.h}/{TILE_PX},{TILE_PX}/0/default.jpg"
        answer = session.client.get(f"{base}/{path}", timeout=60)
        assert answer.status_code == 200, answer.text
        with lock:
            taken.append(time.monotonic() - due)
            inside_ms[n] = float(answer.headers["Server-Timing"].partition("dur=")[2])

    with ThreadPoolExecutor(16) as pool:
        start = time.monotonic() + 0.5
        for n, (factor, box) in enumerate(asked):
            due = start + n / rate
            time.sleep(max(0.0, due - time.monotonic()))
            pool.submit(ask, n, due, factor, box)
    (path,) = service.store.glob(f"pictures/*/out/restored.zarr/{len(info['tiles'][0]['scaleFactors']) - 1}")
    plain: list[float] = []
    with Canvas.load(path.parent) as canvas:
        for factor, box in asked:
            level = factor.bit_length() - 1
            at = Box(box.y0 // factor, box.x0 // factor, box.y1 // factor, box.x1 // factor)
            started = time.monotonic()
            canvas.read(at, level=level)
            plain.append(time.monotonic() - started)
    assert len(taken) == len(asked)
    p50, p99 = (float(np.percentile(list(inside_ms.values()), share)) for share in (50, 99))
    drawn_ms = [inside_ms[n] for n, one in enumerate(asked) if one not in asked[:n]]
    plain_ms = 1000 * statistics.median(plain)
    return {
        "tiles": len(taken),
        "rate_per_s": rate,
        "p50_ms": round(p50, 1),
        "drawn": len(drawn_ms),
        "drawn_p50_ms": round(statistics.median(drawn_ms), 1),
        "p99_ms": round(p99, 1),
        "client_p50_ms": round(1000 * float(np.percentile(taken, 50)), 1),
        "client_p99_ms": round(1000 * float(np.percentile(taken, 99)), 1),
        "plain_read_p50_ms": round(plain_ms, 1),
        "ratio_p50": round(p50 / plain_ms, 2),
    }


if __name__ == "__main__":
    main()
