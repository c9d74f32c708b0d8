"""Servers for the tests: one place says with which flags, and every test gets an empty pool.

`VARIANTS` is the list of ways to run the server that must keep the same promises: a later data file, engine
or HTTP server is one more line there, and the whole suite runs on it.

A server is shared by the tests of a worker process that want the same flags (`lend`), and purged before each
of them; what disturbs others (signals, counting from zero) takes a server of its own (`start_server`). Both
ways the test fails if the server logged an error, a traceback, a key or a token.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import inspect
import os
import signal
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import compiled_templates
import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key
from app_client import Browser
from engine_support import quiet
from support import (
    ADMIN_TOKEN,
    CLIENT_TOKEN,
    OTHER_CLIENT_TOKEN,
    SHORT_BLOCK,
    SHORT_LIFE,
    TOKENS,
    VIEWER_TOKEN,
    Client,
    ServerProcess,
)
from tornado.httpclient import AsyncHTTPClient
from tornado.ioloop import IOLoop
from tornado.web import Application
from valkeys import new_pool, shared_cluster, shared_valkey

from keypool.api.auth import Access
from keypool.config.settings import Settings, load
from keypool.server.app import make_app
from keypool.server.serving import SERVERS, open_pools

compiled_templates.share()
pytest.register_assert_rewrite("client_support")  # so that what it asserts fails with the values

HANGS = 400
"""Seconds after which a test, or its teardown, is taken to hang. The longest takes 40 s when alone."""

# --------------------------------------------------------------------------------------------- ways to run it


@dataclass(frozen=True)
class Variant:
    """One way to run the server; `flags` makes the flags, given a new directory for what this one server keeps.

    `quick` and `thorough` are the beginnings of the paths below tests/ of what runs on it, in the two tiers.
    """

    name: str
    flags: Callable[[Path], list[str]]
    quick: tuple[str, ...]
    thorough: tuple[str, ...] = ()


_HOT_CALLS = ("test_api_batch", "test_api_keys", "test_api_leases", "test_api_waiting")
_CALLS = (*_HOT_CALLS, "test_api_legacy", "test_api_lists", "test_api_stats")
# Each engine has tests of its own of how it keeps pools and imported keys.
_OF_POOLS = ("test_api_imports", "test_api_pools", "test_api_seats")
_LIFE = ("test_process", "test_feed")

VARIANTS = [
    # All that is neither storage's nor another HTTP server's shows here.
    Variant("memory", lambda directory: ["--data=:memory:"], ("",)),
    # The same engine with a journal, which has tests of its own.
    Variant(
        "file",
        lambda directory: [f"--data={directory / 'keypool.db'}"],
        ("test_api_batch", "test_process"),
        (*_HOT_CALLS, "test_process", "test_feed"),
    ),
    # Errors and access are decided before any engine is asked: the dispatcher may not even import one.
    Variant(
        "valkey",
        lambda directory: [f"--engine={new_pool(shared_valkey())}"],
        _HOT_CALLS,
        (*_CALLS, *_OF_POOLS, *_LIFE, "test_dashboard", "test_metrics"),
    ),
    # The same engine once more: what a cluster adds shows in the calls.
    Variant(
        "cluster",
        lambda directory: [f"--engine={new_pool(shared_cluster())}"],
        (),
        ("test_api_batch", "test_api_keys", "test_api_lists"),
    ),
    # The client and the command are tested against one server: the tests vary how the client sends.
    Variant(
        "tornado",
        lambda directory: ["--data=:memory:", "--http=tornado"],
        ("test_api_errors", "test_api_access", "test_api_waiting", "test_hostile"),
        # Of the browser's tests, what a connection does; the rest is the same pages by another server.
        (
            "test_api_",
            *_LIFE,
            "test_fuzz",
            "test_client_calls",
            "test_dashboard",
            "browser/test_states",
            "test_metrics",
        ),
    ),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test that takes a server on the variants that its file and its marks name."""
    if "variant" not in metafunc.fixturenames:
        return
    path = metafunc.definition.path.relative_to(Path(__file__).parent).as_posix()
    once = metafunc.definition.get_closest_marker("once") is not None
    chance = metafunc.definition.get_closest_marker("chance") is not None

    def is_quick(variant: Variant) -> bool:
        # Thousands of calls; test_valkey_engine.py has tests of chance of its own.
        return path.startswith(variant.quick) and not (chance and variant.name == "valkey")

    params = [
        pytest.param(variant, id=variant.name, marks=() if is_quick(variant) else pytest.mark.thorough)
        for variant in VARIANTS[: 1 if once else None]
        if path.startswith(variant.quick + variant.thorough)
        and (not chance or variant.name in ("memory", "valkey"))
    ]
    metafunc.parametrize("variant", params, indirect=True, scope="session")


@pytest.fixture(scope="session")
def variant(request: pytest.FixtureRequest) -> Variant:
    """The way in which this test's servers run."""
    chosen: Variant = request.param
    return chosen


# ----------------------------------------------------------------------------------------------- server's log

_servers_of_test: pytest.StashKey[list[tuple[ServerProcess, int]]] = pytest.StashKey()


def _show_log_on_failure(item: pytest.Item, server: ServerProcess) -> None:
    item.stash.setdefault(_servers_of_test, []).append((server, len(server.log_since(0))))


def pytest_configure() -> None:
    """What this process was started to ignore, in a shell's background or by nohup, all that it starts would."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            default = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Three for each core: most of the time a test waits, for a deadline or for a process that it started."""
    cores = yield
    return cores * 3


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Compile all tests the first time, by two processes: else each worker would do it for itself, in 12 s."""
    cache = sys.pycache_prefix
    if cache is None or config.args_source != config.ArgsSource.TESTPATHS or any(Path(cache).rglob("test_*")):
        return
    files = [str(path) for path in sorted(config.rootpath.glob("tests/**/test_*.py"))]
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    for process in [
        subprocess.Popen([*collect, *half], stdout=subprocess.DEVNULL) for half in (files[::2], files[1::2])
    ]:
        process.wait()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a process of tests that hangs, with the traceback of each thread: xdist reports its test, and goes on.

    pytest's own `faulthandler_timeout` doesn't cover what comes after a failure, nor what comes between two tests.
    """
    _end_if_it_hangs(item.config)
    try:
        return (yield)
    finally:
        _end_if_it_hangs(item.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """After a failure pytest has cancelled the timer."""
    _end_if_it_hangs(item.config)


def _end_if_it_hangs(config: pytest.Config) -> None:
    faulthandler.dump_traceback_later(HANGS, file=config.stash[fault_handler_stderr_fd_key], exit=True)


def pytest_collection_finish() -> None:
    """All modules and tests stay: a collection that walked them would take a quarter of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the process end."""
    faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In CI, print a failure at once, as a run that is cut short prints no summary."""
    if report.failed and os.environ.get("CI") == "true" and "PYTEST_XDIST_WORKER" not in os.environ:
        crash = getattr(report.longrepr, "reprcrash", None)
        print(
            f"\n{report.when} of {report.nodeid} failed: {getattr(crash, 'message', report.longrepr)}",
            flush=True,
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what the test's servers logged meanwhile beside its failure."""
    report = yield
    if report.failed:
        for server, since in item.stash.get(_servers_of_test, []):
            lines = server.log_since(since)[-200:]
            report.sections.append((f"log of server.py {' '.join(server.flags)}", "\n".join(lines)))
    return report


# ---------------------------------------------------------------------------------------------------- servers


class Start(Protocol):
    """Starts a server with these flags beside those of the variant."""

    def __call__(
        self, *flags: str, env: Mapping[str, str] | None = None, admin_token: str | None = None
    ) -> ServerProcess: ...


@pytest.fixture(scope="session")
def _start(variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Start:
    def start(
        *flags: str, env: Mapping[str, str] | None = None, admin_token: str | None = None
    ) -> ServerProcess:
        cwd = tmp_path_factory.mktemp("server")
        return ServerProcess(
            [*variant.flags(cwd), "--port=0", *flags], cwd=cwd, env=env, admin_token=admin_token
        )

    return start


@pytest.fixture
def start_server(_start: Start, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Starts servers for this test alone; each is ended, and must end in peace, when the test ends."""
    started: list[ServerProcess] = []

    def start(
        *flags: str, env: Mapping[str, str] | None = None, admin_token: str | None = None
    ) -> ServerProcess:
        server = _start(*flags, env=env, admin_token=admin_token)
        started.append(server)
        _show_log_on_failure(request.node, server)
        return server

    try:
        yield start
        for server in started:
            server.finish()
    finally:
        for server in started:
            server.close()


_KEPT = 5


class _Shelf:
    """The shared servers of this process, by what they were started with, those used last at the end.

    Few are kept: an idle server over a cluster costs it and itself 3 % of a core, and there are thirty kinds.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._servers: dict[object, ServerProcess] = {}

    def take(self, flags: tuple[str, ...], env: Mapping[str, str], admin_token: str | None) -> ServerProcess:
        """A server with an empty pool; a new one if the one there was left in no state to go on."""
        kind = (flags, tuple(sorted(env.items())))
        server = self._servers.pop(kind, None)
        if server is not None:
            try:
                server.purge()
                self._servers[kind] = server
                return server
            except (AssertionError, OSError):
                server.close()
        server = self._servers[kind] = self._start(*flags, env=env, admin_token=admin_token)
        if len(self._servers) > _KEPT:
            self._end([self._servers.pop(next(iter(self._servers)))])
        return server

    def finish(self) -> None:
        """End all of them; the first that doesn't end in peace fails."""
        servers, self._servers = list(self._servers.values()), {}
        self._end(servers)

    @staticmethod
    def _end(servers: list[ServerProcess]) -> None:
        try:
            for server in servers:
                if server.running:
                    server.finish()
        finally:
            for server in servers:
                server.close()


@pytest.fixture(scope="session")
def _shelf(_start: Start) -> Iterator[_Shelf]:
    shelf = _Shelf(_start)
    try:
        yield shelf
    finally:
        shelf.finish()


@pytest.fixture
def lend(_shelf: _Shelf, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Lends shared servers with an empty pool; each must live, and have a clean log, when it comes back."""
    lent: list[ServerProcess] = []

    def take(
        *flags: str, env: Mapping[str, str] | None = None, admin_token: str | None = None
    ) -> ServerProcess:
        server = _shelf.take(flags, env or {}, admin_token)
        lent.append(server)
        _show_log_on_failure(request.node, server)
        return server

    yield take
    for server in lent:
        server.hang_up()
        assert server.running, f"the server died:\n{server.log}"
        server.check()


@pytest.fixture
def server(lend: Start) -> ServerProcess:
    """An open server with the default deadlines and an empty pool."""
    return lend()


@pytest.fixture
def client(server: ServerProcess) -> Client:
    """A client of the open server."""
    return server.client()


@pytest.fixture
def short_server(lend: Start) -> ServerProcess:
    """An open server whose blocks (0.4 s) and keys (1.5 s) end soon."""
    return lend(f"--block-seconds={SHORT_BLOCK}", f"--keepalive-seconds={SHORT_LIFE}")


@pytest.fixture
def secrets_key(variant: Variant) -> dict[str, str]:
    """The variables with which a server takes keys from elsewhere: over Valkey it needs a secrets key."""
    shared = variant.name in ("valkey", "cluster")
    return {"KEYPOOL_SECRETS_KEY": b64encode(b"k" * 32).decode()} if shared else {}


@pytest.fixture
def importing_server(lend: Start, secrets_key: dict[str, str]) -> ServerProcess:
    """An open server that takes keys from elsewhere."""
    return lend(env=secrets_key)


@pytest.fixture
def guarded_server(lend: Start, secrets_key: dict[str, str]) -> ServerProcess:
    """A server that knows tokens: two for clients, one for viewers, one for admins."""
    server = lend(
        env=secrets_key
        | {
            "KEYPOOL_CLIENT_TOKEN": f"{CLIENT_TOKEN},{OTHER_CLIENT_TOKEN}",
            "KEYPOOL_VIEWER_TOKEN": VIEWER_TOKEN,
            "KEYPOOL_ADMIN_TOKEN": ADMIN_TOKEN,
        },
        admin_token=ADMIN_TOKEN,
    )
    server.secrets.update(TOKENS.values(), [OTHER_CLIENT_TOKEN])
    return server


# --------------------------------------------------------------------------------------------- in this process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have pytest-tornado run the `async def` tests that stand on its loop. Those of http1/ have a runner there."""
    for item in items:
        if not isinstance(item, pytest.Function) or "io_loop" not in item.fixturenames:
            continue
        if inspect.iscoroutinefunction(item.function):
            item.add_marker(pytest.mark.gen_test(timeout=60))


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """The loop of one test, in place of pytest-tornado's, which Tornado warns of."""
    raw = asyncio.new_event_loop()
    asyncio.set_event_loop(raw)
    loop = IOLoop(asyncio_loop=raw, make_current=False)
    yield loop
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


@pytest.fixture
def settings(request: pytest.FixtureRequest) -> Settings:
    """Those of `app`: an open server with a pool in memory, or what the test's mark `serves` says."""
    mark = request.node.get_closest_marker("serves")
    flags, variables = (mark.args, mark.kwargs) if mark else ((), {})
    return load(["--data=:memory:", *flags], variables)


@pytest.fixture
def app(io_loop: IOLoop, settings: Settings) -> Iterator[Application]:
    """The application, made on the loop that it runs on; the test fails if an error was logged meanwhile."""

    async def make() -> Application:
        access = Access(settings.client_tokens, settings.viewer_tokens, settings.admin_tokens)
        app = make_app(await open_pools(settings), access, settings)
        await app.settings["dashboard"].counting.wait()
        return app

    async def stop() -> None:
        made.settings["dashboard"].drain()
        made.settings["dispatcher"].wrong_tokens.close()
        await made.settings["dispatcher"].pools.close()
        assert not made.settings["in_flight"].count, "a request is still being answered"

    with quiet():
        made = io_loop.run_sync(make)
        yield made
        io_loop.run_sync(stop)


@pytest.fixture(params=list(SERVERS))
def http_server(
    request: pytest.FixtureRequest, io_loop: IOLoop, app: Application, _unused_port: tuple[socket.socket, int]
) -> Iterator[object]:
    """Each of the two HTTP servers in turn, in place of pytest-tornado's."""

    async def start() -> Any:
        made: Any = SERVERS[request.param](app, None)
        made.add_sockets([_unused_port[0]])
        return made

    made = io_loop.run_sync(start)
    yield made
    made.stop()
    io_loop.run_sync(made.close_all_connections)


@pytest.fixture
def base_url(http_port: int) -> str:
    """An open server answers to loopback names only, and `localhost` may be IPv6."""
    return f"http://127.0.0.1:{http_port}"


@pytest.fixture
def pages(http_client: AsyncHTTPClient, base_url: str) -> Browser:
    """Fetches pages of `app`."""
    return Browser(http_client, base_url)
