"""`keypool run -- COMMAND`: lease a key, run a command with it, give it back however the command ends.

The command gets the key in its environment and every signal that is sent to keypool, once. Ctrl-C is sent by
the terminal, to keypool and command both, so that isn't passed on; what is sent by somebody is. Away from a
terminal (cron, a supervisor) the command gets a process group of its own, and signals go to all of it.

If keypool itself is killed in a way that can't be caught, the key comes free by its deadline, and on Linux
the command gets a SIGTERM, since it goes on without a key.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from keypool.cli.connect import connect
from keypool.cli.forwarding import Foreground, signals_for
from keypool.cli.status import CommandError, Status
from keypool.client import HeldKey, KeyPoolError, LeaseLost
from keypool.pdeathsig import end_with_parent

_GRACE = 5.0  # seconds between asking a command to end and ending it


def run(args: argparse.Namespace) -> int:
    """The command's exit status, 128 + n if signal n ended it; 125 to 127 if it was not run."""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise CommandError("run takes a command: keypool run -- COMMAND ...", Status.USAGE)
    owner = args.owner or f"{os.path.basename(words[0])}@{socket.gethostname()}"[:200]  # noqa: PTH119 - a word
    ended: list[int] = []
    try:
        with connect(args) as pool, pool.lease(owner=owner, wait=args.wait) as key:
            environment = {args.env: key.secret, "KEYPOOL_LEASE": str(key.lease)}
            ended.append(_supervise(words, environment, key, stop=args.overrun == "stop"))
    except LeaseLost as error:
        _note(str(error))
    except KeyPoolError as error:
        _note(f"{words[0]} was not run: {error}")
        return Status.RUN_FAILED
    return ended[0]


def _supervise(words: Sequence[str], environment: dict[str, str], key: HeldKey, *, stop: bool) -> int:
    foreground = Foreground.here()
    with signals_for(foreground) as signals:
        try:
            process = subprocess.Popen(  # noqa: S603 - running it is what was asked for
                words,
                env=os.environ | environment,
                process_group=None if foreground.is_ours else 0,
                preexec_fn=_prepared(signals.restore),  # noqa: PLW1509 - there is one thread
            )
        except OSError as error:
            return _not_started(words[0], error)
        target = functools.partial(_send, process, group=not foreground.is_ours)
        overrun = _Overrun(key, target, stop=stop)
        while process.poll() is None:
            number = signals.wait(overrun.look())
            if number is not None:
                target(number)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _prepared(restore: Callable[[], None]) -> Callable[[], None] | None:
    """What the child does before it becomes the command."""
    if os.name != "posix":
        return None
    follow = end_with_parent(os.getpid(), signal.SIGTERM)

    def prepare() -> None:
        restore()
        follow()

    return prepare


def _not_started(word: str, error: OSError) -> int:
    found = not isinstance(error, FileNotFoundError)
    _note(f"{word} can't be run: {error.strerror or error}")
    return Status.RUN_NOT_EXECUTABLE if found else Status.RUN_NOT_FOUND


def _send(process: subprocess.Popen[bytes], number: int, *, group: bool) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)


class _Overrun:
    """What happens when the lease ends before the command does. Blocks can't be lengthened."""

    def __init__(self, key: HeldKey, send: Callable[[int], None], *, stop: bool) -> None:
        self._key = key
        self._send = send
        self._stop = stop
        self._told = False
        self._kill_at: float | None = None

    def look(self) -> float | None:
        """Act if it is time to; the seconds until the next look, None for no need."""
        if self._key.remaining > 0:
            return self._key.remaining
        if not self._told:
            self._told = True
            does = "it is ended" if self._stop else "it goes on with a key that others may hold"
            _note(f"the lease is over after {self._key.release_in:.0f} s and the command isn't: {does}")
            if self._stop:
                self._send(signal.SIGTERM)
                self._kill_at = time.monotonic() + _GRACE
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self._send(signal.SIGKILL)
            self._kill_at = None
        return None if self._kill_at is None else self._kill_at - time.monotonic()


def _note(text: str) -> None:
    print(f"keypool: {text}", file=sys.stderr)
