"""limited_worker.py with asyncio: tasks that share the keys of a rate-limited service.

    python examples/limited_worker_async.py [WORKERS] [REQUESTS]      against the server at $KEYPOOL_URL

$KEYPOOL_TOKEN needs the role admin, since the program makes two keys for itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import httpx2
from limited_service import Limits, running

from keypool.client import AsyncKeyPool


async def ask(pool: AsyncKeyPool, http: httpx2.AsyncClient, url: str, owner: str) -> str:
    """One answer of the service, with whatever keys that takes."""
    while True:
        async with pool.lease(owner=owner, wait=None) as key:
            response = await http.get(url, headers={"X-Api-Key": key.secret})
            key.report(response)
        if response.status_code == 200:
            return response.text


async def work(
    name: str, pool: AsyncKeyPool, http: httpx2.AsyncClient, url: str, jobs: Iterator[int]
) -> None:
    """Do jobs until there are no more."""
    for job in jobs:
        print(f"{name}, request {job}: {await ask(pool, http, url, name)}", end="")


async def main(workers: int, count: int) -> None:
    """Start the workers, and compare what the service saw."""
    limits = Limits()
    jobs = iter(range(count))
    with running(limits) as url:
        async with AsyncKeyPool.from_env() as pool, httpx2.AsyncClient(timeout=10) as http:
            keys = await pool.generate_many(2)
            tasks = [work(f"worker-{number}", pool, http, url, jobs) for number in range(workers)]
            await asyncio.gather(*tasks)
            await pool.delete_many(keys)
    print(
        f"served {limits.served}, refused {limits.refused}, of these in spite of Retry-After {limits.ignored}"
    )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 8, int(sys.argv[2]) if sys.argv[2:] else 40))
