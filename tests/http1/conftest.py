"""Runs each `async def` test on both loops, within a time limit.

Tests of parsing alone run on uvloop only: transports make no difference to them.

A test fails if an error was logged that it did not expect by the marker ``logs_errors``:
otherwise an exception in a callback would go unnoticed.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import uvloop

_SECONDS = 120
_PHASES: tuple[Literal["setup"], Literal["call"]] = ("setup", "call")
_BY_TRANSPORT = ("test_raw", "test_server", "test_time", "test_turns", "test_websocket", "test_writer")
_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "logs_errors: the test expects errors to be logged")
    config.addinivalue_line("markers", "thorough: only `./run test --all` runs it")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if inspect.iscoroutinefunction(metafunc.function):
        metafunc.fixturenames.append("loop_kind")
        # Only what depends on the loop's transports runs on both loops.
        by_transport = metafunc.module.__name__.rpartition(".")[2] in _BY_TRANSPORT
        metafunc.parametrize("loop_kind", list(_LOOPS) if by_transport else ["uvloop"])
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", ["http1", "tornado"])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    factory = _LOOPS[str(pyfuncitem.callspec.params["loop_kind"])]
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(asyncio.wait_for(pyfuncitem.obj(**arguments), _SECONDS))
    return True


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    errors = [
        record.getMessage()
        for when in _PHASES
        for record in caplog.get_records(when)
        if record.levelno >= logging.ERROR
    ]
    if request.node.get_closest_marker("logs_errors"):
        assert errors, "the test was to log an error"
    else:
        assert not errors
