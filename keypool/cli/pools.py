"""The commands about pools as such, `pools`, and about the encryption of all of them, `rekey`.

`pools apply FILE` makes the server's pools as a TOML file says:

    [pools.openai]
    block_seconds = 120
    keepalive_seconds = "never"

    pace = { count = 5, seconds = 60 }

A setting that is not in the file has its default. The whole file is checked before anything is changed.
"""

from __future__ import annotations

import argparse
import difflib
import time
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from keypool.cli.connection import connect
from keypool.cli.input import in_words, read_input
from keypool.cli.keys import members_of, output_of
from keypool.cli.output import Output, Progress, note
from keypool.cli.status import CommandError, Status, command_error
from keypool.client import KeyPool, PoolInfo, Refused, UnknownPool
from keypool.client.pool_settings import (
    OF_DEFAULT,
    OF_SERVER,
    POOL_SETTINGS,
    PoolValue,
    contradiction,
    with_defaults,
    wrong_setting,
)
from keypool.client.settings import DEFAULT_POOL, pool_name

COLUMNS = ("name", "total", "available", "blocked", "cooling", "quarantined", "waiting", "draining")
_FLAGS_OF = {"apply": ("dry_run", "delete"), "delete": ("drain", "now")}
_NEVER = "never"  # in TOML, which has no null
_POLL_SECONDS = 1.0

Settings = dict[str, PoolValue]


def pools(args: argparse.Namespace) -> Status:
    """List pools, show one, make the server's pools as a file says, or delete one."""
    for action, flags in _FLAGS_OF.items():
        for flag in flags:
            if getattr(args, flag) and args.action != action:
                raise CommandError(f"--{flag.replace('_', '-')} goes with pools {action} only", Status.USAGE)
    if (args.what is None) != (args.action == "list"):
        takes = {"list": "nothing", "apply": "a file"}.get(args.action, "the name of a pool")
        raise CommandError(f"pools {args.action} takes {takes} after it", Status.USAGE)
    act = {"list": _list, "show": _show, "apply": _apply, "delete": _delete}[args.action]
    return act(args)


def _list(args: argparse.Namespace) -> Status:
    with connect(args) as pool:
        output_of(args).rows(COLUMNS, map(members_of, pool.pools()))
    return Status.OK


def _show(args: argparse.Namespace) -> Status:
    with connect(args) as pool:
        row = members_of(pool.get_pool(args.what))
    if not args.json:
        row |= {name: _shown(value) for name, value in row.pop("settings").items()}
    output_of(args).fields(row)
    return Status.OK


def _delete(args: argparse.Namespace) -> Status:
    if args.now and not args.drain:
        raise CommandError("--now goes with --drain", Status.USAGE)
    with connect(args) as pool:
        left = pool.delete_pool(args.what, drain=args.drain, now=args.now)
    _say(output_of(args), args.what, *_how_deleted(left))
    return Status.OK


def _how_deleted(left: PoolInfo | None) -> tuple[str, str]:
    if left is None:
        return "deleted", ""
    return "draining", f"{left.total} keys left, {left.blocked} of them held"


# -- apply


class Change(NamedTuple):
    """What apply does with a pool: "create", "change", "delete" or "keep", with the settings of the file.

    `changes` are the settings that differ, each with its value before and after.
    """

    pool: str
    does: str
    settings: Settings
    changes: dict[str, tuple[PoolValue, PoolValue]]


def _apply(args: argparse.Namespace) -> Status:
    wanted = read_file(read_input(args.what), in_words(args.what))
    output = output_of(args)
    with connect(args) as pool:
        there = {info.name: info for info in pool.pools()}
        changes = planned(wanted, there, in_words(args.what))
        for change in changes:
            _do(args, pool, output, change)
    if all(change.does == "keep" for change in changes):
        note(f"the server's pools are as {in_words(args.what)} has them")
    return Status.OK


def _do(args: argparse.Namespace, pool: KeyPool, output: Output, change: Change) -> None:
    """Make one change and print it, a line for each pool that is not as it was, or not in the file."""
    name, dry = change.pool, args.dry_run
    details = ", ".join(f"{each} {_shown(a)} -> {_shown(b)}" for each, (a, b) in change.changes.items())
    try:
        if change.does in ("create", "change"):
            if not dry:
                pool.put_pool(name, **change.settings)
            _say(output, name, f"would be {change.does}d" if dry else f"{change.does}d", details)
        elif change.does == "delete" and args.delete:
            done = ("would be deleted", "") if dry else _how_deleted(pool.delete_pool(name, drain=True))
            _say(output, name, *done)
        elif change.does == "delete":
            _say(output, name, "not in the file", "left as it is; --delete deletes it")
    except UnknownPool:
        if change.does != "delete":
            raise
        _say(output, name, "deleted", "")
    except Refused as error:
        raise command_error(error, f"{in_words(args.what)}: [pools.{name}]: ") from None


def _say(output: Output, pool: str, did: str, details: str) -> None:
    if output.as_json:
        output.fields({"pool": pool, "did": did, "details": details})
    else:
        print(f"{pool}: {did}{': ' * bool(details)}{details}", flush=True)


def _shown(value: object) -> object:
    if value is None:
        return _NEVER
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(each)}" for name, each in value.items())
    return f"{value:.15g}" if isinstance(value, float) else value


def read_file(text: str, file: str) -> dict[str, Settings]:
    """The pools of a file with the settings that it gives them. Raises CommandError, which names the place."""
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CommandError(f"{file} is no TOML: {error}", Status.USAGE) from None
    for name in found:
        if name != "pools":
            raise _wrong(file, f"{name} is not known: it takes [pools.NAME]{_perhaps(name, ['pools'])}")
    tables = found.get("pools", {})
    if not isinstance(tables, dict):
        raise _wrong(file, "pools takes tables: [pools.NAME]")
    return {name: _settings(file, name, table) for name, table in tables.items()}


def _settings(file: str, name: str, table: object) -> Settings:
    place = f"[pools.{name}]"
    try:
        pool_name(name)
    except ValueError as error:
        raise _wrong(file, f"{place}: {error}") from None
    if not isinstance(table, dict):
        raise _wrong(file, f"{place}: it takes a table of settings, not {table!r}")
    settings: Settings = {}
    for key, value in table.items():
        if key not in POOL_SETTINGS:
            raise _wrong(file, f"{place}: {key} is not a setting of a pool{_perhaps(key, POOL_SETTINGS)}")
        null = POOL_SETTINGS[key].null
        settings[key] = None if null and value == _NEVER else value
        if (takes := wrong_setting(key, settings[key])) is not None:
            takes += f', or "{_NEVER}"' if null else ""
            raise _wrong(file, f"{place}: {key} takes {takes}, not {value!r}")
        settings[key] = with_defaults(key, settings[key])
    if (problem := contradiction(settings)) is not None:
        raise _wrong(file, f"{place}: {problem}")
    return settings


def _perhaps(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _wrong(file: str, problem: str) -> CommandError:
    return CommandError(f"{file}: {problem}", Status.USAGE)


def planned(wanted: Mapping[str, Settings], there: Mapping[str, PoolInfo], file: str) -> list[Change]:
    """What has to be done, in order of name. Raises CommandError for what can't be."""
    of_server = there[DEFAULT_POOL].settings if DEFAULT_POOL in there else {}
    changes = []
    for name in sorted({*wanted, *there}):
        info = there.get(name)
        if name not in wanted:
            if name != DEFAULT_POOL and info is not None and not info.draining:
                changes.append(Change(name, "delete", {}, {}))
            continue
        if info is None:
            changes.append(Change(name, "create", wanted[name], {}))
            continue
        if info.draining:
            raise CommandError(
                f"{file}: [pools.{name}]: this pool is being deleted; apply the file when it is gone",
                Status.FAILED,
            )
        differ = _differences(wanted[name], info.settings, of_server, whole=name != DEFAULT_POOL)
        settings = wanted[name]
        if name == DEFAULT_POOL:
            if fixed := [each for each in differ if each not in OF_DEFAULT]:
                raise _wrong(
                    file, f"[pools.{name}]: the server's flags decide {', '.join(fixed)} of this pool"
                )
            settings = {each: settings[each] for each in OF_DEFAULT if each in settings}
        changes.append(Change(name, "change" if differ else "keep", settings, differ))
    return changes


def _differences(
    wanted: Settings, now: Mapping[str, Any], of_server: Mapping[str, Any], *, whole: bool
) -> dict[str, tuple[PoolValue, PoolValue]]:
    """The settings that differ, before and after. With `whole`, those that aren't wanted have their defaults.

    Otherwise that is so of those only that aren't flags.
    """
    after: dict[str, Any] = {name: default for name, default in OF_DEFAULT.items() if name in now} | wanted
    if whole:
        defaults = {name: setting.default for name, setting in POOL_SETTINGS.items()}
        defaults |= {name: of_server.get(name, defaults[name]) for name in OF_SERVER}
        after = {**defaults, **wanted}
        if after["max_block_seconds"] is None:
            after["max_block_seconds"] = after["block_seconds"]
    return {
        name: (now[name], after[name])
        for name in POOL_SETTINGS
        if name in after and now.get(name) != after[name]
    }


# -- rekey


def rekey(args: argparse.Namespace) -> Status:
    """Begin to encrypt what isn't yet under the first secrets key, and with --wait, wait for its end."""
    with connect(args) as pool:
        progress = pool.rekey()
        if args.wait:
            with Progress("encrypting", progress.total) as bar:
                while progress.state == "running":
                    bar(progress.done)
                    time.sleep(_POLL_SECONDS)
                    progress = pool.rekeying()
    output_of(args).fields(members_of(progress))
    if progress.state == "failed":
        note("it has failed: the server's log says why")
        return Status.FAILED
    return Status.OK
