"""More than the endpoint can do: what it sheds, how fast, and what is still done. With 2 keys: who suffers.

    python bench/serve_load.py [overload|fairness ...] [--seconds S] [--factors 2,5,10]

overload  Its capacity is measured with a full queue. Then so many times that, open loop: each request is sent when it
          is due, whatever became of those before. Only 202, 429 and 503 may come; what is shed must be shed fast; what
          is done must be nearly the capacity; soon after the load has ended, a request is taken as fast as on an idle
          service.
fairness  One key sends ten times the capacity, another a fifth of it.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from _batch_setup import record
from _serve_setup import SCALE, SIDE_PX, Endpoint, body, capacity, endpoint, form

from engine.serve.keys import add_key
from engine.serve.queue import LEAST_MEGAPIXELS

REPLICAS = ("--replicas", "2:2")
"""As many under load as when the capacity was measured."""
QUEUE_S = 8.0
"""So long the queue is, at capacity."""
SHED_P99_S = {2: 0.05, 5: 0.1, 10: 0.1}
GOODPUT, RECOVERED_S, SUCCESS = 0.9, 5.0, 0.99
MEASURED = ("overload", "fairness")
Body = tuple[bytes, str]


@dataclass(slots=True)
class Sent:
    """One request: when it was due, and what came of it."""

    due: float
    status: int = 0
    seconds: float = 0.0
    job: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASURED))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--factors", default="2,5,10")
    options = parser.parse_args()
    wrong = set(options.what) - set(MEASURED)
    if wrong:
        parser.error(f"{', '.join(wrong)}: not one of {', '.join(MEASURED)}")
    with endpoint(*REPLICAS) as service:
        most = capacity(service)
    print(f"capacity: {most:.2f} pictures a second", flush=True)
    good = True
    if "overload" in (options.what or MEASURED):
        for factor in map(int, options.factors.split(",")):
            with endpoint(*REPLICAS, "--max-queue", f"{queue_megapixels(most):.3f}") as service:
                found = asyncio.run(overload(service, most, factor, options.seconds))
            print(f"{factor}x: {found}", flush=True)
            record(f"overload {factor}x", found, into="serve")
            good &= found["holds"]
    if "fairness" in (options.what or MEASURED):
        found = fairness(most, options.seconds)
        print(f"fairness: {found}", flush=True)
        record("fairness", found, into="serve")
        good &= found["holds"]
    raise SystemExit(0 if good else 1)


def queue_megapixels(most: float) -> float:
    return QUEUE_S * most * max(LEAST_MEGAPIXELS, (SIDE_PX * SCALE) ** 2 / 1e6)


def bodies(count: int, *, first: int) -> list[Body]:
    return [body(form(first + n, SIDE_PX, scale=SCALE)) for n in range(count)]


async def num_done(client: aiohttp.ClientSession, **headers: str) -> int:
    """As its metrics tell."""
    async with client.get("/metrics", headers=headers) as answer:
        lines = (await answer.text()).splitlines()
    (line,) = (line for line in lines if line.startswith("engine_pictures") and 'state="done"' in line)
    return int(float(line.rpartition(" ")[2]))


async def send(client: aiohttp.ClientSession, one: Body, sent: Sent, **headers: str) -> None:
    data, kind = one
    try:
        async with client.post("/v1/restorations", data=data, headers={"Content-Type": kind, **headers}) as answer:
            sent.status = answer.status
            said = await answer.read()
            sent.job = json.loads(said).get("id", "")
    except aiohttp.ClientError as error:
        print(f"no answer: {error!r}", flush=True)
    sent.seconds = time.monotonic() - sent.due


async def open_loop(
    client: aiohttp.ClientSession, made: Sequence[Body], rate: float, seconds: float, **headers: str
) -> list[Sent]:
    """Sends `rate` a second for so long; those that it has, again and again, are pictures that it has had."""
    start = time.monotonic() + 0.1
    sent = [Sent(start + n / rate) for n in range(int(rate * seconds))]
    async with asyncio.TaskGroup() as group:
        for n, one in enumerate(sent):
            await asyncio.sleep(one.due - time.monotonic())
            group.create_task(send(client, made[n], one, **headers))
    return sent


async def overload(service: Endpoint, most: float, factor: int, seconds: float) -> dict[str, Any]:
    made = bodies(int(factor * most * seconds) + 8, first=100_000 * factor)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(service.url, connector=connector) as client:
        calm: list[float] = []
        for one in made[:4]:  # warm, one after another
            sent = Sent(time.monotonic())
            await send(client, one, sent)
            calm.append(sent.seconds)
            while await num_done(client) < len(calm):
                await asyncio.sleep(0.05)
        before, started = await num_done(client), time.monotonic()
        loaded = await open_loop(client, made[4:-4], factor * most, seconds)
        done, taken = await num_done(client) - before, time.monotonic() - started
        ended = time.monotonic()
        while True:
            sent = Sent(time.monotonic())
            await send(client, made[-4], sent)
            if sent.status == 202 and sent.seconds < 2 * max(calm):
                break
            await asyncio.sleep(0.2)
        recovered_s = time.monotonic() - ended
    statuses = Counter(one.status for one in loaded)
    shed = [one.seconds for one in loaded if one.status in (429, 503)]
    p99 = float(np.percentile(shed, 99)) if shed else 0.0
    goodput = done / taken / most
    holds = (
        set(statuses) <= {202, 429, 503}
        and p99 <= SHED_P99_S.get(factor, 0.1)
        and goodput >= GOODPUT
        and recovered_s <= RECOVERED_S
    )
    return {
        "capacity_per_s": round(most, 2),
        "sent": len(loaded),
        "statuses": {str(status): count for status, count in sorted(statuses.items())},
        "shed_p50_ms": round(1000 * float(np.median(shed)), 1) if shed else 0.0,
        "shed_p99_ms": round(1000 * p99, 1),
        "goodput": round(goodput, 3),
        "recovered_s": round(recovered_s, 2),
        "holds": holds,
    }


def fairness(most: float, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name, "keys")
        abuser, normal = (f"Bearer {add_key(keys, owner)}" for owner in ("abuser", "normal"))
        with endpoint(*REPLICAS, "--keys", str(keys), "--max-queue", f"{queue_megapixels(most):.3f}") as service:
            return asyncio.run(beside(service, most, seconds, abuser, normal))


async def beside(service: Endpoint, most: float, seconds: float, abuser: str, normal: str) -> dict[str, Any]:
    much, little = 10 * most, most / 5
    flood = bodies(int(much * seconds), first=5_000_000)
    few = bodies(int(little * seconds), first=9_000_000)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(service.url, connector=connector) as client:
        abused, served = await asyncio.gather(
            open_loop(client, flood, much, seconds, Authorization=abuser),
            open_loop(client, few, little, seconds, Authorization=normal),
        )
        done = 0
        for one in served:
            while one.status == 202:
                async with client.get(f"/v1/restorations/{one.job}", headers={"Authorization": normal}) as answer:
                    state = (await answer.json())["state"]
                if state in ("done", "failed"):
                    done += state == "done"
                    break
                await asyncio.sleep(0.1)
    statuses = Counter(one.status for one in abused)
    return {
        "abuser": {str(status): count for status, count in sorted(statuses.items())},
        "normal": {"sent": len(served), "done": done},
        "success": round(done / len(served), 4),
        "answered_p99_ms": round(1000 * float(np.percentile([one.seconds for one in served], 99)), 1),
        "holds": done >= SUCCESS * len(served),
    }


if __name__ == "__main__":
    main()
