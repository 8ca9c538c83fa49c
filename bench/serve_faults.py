"""What the endpoint has accepted it does, whatever is killed or restarted.

    python bench/serve_faults.py [replicas|drains|killed|scaling ...] [--seconds S] [--drains N]

replicas  A random replica is killed every 10 s at half load; what fails is sent once more. All are to be done.
drains    The service is told to end (SIGTERM) and started again, N times, while 80 % of what it can do is sent.
killed    All of its processes are killed with 10 jobs accepted; started again, it ends with the same bytes as a service
          that nothing disturbs.
scaling   `--replicas 1:3`: how many there are before, under and after load.
"""

import argparse
import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from _batch_setup import record
from _serve_setup import Endpoint, capacity, endpoint, post

KILL_EVERY_S, SUCCESS = 10.0, 0.999
ACCEPTED, BIG_SIDE_PX = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASURED))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--drains", type=int, default=20)
    options = parser.parse_args()
    wrong = set(options.what) - set(MEASURED)
    if wrong:
        parser.error(f"{', '.join(wrong)}: not one of {', '.join(MEASURED)}")
    good = True
    for name in options.what or MEASURED:
        found = MEASURED[name](options)
        print(f"{name}: {found}", flush=True)
        record(name, found, into="serve")
        good &= found["holds"]
    raise SystemExit(0 if good else 1)


class Load:
    """Sends pictures of its own at a rate until it is closed; each once more where it fails."""

    def __init__(self, service: Endpoint, rate: float) -> None:
        self.accepted: list[dict[str, Any]] = []
        self.refused = 0
        self._service, self._rate = service, rate
        self._pool = ThreadPoolExecutor(32)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_all)
        self._thread.start()

    def _send_all(self) -> None:
        due, seed = time.monotonic(), 0
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self._pool.submit(self._send, seed)
            seed, due = seed + 1, due + 1 / self._rate

    def _send(self, seed: int) -> None:
        job = post(self._service, seed) or post(self._service, seed)
        if job is None:
            self.refused += 1
        else:
            self.accepted.append(job)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._pool.shutdown()

    def num_done(self) -> int:
        """Of those accepted, waiting for all to end."""
        return sum(self._service.ended(job)["state"] == "done" for job in self.accepted)


def replicas(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(0)
    with endpoint("--replicas", "2:2") as service:
        rate = capacity(service) / 2
        load = Load(service, rate)
        kills, started = 0, time.monotonic()
        while time.monotonic() - started < options.seconds:
            time.sleep(KILL_EVERY_S)
            there = service.replicas()
            if there:
                chance.choice(there).kill()
                kills += 1
        load.close()
        done = load.num_done()
    sent = load.refused + len(load.accepted)
    return {
        "rate_per_s": round(rate, 2),
        "kills": kills,
        "sent": sent,
        "done": done,
        "refused": load.refused,
        "holds": done >= SUCCESS * sent,
    }


def drains(options: argparse.Namespace) -> dict[str, Any]:
    with endpoint() as service:
        rate = 0.8 * capacity(service)
        accepted = done = refused = 0
        away: list[float] = []
        for _ in range(options.drains):
            load = Load(service, rate)
            time.sleep(5)
            stopped = time.monotonic()
            service.stop()
            load.close()
            service.restart()
            service.wait_ready()
            away.append(time.monotonic() - stopped)
            accepted += len(load.accepted)
            refused += load.refused
            done += load.num_done()
    return {
        "drains": options.drains,
        "rate_per_s": round(rate, 2),
        "accepted": accepted,
        "done": done,
        "refused_while_away": refused,
        "away_s_median": round(sorted(away)[len(away) // 2], 1),
        "holds": done == accepted,
    }


def killed(_: argparse.Namespace) -> dict[str, Any]:
    found: list[list[str]] = []
    for disturbed in (False, True):
        with endpoint() as service:
            jobs = [post(service, seed, side=BIG_SIDE_PX, scale=8) for seed in range(ACCEPTED)]
            assert all(jobs)
            if disturbed:
                time.sleep(2)
                service.kill()
                service.restart()
                service.wait_ready()
            digests: list[str] = []
            for job in jobs:
                ended = service.ended(job or {})
                data = requests.get(service.url + ended["links"]["result"]["png"], timeout=120).content
                digests.append(f"{ended['state']} {hashlib.sha256(data).hexdigest()}")
            found.append(digests)
    same = sum(one == other for one, other in zip(*found, strict=True))
    done = sum(one.startswith("done") for one in found[1])
    return {"accepted": ACCEPTED, "done": done, "same_bytes": same, "holds": same == done == ACCEPTED}


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    with endpoint("--replicas", "1:3") as service:
        calm = len(service.replicas())
        jobs = [post(service, seed, side=256, scale=8) for seed in range(int(options.seconds / 10))]
        most, started = calm, time.monotonic()
        rising_s = 0.0
        while any(job is not None and not is_ended(service, job) for job in jobs):
            now = len(service.replicas())
            if now > most:
                most, rising_s = now, time.monotonic() - started
            time.sleep(0.5)
        ended = time.monotonic()
        while len(service.replicas()) > 1 and time.monotonic() - ended < 180:
            time.sleep(0.5)
        after = len(service.replicas())
        falling_s = time.monotonic() - ended
    return {
        "replicas": [calm, most, after],
        "to_most_s": round(rising_s, 1),
        "back_s": round(falling_s, 1),
        "holds": [calm, most, after] == [1, 3, 1],
    }


def is_ended(service: Endpoint, job: dict[str, Any]) -> bool:
    return requests.get(service.url + job["links"]["self"], timeout=60).json()["state"] in ("done", "failed")


MEASURED = {"replicas": replicas, "drains": drains, "killed": killed, "scaling": scaling}

if __name__ == "__main__":
    main()
