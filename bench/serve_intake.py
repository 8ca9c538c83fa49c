"""What a body that nobody reads costs: Ray Serve's proxy beside plain uvicorn, which the endpoint uses.

    python bench/serve_intake.py [--mib N]

A client sends N MiB in chunks to an application that answers late and reads nothing, or until it is not let send more.
"""

import argparse
import logging
import multiprocessing
import socket
import time
from collections.abc import Callable

import psutil
import ray
import uvicorn
from _serve_setup import MIB, free_port
from fastapi import FastAPI
from ray import serve

PATIENCE_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    for name, start in (("Ray Serve's proxy", with_proxy), ("uvicorn", with_uvicorn)):
        port = free_port()
        process, stop = start(port)
        before = process.memory_info().rss
        sent = send(port, options.mib)
        after = process.memory_info().rss
        print(f"{name}: {sent} of {options.mib} MiB taken, {(after - before) / MIB:.0f} MiB more memory", flush=True)
        stop()


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/")
    async def late() -> str:
        import asyncio

        await asyncio.sleep(3600)
        return "late"

    return app


def with_proxy(port: int) -> tuple[psutil.Process, Callable[[], object]]:
    app = application()
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=128 * MIB, log_to_driver=False)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(http_options={"port": port})

    @serve.deployment
    @serve.ingress(app)
    class Late:
        pass

    serve.run(Late.bind())
    (proxy,) = (one for one in psutil.process_iter() if "ProxyActor" in " ".join(one.cmdline()))
    return proxy, ray.shutdown


def with_uvicorn(port: int) -> tuple[psutil.Process, Callable[[], object]]:
    process = multiprocessing.get_context("spawn").Process(target=run, args=(port,))
    process.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return psutil.Process(process.pid), process.kill
        except OSError:
            time.sleep(0.1)


def run(port: int) -> None:
    uvicorn.run(application(), port=port, http="h11", log_level="error")


def send(port: int, mib: int) -> int:
    """MiB that were taken."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(PATIENCE_S)
        client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%b\r\n" % (MIB, b"x" * MIB)
        for sent in range(mib):
            try:
                client.sendall(chunk)
            except TimeoutError:
                return sent
    return mib


if __name__ == "__main__":
    main()
