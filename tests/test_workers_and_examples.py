"""Many workers with few keys, and the programs of examples/, each as it would be run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from client_support import clean, environment, url_of
from support import ROOT, ServerProcess
from test_client_keeper import durable

from bench import workers
from keypool.client import KeyPool

EXAMPLES = ROOT / "examples"


def test_workers_never_share_a_key_at_one_time() -> None:
    """8 processes with 2 keys; bench/workers.py takes 50 and 10, and its time."""
    summary = workers.trial(8, 2, 1.0, 0, ":memory:")
    assert summary["errors"] == 0
    assert summary["lost"] == 0


@pytest.mark.thorough
def test_workers_through_two_kills_of_the_server(tmp_path: Path) -> None:
    """Every worker makes progress after each; what a kill swallowed is free again by its deadline."""
    durable(tmp_path)
    workers.trial(8, 2, 2.0, 2, str(tmp_path / "keys.db"))


def run(server: ServerProcess, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run an example to its end, which must be a good one."""
    ran = subprocess.run(
        list(words), capture_output=True, text=True, env=environment(server) | env, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    return ran


def test_the_worker_pool(server: ServerProcess) -> None:
    with KeyPool(url_of(server)) as pool:
        pool.generate_many(2)
        ran = run(server, sys.executable, str(EXAMPLES / "worker_pool.py"), "3", "12")
        assert sorted(ran.stdout.splitlines()) == sorted(
            f"job {job} done with a key of 20 characters" for job in range(12)
        )
        assert pool.stats().blocked == 0
    clean(server)


def test_the_cron_job(server: ServerProcess, tmp_path: Path) -> None:
    command = tmp_path / "keypool"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m keypool "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}:{environment()['PATH']}"
    with KeyPool(url_of(server)) as pool:
        pool.generate()
        ran = run(server, str(EXAMPLES / "nightly.sh"), PATH=path)
        assert ran.stdout == "exporting with a key of 20 characters\n"
        assert pool.stats().blocked == 0
    clean(server)


def test_the_crawler(server: ServerProcess) -> None:
    ran = run(server, sys.executable, str(EXAMPLES / "crawler.py"), "10")
    leases = [
        re.fullmatch(r"page (\d+): fetched under lease (\d+)", line) for line in ran.stdout.splitlines()
    ]
    assert [match and int(match[1]) for match in leases] == list(range(10))
    assert len({match[2] for match in leases if match}) == 10
    assert server.client().stats()["total"] == 0


@pytest.mark.parametrize(
    "program", [pytest.param("limited_worker.py", marks=pytest.mark.thorough), "limited_worker_async.py"]
)
def test_a_limit_of_the_service_is_hit_once_and_respected(server: ServerProcess, program: str) -> None:
    """8 workers with 2 keys: every request is answered, and no key is used while it should rest."""
    path = str(EXAMPLES / program)
    refused = run_limited(server, path)
    if not refused:  # a busy machine may take longer than a window of a second for more requests than it has
        refused = run_limited(server, "-c", LONG_WINDOWS, path)
    assert refused >= 1  # 2 keys have 10 requests at once
    stats = server.client().stats()
    assert stats["total"] == 0
    assert stats["cooled"] >= refused


LONG_WINDOWS = """
import functools, runpy, sys
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
import limited_service
limited_service.Limits = functools.partial(limited_service.Limits, seconds=15.0)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_limited(server: ServerProcess, *words: str) -> int:
    """Run it. Returns how many requests the service refused."""
    ran = run(server, sys.executable, *words, "8", "24")
    *answers, summary = ran.stdout.splitlines()
    numbers = [re.fullmatch(r"worker-\d, request (\d+): an answer", line) for line in answers]
    assert sorted(int(match[1]) for match in numbers if match) == list(range(24))
    found = re.fullmatch(r"served 24, refused (\d+), of these in spite of Retry-After 0", summary)
    assert found, summary
    return int(found[1])
