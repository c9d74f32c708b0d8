"""Arrows point down only: which room may import which, read from the source.

`FLOORS` lists the rooms, which are packages, from the bottom up. A module imports from its own room and from floors
below, never from a floor above, and within a room or a floor no modules import each other in a circle. A new module
has its place by the folder it stands in; only a new room needs a row here.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = (
    "keypool",  # the version, and what a process does before anything else
    "keypool.client",
    "keypool.cli",
    "keypool.core",
    "keypool.ops",
    "keypool.engine",
    "keypool.engine.durable keypool.engine.valkey",
    "keypool.engine.migrate keypool.config",
    "keypool.http.http1",
    "keypool.api",
    "keypool.http",
    "keypool.web",
    "keypool.server",
)
FLOOR_OF = {room: floor for floor, row in enumerate(FLOORS) for room in row.split()}

PROGRAMS = ("server", "keypool.__main__")
"""What is started, above all rooms: nothing imports it."""

OUTSIDE = ("tornado", "asyncio", "sqlite3", "time", "threading", "socket")
"""What the rules and all below them know nothing of."""

BANS = {
    # module: (what it must not import, directly or through others, because)
    "keypool.core.pool": (OUTSIDE, "rules are pure: no I/O, no clock, no loop"),
    "keypool.api.operations": (
        ("tornado", "sqlite3", "http", "keypool.http", "keypool.web", "keypool.config.settings"),
        "a call knows the engine's protocol and no HTTP",
    ),
    "keypool.engine.embedded": (
        ("keypool.config.settings", "keypool.api.auth", "keypool.api.operations"),
        "it is told",
    ),
    "keypool.engine.durable.writer": (("tornado", "asyncio"), "a process that does one thing starts fast"),
    "keypool.api.dispatch": (
        ("tornado", "sqlite3", "socket", "keypool.engine.embedded", "keypool.config.settings"),
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


def room_of(name: str) -> str:
    """The package that a module stands in; a package's own module stands in itself."""
    return name if name in FLOOR_OF else name.rpartition(".")[0]


@pytest.mark.parametrize("room", FLOOR_OF)
def test_a_room_imports_only_from_its_own_floor_and_those_below(room: str) -> None:
    """For annotations, too: a reader follows those as well."""
    for module in modules().values():
        if module.name in PROGRAMS or room_of(module.name) != room:
            continue
        for target in sorted(module.imports | module.for_types):
            if target in modules():
                assert FLOOR_OF.get(room_of(target), len(FLOORS)) <= FLOOR_OF[room], (
                    f"{module.name} imports {target}, which is in a room above it"
                )


def test_every_module_stands_in_a_room() -> None:
    """A new package gets its floor in the table, and a package that is gone leaves it."""
    rooms = {room_of(name) for name in modules() if name not in PROGRAMS}
    assert rooms == FLOOR_OF.keys()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Not within a room either."""
    for name in modules():
        for target in modules()[name].imports & modules().keys():
            assert name not in reached(target), f"a circle: {' -> '.join([name, *reached(target)[name]])}"


# --------------------------------------------------------------------------------------------------------- bans


@pytest.mark.parametrize("name", BANS)
def test_a_module_knows_nothing_of_what_is_not_its_business(name: str) -> None:
    """Not even through what it imports."""
    banned, because = BANS[name]
    for target, way in reached(name).items():
        for ban in banned:
            assert not names(target, ban), f"{' -> '.join(way)}: {because}"


def test_nothing_below_the_rules_imports_io_or_a_clock() -> None:
    """Each module that the pool imports, by itself."""
    for name in reached("keypool.core.pool"):
        if name.startswith("keypool"):
            outside = [
                target for target in modules()[name].imports if any(names(target, ban) for ban in OUTSIDE)
            ]
            assert not outside, f"{name} imports {outside}"


def test_only_start_up_and_documentation_import_the_settings() -> None:
    """Whoever else needs a setting is given its value."""
    readers = {module.name for module in modules().values() if "keypool.config.settings" in module.imports}
    # The dashboard shows the settings themselves.
    assert readers <= {
        "keypool.server.app",
        "keypool.server.backup_command",
        "keypool.web.dashboard",
        "keypool.server.launch",
        "keypool.api.reference",
        "keypool.server.serving",
    }


def test_only_the_timers_and_their_engine_name_tornados_loop() -> None:
    """One place sets the timers of deadlines and cancels them; the service manager's watchdog has one of its own."""
    users = {
        module.name
        for module in modules().values()
        if any(names(target, "tornado.ioloop") for target in module.imports)
    }
    assert users <= {"keypool.engine.timers", "keypool.engine.steps", "keypool.server.sd_notify"}


def test_only_the_data_file_and_its_writer_speak_to_sqlite() -> None:
    """Its schema and rules stand in one place."""
    users = {
        module.name
        for module in modules().values()
        if any(names(target, "sqlite3") for target in module.imports)
    }
    assert users <= {
        f"keypool.engine.durable.{name}" for name in ("compaction", "copying", "datafile", "writer")
    }


# ----------------------------------------------------------------------------------------------- the test's own


def test_this_reads_imports_as_python_does() -> None:
    """In functions too, of submodules by name, and it finds what is there."""
    imports = {name: module.imports for name, module in modules().items()}
    assert "keypool.engine.durable.datafile" in imports["keypool.engine.durable.journal"], (
        "from keypool.engine import datafile"
    )
    assert "uvloop" in imports["keypool.server.runtime"], "an import inside a function"
    assert "keypool.core.index" in modules()["keypool.core.keys"].for_types
    assert "keypool.core.index" not in imports["keypool.core.keys"]
    assert "keypool.core.errors" in reached("keypool.core.pool")
    assert "msgspec" in reached("keypool.core.pool"), "through events"
