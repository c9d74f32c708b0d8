"""A pool of worker processes that share a few API keys: no two use one at the same time.

    python examples/worker_pool.py [WORKERS] [JOBS]      against the server at $KEYPOOL_URL

Each worker takes jobs from a queue, and for each job a key from the server, for as long as the job takes. It
waits for a key as long as necessary, even through a restart of the server. A job whose lease ended before it was
done is repeated. Keys are given back automatically, also if a worker is stopped by SIGTERM.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from typing import Any

from keypool.client import KeyPool, LeaseLost, exit_on_sigterm


def do(job: int, key: str) -> str:
    """In place of a request to the service that the keys are for."""
    time.sleep(0.01)
    return f"job {job} done with a key of {len(key)} characters"


def work(name: str, jobs: Any, results: Any) -> None:
    """Do jobs until there are no more."""
    exit_on_sigterm()
    with KeyPool.from_env() as pool:
        while (job := jobs.get()) is not None:
            while True:
                try:
                    with pool.lease(owner=name, wait=None) as key:
                        result = do(job, key.secret)
                    break
                except LeaseLost as error:
                    print(f"{name}: job {job} again, {error}", file=sys.stderr)
            results.put(result)


def main(workers: int, count: int) -> None:
    """Start the workers, hand out the jobs, print the results."""
    context = multiprocessing.get_context("spawn")
    jobs: Any = context.Queue()
    results: Any = context.Queue()
    processes = [
        context.Process(target=work, args=(f"worker-{number}", jobs, results)) for number in range(workers)
    ]
    for process in processes:
        process.start()
    for job in [*range(count), *[None] * workers]:
        jobs.put(job)
    for _ in range(count):
        print(results.get())
    for process in processes:
        process.join()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5, int(sys.argv[2]) if sys.argv[2:] else 50)
