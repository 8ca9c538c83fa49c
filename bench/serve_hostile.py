"""Clients that mean no good: what they are told, what they cost, what others notice.

    python bench/serve_hostile.py [bodies|multipart|schemathesis ...] [--requests N] [--bodies N]

bodies        One byte more than the cap, chunks without an end, 10,000 parts, a header of 1 MB, 200 connections that
              send a byte now and then; beside them a client that asks for tiles of a finished picture.
schemathesis  N requests made from the endpoint's own description (`pipx install schemathesis`): no answer may be 5xx.
multipart     N bodies that are nearly forms: cut, repeated, misnamed, with broken pictures. No answer may be 5xx, none
              may name a path or a version.
"""

import argparse
import math
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import requests
from _batch_setup import record
from _serve_setup import MIB, Endpoint, body, endpoint, form

from engine.serve.desk import Limits

SLOW = 200
CAP_BYTES = Limits().max_bytes
MOST_GROWTH, MOST_SLOWER = 64, 2.0
LEAKS = re.compile(rb"/(?:home|tmp|root|work|dev|usr|var)/|Traceback|site-packages|[Pp]ython/?\s*3|uvicorn|\.py\b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="|".join(MEASURED))
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--bodies", type=int, default=2000)
    options = parser.parse_args()
    what = options.what or list(MEASURED)
    if wrong := set(what) - set(MEASURED):
        parser.error(f"{', '.join(wrong)}: not one of {', '.join(MEASURED)}")
    if "schemathesis" in what and shutil.which("schemathesis") is None:
        parser.error("schemathesis: 0 commands of this name; install it (pipx install schemathesis)")
    good = True
    with endpoint() as service:
        for name in what:
            found = MEASURED[name](service, options)
            found["holds"] &= requests.get(f"{service.url}/readyz", timeout=10).ok
            print(f"{name}: {found}", flush=True)
            record(f"hostile {name}", found, into="serve")
            good &= found["holds"]
    raise SystemExit(0 if good else 1)


def hostile_bodies(service: Endpoint, _: argparse.Namespace) -> dict[str, Any]:
    job = service.ended(requests.post(f"{service.url}/v1/restorations", files=form(1, 256, scale=4), timeout=60).json())
    tile = f"{service.url}{job['links']['iiif']['restored']}/0,0,512,512/512,512/0/default.jpg"
    calm = [timed(tile) for _ in range(300)]
    answers: dict[str, str] = {}
    slower: dict[str, float] = {}
    before = most = service.front.memory_info().rss
    for name, attack in ATTACKS.items():
        taken: list[float] = []
        with healthy(tile, taken):
            answers[name] = attack(service)
            time.sleep(1)
        most = max(most, service.front.memory_info().rss)
        slower[name] = round(p99(taken) / p99(calm), 2)
    growth = (most - before) / MIB
    return {
        "answers": answers,
        "growth_mib": round(growth, 1),
        "calm_p99_ms": round(1000 * p99(calm), 1),
        "healthy_p99_ratio": slower,
        "holds": all(said.startswith("4") for said in answers.values())
        and growth <= MOST_GROWTH
        and max(slower.values()) <= MOST_SLOWER,
    }


def timed(url: str) -> float:
    started = time.monotonic()
    assert requests.get(url, timeout=30).ok
    time.sleep(0.01)
    return time.monotonic() - started - 0.01


def p99(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99))


@contextmanager
def healthy(url: str, taken: list[float]) -> Generator[None]:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set() or len(taken) < 100:
            taken.append(timed(url))

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join()


def raw(service: Endpoint, head: bytes, more: Callable[[socket.socket], None]) -> str:
    """The status that is answered to bytes."""
    with socket.create_connection(("127.0.0.1", service.port)) as client:
        client.settimeout(30)
        with suppress(ConnectionError):
            client.sendall(head)
            more(client)
        with suppress(ConnectionError, TimeoutError):
            said = client.recv(64)
            return said.split(b" ")[1].decode() if said.startswith(b"HTTP") else "nothing"
    return "reset"


HEAD = b"POST /v1/restorations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


def one_byte_more(service: Endpoint) -> str:
    return raw(service, HEAD + b"Content-Length: %d\r\n\r\n" % (CAP_BYTES + 1), lambda _: None)


def endless_chunks(service: Endpoint) -> str:
    def more(client: socket.socket) -> None:
        client.sendall(b"%x\r\n%b\r\n" % (len(PART), PART))
        chunk = b"%x\r\n%b\r\n" % (MIB, bytes(MIB))
        for _ in range(2 * CAP_BYTES // MIB):
            client.sendall(chunk)

    return raw(service, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", more)


def many_parts(service: Endpoint) -> str:
    parts = b"".join(b'--b\r\nContent-Disposition: form-data; name="x%d"\r\n\r\n1\r\n' % n for n in range(10_000))
    return raw(service, HEAD + b"Content-Length: %d\r\n\r\n" % len(parts), lambda client: client.sendall(parts))


def long_header(service: Endpoint) -> str:
    return raw(service, HEAD, lambda client: client.sendall(b"X-Long: " + b"a" * MIB + b"\r\n\r\n"))


def slow_connections(service: Endpoint) -> str:
    """Half of them never end their headers, half trickle a body."""
    clients = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(SLOW)]
    for n, client in enumerate(clients):
        client.sendall(HEAD if n % 2 else HEAD + b"Content-Length: 100000\r\n\r\n" + PART)
    started = time.monotonic()
    while time.monotonic() - started < 35:
        for client in clients:
            with suppress(OSError):
                client.sendall(b"a")
        time.sleep(1)
    said: Counter[str] = Counter()
    for client in clients:
        client.settimeout(5)
        with suppress(OSError):
            said[client.recv(64).split(b" ")[1].decode()] += 1
        client.close()
    return ", ".join(f"{status} {count} times" for status, count in said.most_common()) or "nothing"


ATTACKS = {
    "one byte more": one_byte_more,
    "endless chunks": endless_chunks,
    "10,000 parts": many_parts,
    "a header of 1 MB": long_header,
    f"{SLOW} slow connections": slow_connections,
}


def multipart(service: Endpoint, options: argparse.Namespace) -> dict[str, Any]:
    """Bodies that are nearly right."""
    chance = random.Random(0)
    statuses: Counter[int] = Counter()
    leaks: list[str] = []
    session = requests.Session()
    good, kind = body(form(2, 96))
    for n in range(options.bodies):
        data, said = bytearray(good), kind
        match chance.randrange(8):
            case 0:  # cut
                del data[chance.randrange(len(data)) :]
            case 1:  # a few bytes changed anywhere
                for _ in range(chance.randrange(1, 20)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            case 2:  # a piece of it twice
                start = chance.randrange(len(data))
                data[start:start] = data[start : start + chance.randrange(2000)]
            case 3:  # options of any kind
                data = bytearray(data.replace(b'{"scale": 1}', nonsense(chance)))
            case 4:  # other names
                data = bytearray(data.replace(b'name="image"', b'name="%b"' % nonsense(chance)))
            case 5:  # another boundary, or none
                said = chance.choice(["multipart/form-data", "multipart/form-data; boundary=x", "text/plain", ""])
            case 6:  # the picture's own bytes changed
                start = data.index(b"IHDR")
                data[start + chance.randrange(60)] ^= 1 << chance.randrange(8)
            case _:  # lines that end otherwise
                data = bytearray(data.replace(b"\r\n", chance.choice([b"\n", b"\r", b"\r\n\r\n"]), chance.randrange(9)))
        try:
            answer = session.post(
                f"{service.url}/v1/restorations", data=bytes(data), headers={"Content-Type": said}, timeout=60
            )
        except requests.RequestException:
            statuses[0] += 1
            continue
        statuses[answer.status_code] += 1
        if LEAKS.search(answer.content) or LEAKS.search(str(answer.headers).encode()):
            leaks.append(f"{n}: {answer.text[:300]}")
    return {
        "statuses": {str(status): times for status, times in sorted(statuses.items())},
        "leaks": leaks[:5],
        "holds": not leaks and not any(status >= 500 or not status for status in statuses),
    }


NONSENSE = (
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b'{"scale": 1, "scale": 16}', b'{"scale": [[[[]]]]}'),
    *(b'{"scale": 1e999}', b'{"scale": -1}', b'{"page": 10000000000}', b'{"long_side_px": 0}', b'{"page": 1e5}'),
)


def nonsense(chance: random.Random) -> bytes:
    return chance.choice((*NONSENSE, chance.randbytes(40)))


def described(service: Endpoint, options: argparse.Namespace) -> dict[str, Any]:
    """What schemathesis finds with about so many requests; what has few forms is asked less often."""
    operations = requests.get(f"{service.url}/openapi.json", timeout=10).json()["paths"].values()
    varied = sum(bool(one.get("parameters") or one.get("requestBody")) for each in operations for one in each.values())
    per_operation = math.ceil(options.requests / varied)
    command = ["schemathesis", "run", f"{service.url}/openapi.json"]
    command += ["--max-examples", str(per_operation), "--checks", "not_a_server_error", "--phases", "examples,fuzzing"]
    command += ["--request-timeout", "20", "--suppress-health-check", "all"]
    ended = subprocess.run([*command, "--seed", "1"], capture_output=True, text=True, check=False)
    made = re.search(r"(\d[\d,]*) generated", ended.stdout)
    return {
        "requests": int(made[1].replace(",", "")) if made else 0,
        "said": ended.stdout[-1500:] if ended.returncode else "",
        "holds": ended.returncode == 0 and made is not None,
    }


MEASURED = {"bodies": hostile_bodies, "multipart": multipart, "schemathesis": described}


if __name__ == "__main__":
    main()
