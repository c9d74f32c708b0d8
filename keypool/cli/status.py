"""The exit statuses of the `keypool` command. They are in `keypool --help` and in docs/client.md."""

from __future__ import annotations

from enum import IntEnum

from keypool.client import (
    AnswerLost,
    Forbidden,
    GatewayError,
    KeyPoolError,
    LeaseLost,
    NoKeyAvailable,
    StaleLease,
    StorageUnavailable,
    Unauthorized,
    UnknownKey,
    Unreachable,
)


class Status(IntEnum):
    """What a script can tell apart."""

    OK = 0, "done"
    FAILED = 1, "anything not listed here"
    USAGE = 2, "a wrong flag, argument, URL or token"
    NO_KEY = 3, "no key is available"
    UNKNOWN_KEY = 4, "the key, or one of several, is not known: never generated, deleted or expired"
    LEASE_OVER = 5, "the lease is over: the key was not this holder's any more"
    DENIED = 6, "no token, an unknown one, or one of the wrong role"
    UNREACHABLE = 7, "the server could not be asked: nothing has happened"
    UNCERTAIN = 8, "the server was asked and its answer was lost: it may have happened"
    RUN_FAILED = 125, "run: keypool itself failed, and the command was not started"
    RUN_NOT_EXECUTABLE = 126, "run: the command can't be executed"
    RUN_NOT_FOUND = 127, "run: there is no such command"
    INTERRUPTED = 130, "ended by Ctrl-C (128 + n: by signal n)"
    BROKEN_PIPE = 141, "whoever read the output has gone"

    about: str

    def __new__(cls, value: int, about: str) -> Status:
        """A number with its explanation."""
        made = int.__new__(cls, value)
        made._value_ = value
        made.about = about
        return made


_STATUSES: list[tuple[type[KeyPoolError], Status]] = [
    (NoKeyAvailable, Status.NO_KEY),
    (UnknownKey, Status.UNKNOWN_KEY),
    (StaleLease, Status.LEASE_OVER),
    (LeaseLost, Status.LEASE_OVER),
    (Unauthorized, Status.DENIED),
    (Forbidden, Status.DENIED),
    (Unreachable, Status.UNREACHABLE),
    (AnswerLost, Status.UNCERTAIN),
    (GatewayError, Status.UNCERTAIN),
    (StorageUnavailable, Status.UNCERTAIN),
]


def status_of(error: KeyPoolError) -> Status:
    """The exit status that an error ends a command with."""
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), Status.FAILED)


class CommandError(Exception):
    """A command can't go on: one line for the user, and the exit status."""

    def __init__(self, message: str, status: Status) -> None:
        super().__init__(message)
        self.status = status
