"""Hours at 70 % load: what the endpoint's processes take, and whether they take more with time.

    python bench/serve_soak.py [--minutes M]

Pictures are sent, looked at while they grow, exported, and left to be removed; their retention is a few minutes, so the
store is to stay as large as it is. Twice a second the memory and the open files of each process are read. What a
picture takes while it is worked at comes and goes by tens of MiB; what stays shows between pictures, when a replica has
given back what is free: of each minute the least counts, and a line is fitted to these after the first third, which is
warm-up. Each process is judged, and all together.
"""

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import requests
from _batch_setup import command_line, record
from _serve_setup import MIB, SCALE, SIDE_PX, Endpoint, capacity, endpoint, form
from scipy.stats import linregress

LOAD, RETENTION_S, EVERY_S, RESTING_S = 0.7, 180.0, 0.5, 60.0
NOT_BEGUN = 409
MOST_SLOPE = 1.0
"""MiB in 10 minutes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    with endpoint("--replicas", "2:2", "--retention-days", str(RETENTION_S / 86400)) as service:
        rate = LOAD * capacity(service)
        found = soak(service, rate, 60 * options.minutes)
    found = {"minutes": options.minutes, "rate_per_s": round(rate, 2), **found}
    print(found)
    record("soak", found, into="serve")
    raise SystemExit(0 if found["holds"] else 1)


def soak(service: Endpoint, rate: float, seconds: float) -> dict[str, Any]:
    errors: list[str] = []
    sent = 0
    names: dict[int, str] = {}
    seen: list[tuple[float, dict[int, tuple[int, int]]]] = []
    pictures: list[int] = []
    started = time.monotonic()
    sampled = started - EVERY_S
    with ThreadPoolExecutor(16) as pool:
        while (now := time.monotonic()) < started + seconds:
            if now - sampled >= EVERY_S:
                sampled = now
                seen.append((now - started, taken(service, names)))
                pictures.append(sum(1 for _ in (service.store / "pictures").iterdir()))
            if now >= started + sent / rate:
                pool.submit(one, service, sent, errors)
                sent += 1
            time.sleep(max(0.0, min(started + sent / rate, sampled + EVERY_S) - time.monotonic()))
    warm = [(at, there) for at, there in seen if at > seconds / 3]
    minutes = sorted({int(at // RESTING_S) for at, _ in warm})[1:-1]  # whole ones
    resting: dict[str, list[float]] = {}
    files: dict[str, list[int]] = {}
    for process in sorted(set.intersection(*(set(there) for _, there in warm))):
        name = f"{names[process]} {process}"
        resting[name] = [
            min(there[process][0] / MIB for at, there in warm if int(at // RESTING_S) == minute) for minute in minutes
        ]
        files[name] = [warm[0][1][process][1], warm[-1][1][process][1]]
    resting["all"] = [sum(least) for least in zip(*resting.values(), strict=True)]
    slopes = {name: slope(minutes, least) for name, least in resting.items()}
    return {
        "sent": sent,
        "errors": errors[:5],
        "num_errors": len(errors),
        "mib_in_10_minutes": {name: found for name, (found, _) in slopes.items()},
        "standard_error": {name: error for name, (_, error) in slopes.items()},
        "resting_mib": {name: [round(least[0], 1), round(least[-1], 1)] for name, least in resting.items()},
        "open_files": files,
        "pictures_kept": [pictures[len(pictures) // 3], pictures[-1]],
        "holds": not errors
        and max(found for found, _ in slopes.values()) <= MOST_SLOPE
        and all(last <= first + 2 for first, last in files.values())
        and pictures[-1] <= 1.2 * pictures[len(pictures) // 3] + 5,
    }


def slope(minutes: list[int], least: list[float]) -> tuple[float, float]:
    """MiB in 10 minutes of the line through the points, and its standard error."""
    fitted = linregress([minute * RESTING_S / 600 for minute in minutes], least)
    return round(float(fitted.slope), 2), round(float(fitted.stderr), 2)


def one(service: Endpoint, seed: int, errors: list[str]) -> None:
    """What a page does with a picture."""
    chance = random.Random(seed)
    try:
        answer = requests.post(f"{service.url}/v1/restorations", files=form(seed, SIDE_PX, scale=SCALE), timeout=60)
        answer.raise_for_status()
        job = answer.json()
        while job["state"] not in ("done", "failed"):
            y, x = (chance.randrange(SIDE_PX * SCALE - 128) for _ in range(2))
            tile = f"{job['links']['iiif']['restored']}/{x},{y},128,128/128,128/0/default.jpg"
            seen = requests.get(service.url + tile, timeout=60)
            if seen.status_code != NOT_BEGUN:
                seen.raise_for_status()
            time.sleep(0.5)
            job = requests.get(service.url + job["links"]["self"], timeout=60).json()
        if job["state"] != "done":
            errors.append(str(job["problem"]))
        requests.get(service.url + job["links"]["result"]["png"], timeout=60).raise_for_status()
    except requests.RequestException as error:
        errors.append(repr(error)[:300])


def taken(service: Endpoint, names: dict[int, str]) -> dict[int, tuple[int, int]]:
    """Bytes of memory and open files of each process; `names` learns what each was called at first: Ray's change."""
    found: dict[int, tuple[int, int]] = {}
    for process in service.processes():
        try:
            called = process.name() if process.pid == service.process.pid else command_line(process).split(" ")[0]
            names.setdefault(process.pid, called.rpartition("/")[2])
            found[process.pid] = process.memory_info().rss, process.num_fds()
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
