"""Workers that share the keys of a rate-limited service, and let a key rest for as long as the service asks.

    python examples/limited_worker.py [WORKERS] [REQUESTS]      against the server at $KEYPOOL_URL

$KEYPOOL_TOKEN needs the role admin, since the program makes two keys for itself. limited_worker_async.py is the same
with asyncio, limited_service.py the service.

`key.report(response)` is all that it takes: a 429 is reported when the key is given back, the key cools for the
response's Retry-After, and nobody gets it meanwhile. So each limit is hit once, by one worker, and not by all of them.
"""

from __future__ import annotations

import queue
import sys
import threading

import httpx2
from limited_service import Limits, running

from keypool.client import KeyPool, exit_on_sigterm


def ask(pool: KeyPool, http: httpx2.Client, url: str, owner: str) -> str:
    """One answer of the service, with whatever keys that takes."""
    while True:
        with pool.lease(owner=owner, wait=None) as key:
            response = http.get(url, headers={"X-Api-Key": key.secret})
            key.report(response)
        if response.status_code == 200:
            return response.text


def work(name: str, pool: KeyPool, url: str, jobs: queue.SimpleQueue[int]) -> None:
    """Do jobs until there are no more."""
    with httpx2.Client(timeout=10) as http:
        while True:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                return
            print(f"{name}, request {job}: {ask(pool, http, url, name)}", end="", flush=True)


def main(workers: int, count: int) -> None:
    """Start the workers, and compare what the service saw."""
    limits = Limits()
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    for job in range(count):
        jobs.put(job)
    with KeyPool.from_env() as pool, running(limits) as url:
        keys = pool.generate_many(2)
        threads = [
            threading.Thread(target=work, args=(f"worker-{number}", pool, url, jobs))
            for number in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        pool.delete_many(keys)
    print(
        f"served {limits.served}, refused {limits.refused}, of these in spite of Retry-After {limits.ignored}"
    )


if __name__ == "__main__":
    exit_on_sigterm()
    main(int(sys.argv[1]) if sys.argv[1:] else 8, int(sys.argv[2]) if sys.argv[2:] else 40)
