"""Hours at 70 % load: what the endpoint's processes take, and whether they take more with time.

    python bench/serve_soak.py [--minutes M]

Pictures are sent, looked at while they grow, exported, and left to be removed; their retention is a few minutes, so the
store is to stay as large as it is. What a picture takes while it is worked at comes and goes by hundreds of MiB; what
stays shows at rest. So every two minutes nothing is sent until all is done and replicas have given back what is free;
then the memory and the open files of each process are read. These pauses do not count as time. A line is fitted to what
follows the first third, which is warm-up. Each process is judged, and all together.
"""

import argparse
import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import psutil
import requests
from _batch_setup import command_line, record
from _serve_setup import MIB, SCALE, SIDE_PX, Endpoint, capacity, endpoint, form
from scipy.stats import linregress

from engine.serve.cluster import KEPT_S, LONG_POLL_S

LOAD, RETENTION_S, BETWEEN_S = 0.7, 180.0, 120.0
REST_S = KEPT_S + 2 * LONG_POLL_S
"""By then an idle replica has given back what is free."""
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
    seen: list[dict[int, tuple[int, int]]] = []
    pictures: list[int] = []
    with ThreadPoolExecutor(16) as pool:
        while len(seen) * BETWEEN_S < seconds:
            begun, sending = time.monotonic(), list[Future[None]]()
            while (at := begun + len(sending) / rate) < begun + BETWEEN_S:
                time.sleep(max(0.0, at - time.monotonic()))
                sending.append(pool.submit(one, service, sent + len(sending), errors))
            sent += len(sending)
            for each in sending:
                each.result()
            time.sleep(REST_S)
            seen.append(taken(service, names))
            pictures.append(sum(1 for _ in (service.store / "pictures").iterdir()))
    warm, kept = seen[len(seen) // 3 :], pictures[len(seen) // 3 :]
    resting: dict[str, list[float]] = {}
    files: dict[str, list[int]] = {}
    for process in sorted(set.intersection(*(set(there) for there in warm))):
        name = f"{names[process]} {process}"
        resting[name] = [there[process][0] / MIB for there in warm]
        files[name] = [warm[0][process][1], warm[-1][process][1]]
    resting["all"] = [sum(each) for each in zip(*resting.values(), strict=True)]
    slopes = {name: slope(each) for name, each in resting.items()}
    return {
        "sent": sent,
        "errors": errors[:5],
        "num_errors": len(errors),
        "mib_in_10_minutes": {name: found for name, (found, _) in slopes.items()},
        "standard_error": {name: error for name, (_, error) in slopes.items()},
        "resting_mib": {name: [round(each[0], 1), round(each[-1], 1)] for name, each in resting.items()},
        "open_files": files,
        "pictures_kept": [kept[0], kept[-1]],
        "holds": not errors
        and max(found for found, _ in slopes.values()) <= MOST_SLOPE
        and all(last <= first + 2 for first, last in files.values())
        and kept[-1] <= 1.2 * kept[0] + 5,
    }


def slope(resting: list[float]) -> tuple[float, float]:
    """MiB in 10 minutes of the line through MiB at all pauses, and its standard error."""
    fitted = linregress([number * BETWEEN_S / 600 for number in range(len(resting))], resting)
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
