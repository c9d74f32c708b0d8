"""`keypool run -- COMMAND`: lease a key, run a command with it, and give the key back when the command ends.

The command gets the key in its environment, and every signal that is sent to keypool, once. In a terminal's
foreground the command shares keypool's process group, to which the terminal sends Ctrl-C. Elsewhere (cron, a
supervisor) the command gets a process group of its own, and signals go to all of it.

If keypool itself is killed by SIGKILL, the key is released at its deadline, and on Linux the command gets a
SIGTERM, since it would go on with a key that others may get.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

from keypool.cli.connection import connect
from keypool.cli.output import note
from keypool.cli.signal_forwarding import CaughtSignals, answer_first, in_foreground
from keypool.cli.status import CommandError, Status, command_error
from keypool.client import HeldKey, KeyPoolError, LeaseLost
from keypool.pdeathsig import end_with_parent

_GRACE = 5.0  # seconds between SIGTERM and SIGKILL for a command that outlives its lease


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns its exit status, 128 + n after signal n. Raises CommandError if it wasn't started."""
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    if not words:
        raise CommandError("run takes a command: keypool run -- COMMAND ...", Status.USAGE)
    owner = args.owner or f"{os.path.basename(words[0])}@{socket.gethostname()}"[:200]  # noqa: PTH119 - a word
    ended: list[int] = []
    stop = args.overrun == "stop"
    try:
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(connect(args))
            with answer_first(enabled=args.wait == 0) as signals:
                key = stack.enter_context(pool.lease(owner=owner, wait=args.wait))
            for number in signals:
                signal.raise_signal(number)
            environment = {args.env: key.secret, "KEYPOOL_LEASE": str(key.lease)}
            ended.append(_supervise(words, environment, key, stop=stop))
    except LeaseLost as error:
        if ended[0] != Status.RUN_LEASE_OVER:
            note(str(error))
        return Status.RUN_LEASE_OVER if stop else ended[0]
    except KeyPoolError as error:
        raise command_error(error, f"{words[0]} was not run: ") from None
    return ended[0]


def _supervise(words: Sequence[str], environment: dict[str, str], key: HeldKey, *, stop: bool) -> int:
    foreground = in_foreground()
    with CaughtSignals(foreground=foreground) as signals:
        die_with_parent = end_with_parent(os.getpid(), signal.SIGTERM)

        def prepare_child() -> None:
            signals.restore()
            die_with_parent()

        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                words,
                env=os.environ | environment,
                process_group=None if foreground else 0,
                preexec_fn=prepare_child,  # noqa: PLW1509 - there is one thread
            )
        except OSError as error:
            note(f"{words[0]} can't be run: {error.strerror or error}")
            missing = isinstance(error, FileNotFoundError)
            return Status.RUN_NOT_FOUND if missing else Status.RUN_NOT_EXECUTABLE
        send = functools.partial(_send, process, group=not foreground)
        overrun = _Overrun(key, words[0], send, stop=stop)
        while process.poll() is None:
            if number := signals.wait(overrun.act()):
                send(number)
    if overrun.stopping:
        return Status.RUN_LEASE_OVER
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


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
        while (remaining := self._key.remaining) > 0:
            yield remaining
        does = "it is stopped" if self._stop else "it goes on, with a key that others may hold"
        note(f"the lease is over after {self._key.release_in:.0f} s and {self._name} still runs: {does}")
        if self._stop:
            self.stopping = True
            self._send(signal.SIGTERM)
            kill_at = time.monotonic() + _GRACE
            while (remaining := kill_at - time.monotonic()) > 0:
                yield remaining
            self._send(signal.SIGKILL)
