"""The exit statuses of the `keypool` command. `keypool --help` and docs/client.md list them."""

from __future__ import annotations

from enum import IntEnum

from keypool.client import errors
from keypool.client.errors import KeyPoolError, Refused


class Status(IntEnum):
    """An exit status, with the line that help and docs show for it."""

    OK = 0, "success"
    FAILED = 1, "any other failure"
    USAGE = 2, "wrong flag, argument, URL or token file"
    NO_KEY = 3, "no key is available"
    UNKNOWN_KEY = 4, "a key is unknown: never generated, deleted or expired; or the pool is unknown"
    LEASE_OVER = 5, "the lease had ended: the key may be held by somebody else"
    DENIED = 6, "no token, an unknown token, or a token without the role for this call"
    UNREACHABLE = 7, "the server can't be reached; nothing has changed"
    UNCERTAIN = 8, "the answer was lost: the call may have taken effect"
    BLOCK_LIMIT = 9, "the lease can't be extended: it would not end later"
    RUN_UNCERTAIN = 120, "run: the answer was lost and the command not started; a key may stay blocked"
    RUN_UNREACHABLE = 121, "run: the server can't be reached; the command was not started"
    RUN_DENIED = 122, "run: the token is missing or refused; the command was not started"
    RUN_NO_KEY = 123, "run: no key is available; the command was not started"
    RUN_LEASE_OVER = (
        124,
        "run: the lease ended first: the command was stopped, or others may have used its key",
    )
    RUN_FAILED = 125, "run: wrong usage, or any other failure of keypool; the command was not started"
    RUN_NOT_EXECUTABLE = 126, "run: the command can't be executed"
    RUN_NOT_FOUND = 127, "run: the command was not found"
    INTERRUPTED = 130, "ended by Ctrl-C (128 + n: by signal n)"
    BROKEN_PIPE = 141, "the reader of the output closed the pipe"

    about: str

    def __new__(cls, value: int, about: str) -> Status:
        """An int that carries its explanation."""
        made = int.__new__(cls, value)
        made._value_ = value
        made.about = about
        return made


_ERRORS: dict[Status, tuple[type[KeyPoolError], ...]] = {
    Status.NO_KEY: (errors.NoKeyAvailable, errors.ShareSpent),
    Status.UNKNOWN_KEY: (errors.UnknownKey, errors.UnknownPool),
    Status.LEASE_OVER: (errors.StaleLease, errors.LeaseOver, errors.LeaseLost),
    Status.BLOCK_LIMIT: (errors.BlockLimit,),
    Status.DENIED: (errors.Unauthorized, errors.Forbidden),
    Status.UNREACHABLE: (errors.Unreachable,),
    Status.UNCERTAIN: (errors.AnswerLost, errors.GatewayError, errors.StorageUnavailable),
}

_OF_RUN = {
    Status.NO_KEY: Status.RUN_NO_KEY,
    Status.DENIED: Status.RUN_DENIED,
    Status.UNREACHABLE: Status.RUN_UNREACHABLE,
    Status.UNCERTAIN: Status.RUN_UNCERTAIN,
}

TRANSIENT = (errors.Unreachable, errors.AnswerLost, errors.GatewayError, errors.Unavailable)
"""Errors that may be temporary: long-running commands retry after them."""


class CommandError(Exception):
    """Ends a command with one line for the user and an exit status."""

    def __init__(self, message: str, status: Status) -> None:
        super().__init__(message)
        self.status = status


def command_error(error: KeyPoolError, prefix: str = "") -> CommandError:
    """The message and the exit status for an error of the client."""
    status = next((status for status, kinds in _ERRORS.items() if isinstance(error, kinds)), Status.FAILED)
    if isinstance(error, Refused):
        return CommandError(f"{prefix}{error.detail} ({error.code})", status)
    suffix = "; the call may have taken effect" if error.may_have_happened else ""
    return CommandError(f"{prefix}{error}{suffix}", status)


def status_of_run(status: Status) -> Status:
    """The status for a failure of `run` itself, since low numbers are its command's statuses."""
    return _OF_RUN.get(status, Status.RUN_FAILED)
