"""Child processes, so that no measurement inherits the memory or the event loop of another, and their cost."""

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

P = ParamSpec("P")
T = TypeVar("T")

_context = multiprocessing.get_context("spawn")
_PAGE = resource.getpagesize()


class ChildFailed(Exception):
    """A child raised, died or took too long; the message has its traceback."""


class Child(Generic[T]):
    """A function that runs in a process of its own. Function, arguments and result must be picklable."""

    def __init__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> None:
        self._name = function.__name__
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=_run, args=(theirs, function, args, kwargs), daemon=True)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> T:
        """Return what the function returned. Raises ChildFailed; the process is gone either way."""
        try:
            if not self._pipe.poll(seconds):
                raise ChildFailed(f"{self._name} took longer than {seconds:.0f} s")
            result, failure = self._pipe.recv()
        except EOFError:
            raise ChildFailed(f"{self._name} died") from None
        finally:
            self.end()
        if failure is not None:
            raise ChildFailed(failure)
        return result  # type: ignore[no-any-return] # what was sent is what the function returned

    def end(self) -> None:
        """Kill the process if it still runs."""
        self._process.join(1)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run(
    pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        pipe.send((function(*args, **kwargs), None))
    except Exception:
        pipe.send((None, traceback.format_exc()))


def on_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop, as the server does, or on asyncio's loop if uvloop isn't installed."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def pin_to_first_core() -> None:
    """Keep this process on one core, if it may use several, so that it isn't moved while it is measured."""
    if hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def rss(pid: int | None = None) -> int:
    """Resident memory of a process (by default this one) in bytes; 0 without /proc."""
    try:
        return int(Path(f"/proc/{pid or 'self'}/statm").read_text().split()[1]) * _PAGE
    except OSError:
        return 0


def cpu_of(pid: int) -> float:
    """Processor time of the main thread of a process, in seconds; 0 without /proc."""
    return _schedstat(pid, 0)


def waited_for_core(pid: int) -> float:
    """How long the main thread of a process was ready to run and had no core, in seconds; 0 without /proc."""
    return _schedstat(pid, 1)


def _schedstat(pid: int, field: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[field]) / 1e9
    except (OSError, ValueError):
        return 0.0


def preemptions() -> int:
    """How often this process had to leave its core to another."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
