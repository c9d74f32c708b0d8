"""Arrows point down only: what may import what, read from the source.

`LAYERS` is the house from the cellar up. A module imports from rows below its own, never from its own row or one
above, so there is no circle either. A new module fails here until it has its place.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    "keypool",  # the version
    "keypool.with_parent keypool.early_exit",
    # The client, which knows nothing of the server
    "keypool.client.clock keypool.client.errors",
    "keypool.client.wire keypool.client.shapes",
    "keypool.client.blocking keypool.client.calls keypool.client.held keypool.client.signals",
    "keypool.client.by_aiohttp keypool.client.by_tornado keypool.client.retry",
    "keypool.client.gather keypool.client.loop_signals",
    "keypool.client.rounds keypool.client.sending keypool.client.caller",
    "keypool.client.async_caller keypool.client.keeper keypool.client.lease",
    "keypool.client.async_keeper keypool.client.async_lease keypool.client.pool",
    "keypool.client.async_pool",
    "keypool.client",
    "keypool.cli keypool.cli.forwarding",
    "keypool.cli.status keypool.cli.output keypool.cli.progress",
    "keypool.cli.connect keypool.cli.words",
    "keypool.cli.keys keypool.cli.running keypool.cli.completing",
    "keypool.cli.following keypool.cli.watching",
    # The server
    "keypool.resources keypool.log_writer",
    "keypool.errors keypool.tally keypool.limits keypool.notify keypool.proxies",
    "keypool.http1.responses keypool.http1.awake keypool.http1.turns",
    "keypool.http1.peer keypool.http1.section keypool.http1.stream",
    "keypool.http1.request",
    "keypool.http1.link keypool.http1.rules",
    "keypool.http1.exchange keypool.http1.reader",
    "keypool.http1.intake",
    "keypool.http1.connection",
    "keypool.http1.server",
    "keypool.http1",
    "keypool.keys",
    "keypool.index keypool.events keypool.answers keypool.logs",
    "keypool.pool",
    "keypool.cursor",
    "keypool.engine",  # the protocol
    "keypool.engine.valkey_url keypool.engine.valkey_scripts",
    "keypool.engine.valkey_link keypool.engine.valkey_waiters",
    "keypool.engine.valkey_look keypool.engine.valkey_nodes",
    "keypool.engine.valkey_partitions keypool.engine.valkey_presence keypool.engine.valkey_wake",
    "keypool.engine.valkey_looks",
    "keypool.engine.valkey_draws keypool.engine.valkey_making keypool.engine.valkey_pages",
    "keypool.engine.valkey",
    "keypool.engine.valkey_open",
    "keypool.engine.clock keypool.engine.commit keypool.engine.datafile keypool.engine.loading keypool.engine.timers",
    "keypool.engine.batches keypool.engine.copying keypool.engine.moving",
    "keypool.engine.writer",
    "keypool.engine.link keypool.engine.moving_valkey",
    "keypool.engine.journal",
    "keypool.engine.embedded",
    "keypool.engine.durable",
    "keypool.assets keypool.history keypool.throttle keypool.vitals",
    "keypool.charts keypool.feed",
    "keypool.auth keypool.kinds",
    "keypool.audit",
    "keypool.session keypool.tokens keypool.operations keypool.wrong_tokens",
    "keypool.curl keypool.token_reload",
    "keypool.settings",
    "keypool.in_force",
    "keypool.dashboard",
    "keypool.handlers",
    "keypool.handlers.access keypool.handlers.calls",
    "keypool.metrics",
    "keypool.handlers.inflight keypool.handlers.problems keypool.handlers.steps keypool.handlers.wording",
    "keypool.beside",
    "keypool.openapi",
    "keypool.handlers.dispatch keypool.handlers.legacy",
    "keypool.handlers.api",
    "keypool.handlers.pages keypool.handlers.raw",
    "keypool.fast keypool.stock",
    "keypool.handlers.dashboard keypool.handlers.feed keypool.handlers.scrape keypool.handlers.static",
    "keypool.handlers.signin",
    "keypool.app keypool.reference keypool.station",
    "keypool.processes keypool.runtime keypool.serving",
    "keypool.launch",
    "server keypool.backups keypool.cli.main keypool.migrating",
    "keypool.__main__",
)
RANKS = {module: rank for rank, row in enumerate(LAYERS) for module in row.split()}

FOR_TYPES = {
    ("keypool.keys", "keypool.index"),
    ("keypool.http1.request", "keypool.http1.exchange"),
    ("keypool.http1.request", "keypool.http1.reader"),
    ("keypool.http1.exchange", "keypool.http1.connection"),
    *(
        (f"keypool.http1.{part}", "keypool.http1.server")
        for part in ("link", "reader", "intake", "connection")
    ),
}
"""Arrows up that no program follows: a key's fields hold its places in the orders, and name their type; what
a connection is made of names the connection and the server that it is part of."""

OUTSIDE = ("tornado", "asyncio", "sqlite3", "time", "threading", "socket")
"""What the rules and all below them know nothing of."""

BANS = {
    # module: (what it must not import, directly or through others, because)
    "keypool.pool": (OUTSIDE, "rules are pure: no I/O, no clock, no loop"),
    "keypool.operations": (
        ("tornado", "sqlite3", "http", "keypool.handlers", "keypool.settings"),
        "a call knows the engine's protocol and no HTTP",
    ),
    "keypool.engine.embedded": (("keypool.settings", "keypool.auth", "keypool.operations"), "it is told"),
    "keypool.engine.writer": (("tornado", "asyncio"), "a process that does one thing starts fast"),
    "keypool.handlers.dispatch": (
        ("tornado", "sqlite3", "socket", "keypool.engine.embedded", "keypool.settings"),
        "HTTP's part of the API serves any engine on any HTTP server",
    ),
}


@dataclass
class Module:
    """A module and what it imports: when it runs, and what for its annotations alone."""

    name: str
    imports: set[str] = field(default_factory=set)
    for_types: set[str] = field(default_factory=set)


def _source_files() -> Iterator[tuple[str, Path]]:
    yield "server", ROOT / "server.py"
    for path in sorted((ROOT / "keypool").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


@cache
def modules() -> dict[str, Module]:
    """All modules of the program by name."""
    files = dict(_source_files())
    found = {}
    for name, path in files.items():
        module = found[name] = Module(name)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        types_only = {id(node) for block in _blocks_for_types(tree) for node in ast.walk(block)}
        for node in ast.walk(tree):
            into = module.for_types if id(node) in types_only else module.imports
            into.update(_targets(node, files.keys(), name))
    return found


def _blocks_for_types(tree: ast.Module) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from node.body


def _targets(node: ast.AST, ours: Collection[str], importer: str) -> Iterator[str]:
    """What an import statement names: of ours the module, of others the whole name."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{importer} has a relative import in line {node.lineno}"
        assert node.module is not None
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in ours or not node.module.startswith("keypool") else node.module


def reached(name: str) -> dict[str, list[str]]:
    """All that a module imports when it runs, through whatever others, each with the way there."""
    ways = {name: [name]}
    queue = [name]
    while queue:
        current = queue.pop(0)
        for target in sorted(modules()[current].imports) if current in modules() else ():
            if target not in ways:
                ways[target] = [*ways[current], target]
                queue.append(target)
    return ways


def names(target: str, banned: str) -> bool:
    """Whether an imported name is the banned one or lies in it."""
    return target == banned or target.startswith(banned + ".")


# ------------------------------------------------------------------------------------------------------- arrows


@pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.name)
def test_a_module_imports_only_from_below(module: Module) -> None:
    """And has a place in the table."""
    assert module.name in RANKS, (
        f"{module.name} has no place in LAYERS: give it one, above all that it imports"
    )
    for target in sorted(module.imports):
        if target in modules():
            assert RANKS.get(target, -1) < RANKS[module.name], (
                f"{module.name} imports {target}, which is not below it: rows {RANKS[module.name]}, "
                f"{RANKS.get(target)}"
            )


def test_no_arrow_points_up_for_annotations_but_those_that_are_named() -> None:
    """They cost no circle, but a reader follows them all the same."""
    up = {
        (module.name, target)
        for module in modules().values()
        for target in module.for_types
        if target in modules() and RANKS.get(target, -1) >= RANKS.get(module.name, -1)
    }
    assert up == FOR_TYPES


def test_the_table_names_no_module_that_is_gone() -> None:
    """Nor one twice."""
    assert RANKS.keys() <= modules().keys(), f"no such module: {sorted(RANKS.keys() - modules().keys())}"
    assert len(RANKS) == sum(len(row.split()) for row in LAYERS), "a module has two places"


# --------------------------------------------------------------------------------------------------------- bans


@pytest.mark.parametrize("name", BANS)
def test_a_module_knows_nothing_of_what_is_not_its_business(name: str) -> None:
    """Not even through what it imports."""
    banned, because = BANS[name]
    for target, way in reached(name).items():
        for ban in banned:
            assert not names(target, ban), f"{' -> '.join(way)}: {because}"


@pytest.mark.parametrize("name", [name for name in reached("keypool.pool") if name.startswith("keypool")])
def test_nothing_below_the_rules_knows_of_the_world_outside(name: str) -> None:
    """Each by itself, so that the failure names the one."""
    outside = [target for target in modules()[name].imports if any(names(target, ban) for ban in OUTSIDE)]
    assert not outside, f"{name} imports {outside}"


def test_settings_reach_nobody_but_those_who_start_the_server_and_document_it() -> None:
    """Whoever else needs a setting is given its value."""
    readers = {module.name for module in modules().values() if "keypool.settings" in module.imports}
    # The dashboard shows the settings themselves.
    assert readers <= {
        "keypool.app",
        "keypool.backups",
        "keypool.dashboard",
        "keypool.in_force",
        "keypool.launch",
        "keypool.reference",
        "keypool.serving",
    }


def test_only_the_timers_and_their_engine_name_tornados_loop() -> None:
    """One place sets the timers of deadlines and cancels them; the service manager's watchdog has one of its own."""
    users = {
        module.name
        for module in modules().values()
        if any(names(target, "tornado.ioloop") for target in module.imports)
    }
    assert users <= {"keypool.engine.timers", "keypool.engine.embedded", "keypool.notify"}


def test_only_the_data_file_and_its_writer_speak_to_sqlite() -> None:
    """Its schema and rules stand in one place."""
    users = {
        module.name
        for module in modules().values()
        if any(names(target, "sqlite3") for target in module.imports)
    }
    assert users <= {f"keypool.engine.{name}" for name in ("batches", "copying", "datafile", "writer")}


# ----------------------------------------------------------------------------------------------- the test's own


def test_this_reads_imports_as_python_does() -> None:
    """In functions too, of submodules by name, and it finds what is there."""
    imports = {name: module.imports for name, module in modules().items()}
    assert "keypool.engine.datafile" in imports["keypool.engine.journal"], (
        "from keypool.engine import datafile"
    )
    assert "uvloop" in imports["keypool.runtime"], "an import inside a function"
    assert "keypool.index" in modules()["keypool.keys"].for_types
    assert "keypool.index" not in imports["keypool.keys"]
    assert "keypool.errors" in reached("keypool.pool")
    assert "msgspec" in reached("keypool.pool"), "through events"
