"""`keypool run -- COMMAND`: lease a key, run a command with it, and give the key back when the command ends.

What the command's exit status says of the key, by --on-exit, is reported when it is given back. With --extend the
client's keeper extends the lease, in a thread of its own.

The command gets the key and its data in its environment, but no token, and every signal that is sent to keypool,
once. In a terminal's foreground the command shares keypool's process group, to which the terminal sends Ctrl-C.
Elsewhere (cron, a supervisor) the command gets a process group of its own, and signals go to all of it.

If keypool itself is killed by SIGKILL, the key is released at its deadline, and on Linux the command gets a
SIGTERM, since it would go on with a key that others may get.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from keypool.cli.connection import connect
from keypool.cli.output import note
from keypool.cli.signal_forwarding import CaughtSignals, answer_first, in_foreground
from keypool.cli.status import CommandError, Status, command_error
from keypool.client import HeldKey, KeyPoolError, LeaseLost
from keypool.environment import without_secrets
from keypool.misspelled import DATA
from keypool.pdeathsig import end_with_parent

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL for a command that outlives its lease


class _Ended(Exception):
    """How the command ended: its status, or that of `run`, if it wasn't started or was stopped.

    It is an exception because a `with` of a lease that ends without one reports `ok`.
    """

    def __init__(self, status: int, *, by_itself: bool = False) -> None:
        super().__init__(status)
        self.status = status
        self.by_itself = by_itself


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns its exit status, 128 + n after signal n. Raises CommandError if it wasn't started."""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise CommandError("run takes a command: keypool run -- COMMAND ...", Status.USAGE)
    outcomes = _outcomes(args)
    owner = args.owner or f"{os.path.basename(words[0])}@{socket.gethostname()}"[:200]  # noqa: PTH119 - a word
    stop = args.overrun == "stop"
    try:
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(connect(args))
            with answer_first(enabled=args.wait == 0) as signals:
                lease = pool.lease(
                    owner=owner, wait=args.wait, block_seconds=args.block_seconds, extend=args.extend
                )
                key = stack.enter_context(lease)
            for number in signals:
                signal.raise_signal(number)
            environment = data_variables(key.data) | {
                args.env: key.secret,
                "KEYPOOL_LEASE": str(key.lease),
                "KEYPOOL_HANDLE": key.handle or "",
                "KEYPOOL_POOL": key.pool,
            }
            ended = _supervise(words, environment, key, stop=stop)
            if ended.by_itself:
                _report(key, outcomes.get(ended.status), args.retry_after)
            raise ended
    except _Ended:
        return _result(ended, key, stop=stop)
    except KeyPoolError as error:
        raise command_error(error, f"{words[0]} was not run: ") from None


def data_variables(data: Mapping[str, Any]) -> dict[str, str]:
    """A key's data as variables: `{"user": "x"}` is KEYPOOL_DATA_USER=x. Values that aren't strings are JSON."""
    variables = {}
    for name, value in data.items():
        variable = DATA + re.sub(r"[^A-Z0-9_]", "_", name.upper(), flags=re.ASCII)
        if variable in variables:
            note(f"two of the key's data would be {variable}: the later one is")
        variables[variable] = value if isinstance(value, str) else json.dumps(value)
    return variables


def _inherited() -> dict[str, str]:
    """This process's variables, without secrets, and without the data of a key that it may have from another `run`."""
    return {name: value for name, value in without_secrets(os.environ).items() if not name.startswith(DATA)}


def _outcomes(args: argparse.Namespace) -> dict[int, str]:
    """The outcomes by status. Raises CommandError if the flags don't fit together."""
    outcomes: dict[int, str] = {}
    for status, outcome in args.on_exit:
        if outcomes.setdefault(status, outcome) != outcome:
            raise CommandError(
                f"--on-exit {status} is {outcomes[status]} or {outcome}, not both", Status.USAGE
            )
    if args.retry_after is not None and "rate_limited" not in outcomes.values():
        raise CommandError("--retry-after goes with --on-exit STATUS=rate_limited only", Status.USAGE)
    return {0: "ok"} | outcomes


def _report(key: HeldKey, outcome: str | None, retry_after: float | None) -> None:
    if outcome == "ok":
        key.ok()
    elif outcome == "rate_limited":
        key.rate_limited(retry_after)
    elif outcome == "error":
        key.error()
    elif outcome == "invalid":
        key.invalid()


def _result(ended: _Ended, key: HeldKey, *, stop: bool) -> int:
    """The exit status, after the key was given back."""
    if key.unblocked is not None and key.unblocked.guarded:
        note(f"key {key.hint} cools, and isn't quarantined: too many keys of the pool are")
    # If the key could be given back under this lease, nobody else has held it yet, though its lease may have ended
    # early: by the command itself perhaps, which may report an outcome under KEYPOOL_HANDLE.
    if ended.by_itself and key.unblocked is None:
        for lost in getattr(ended, "__notes__", ()):
            note(lost.removeprefix("besides: "))
            return Status.RUN_LEASE_OVER if stop else ended.status
    return ended.status


def _supervise(words: Sequence[str], environment: dict[str, str], key: HeldKey, *, stop: bool) -> _Ended:
    foreground = in_foreground()
    with CaughtSignals(foreground=foreground) as signals:
        die_with_parent = end_with_parent(os.getpid(), signal.SIGTERM)

        def prepare_child() -> None:
            signals.restore()
            die_with_parent()

        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                words,
                env=_inherited() | environment,
                process_group=None if foreground else 0,
                preexec_fn=prepare_child,  # noqa: PLW1509 - takes no lock that the keeper's thread may hold
            )
        except ValueError:  # of the command's words, none has one
            raise CommandError(
                "the key or its data have a NUL character, which no variable can hold", Status.FAILED
            ) from None
        except OSError as error:
            note(f"{words[0]} can't be run: {error.strerror or error}")
            missing = isinstance(error, FileNotFoundError)
            return _Ended(Status.RUN_NOT_FOUND if missing else Status.RUN_NOT_EXECUTABLE)
        send = functools.partial(_send, process, group=not foreground)
        overrun = _Overrun(key, words[0], send, stop=stop)
        while process.poll() is None:
            if number := signals.wait(overrun.act()):
                send(number)
    if overrun.stopping:
        return _Ended(Status.RUN_LEASE_OVER)
    status = process.returncode
    return _Ended(status if status >= 0 else 128 - status, by_itself=True)


def _send(process: subprocess.Popen[bytes], number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


class _Overrun:
    """What happens when the lease ends before the command: a note, and if `stop`, SIGTERM and then SIGKILL."""

    def __init__(self, key: HeldKey, name: str, send: Callable[[int], None], *, stop: bool) -> None:
        self.stopping = False
        self._key, self._name, self._send, self._stop = key, name, send, stop
        self._steps = self._next_steps()

    def act(self) -> float | None:
        """Do what is due. Returns the seconds until the next step, None if there is no further step."""
        return next(self._steps, None)

    def _next_steps(self) -> Iterator[float]:
        noted = False
        while (remaining := self._key.remaining) > 0:
            if not noted and self._key.not_extended is not None:
                noted = True
                note(f"the lease ends in {remaining:.0f} s: {self._key.not_extended}")
            yield remaining
        does = "it is stopped" if self._stop else "it goes on, with a key that others may hold"
        note(f"{self._why()}, and {self._name} still runs: {does}")
        if self._stop:
            self.stopping = True
            self._send(signal.SIGTERM)
            kill_at = time.monotonic() + _GRACE
            while (remaining := kill_at - time.monotonic()) > 0:
                yield remaining
            self._send(signal.SIGKILL)

    def _why(self) -> str:
        try:
            self._key.check()
        except LeaseLost as error:
            return str(error)
        return "the lease is over"
