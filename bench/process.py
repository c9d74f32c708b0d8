"""Processes: every measurement has one of its own, so that none inherits another's memory.

A child runs one function and sends back what it returned. It is pinned to a core where that is possible, and
killed when it takes longer than it may.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import traceback
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from keypool.server import runtime

P = ParamSpec("P")
T = TypeVar("T")

_context = multiprocessing.get_context("spawn")
_PAGE = resource.getpagesize()


class ChildFailed(Exception):
    """A child raised, died or took too long; the message has its traceback."""


class Child(Generic[T]):
    """One function in a process of its own. Function, arguments and result must be picklable."""

    def __init__(self, cpu: int | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._name = function.__name__
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_run, args=(theirs, cpu, function, args, kwargs), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def wait(self, seconds: float) -> T:
        """What the function returned. Raises ChildFailed; the process is gone either way."""
        try:
            if not self._pipe.poll(seconds):
                raise ChildFailed(f"{self._name} took longer than {seconds:.0f} s")
            result, trouble = self._pipe.recv()
        except EOFError:
            raise ChildFailed(f"{self._name} died") from None
        finally:
            self.end()
        if trouble is not None:
            raise ChildFailed(trouble)
        return result  # type: ignore[no-any-return] # what came through the pipe is what went in

    def end(self) -> None:
        """Kill it if it is still there."""
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def in_child(seconds: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a process of its own, on the first core, for at most `seconds`."""
    return Child(first_core(), function, *args, **kwargs).wait(seconds)


def on_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop that the server runs on, if it is here, and return its result.

    keypool's own runtime.run ends the process, and so can't be what measures.
    """
    try:
        import uvloop  # noqa: PLC0415 - where there is one
    except ImportError:
        return asyncio.run(_as_the_server_does(main))
    return uvloop.run(_as_the_server_does(main))


async def _as_the_server_does(main: Coroutine[Any, Any, T]) -> T:
    runtime.collect_the_young(asyncio.get_running_loop())
    return await main


def pipe() -> tuple[Connection, Connection]:
    """Two ends; one may be given to a child."""
    return _context.Pipe()


def _run(
    pipe: Connection,
    cpu: int | None,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    pin(cpu)
    try:
        pipe.send((function(*args, **kwargs), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))


def cores() -> list[int]:
    """The cores that this process may use; none where that can't be told."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def first_core() -> int | None:
    """Where what is measured runs: it stays there, if there is another core for what measures it."""
    found = cores()
    return found[0] if len(found) > 1 else None


def last_core() -> int | None:
    """Where load comes from."""
    found = cores()
    return found[-1] if len(found) > 1 else None


def pin(cpu: int | None) -> None:
    """Keep this process on one core, if one is named."""
    if cpu is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})


def rss(pid: int | None = None) -> int:
    """Bytes of memory that a process (this one) has in use; 0 where /proc doesn't tell."""
    try:
        return int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def cpu_of(pid: int) -> float:
    """Seconds of processor time that the main thread of a process has had; 0 where /proc doesn't tell."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError):
        return 0.0


def preemptions() -> int:
    """How often this process had to leave its core to another."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
