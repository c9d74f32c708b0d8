"""Logs: text for people, JSON lines for machines, on standard error, by a thread of their own (log_writer.py).

No key and no token is ever logged: callers log ids and hints. Tornado's own notes about malformed requests
are left out, since they quote what was sent.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import msgspec

from keypool.core.keys import hint, moment
from keypool.ops.log_writer import LogWriter

access_log = logging.getLogger("keypool.access")

_process: int | None = None  # which of several this one is

_LONG = re.compile(r"[A-Za-z0-9]{16,}")  # as keys are


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The trace, in which what may be a key is a hint: a KeyError, say, quotes what was looked for."""
        lines = super().formatException(ei).split("\n")
        # Frames, which are indented, hold our own words.
        return "\n".join(line if line[:1] == " " else _LONG.sub(_hinted, line) for line in lines)


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.000Z INFO keypool: what happened`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, with the number of the process before the message if there are several."""
        if _process is not None:
            record.message = f"process={_process} {record.message}"
        return super().formatMessage(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """The moment, as everywhere in keypool."""
        return _moment(record)


class JsonFormatter(_Formatter):
    """One JSON object a line. What a record has as `extra={"audit": …}` or "fields" stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, Any] = {
            "at": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if _process is not None:
            line["process"] = _process
        for name in ("audit", "fields"):
            line |= getattr(record, name, {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


class QueueingHandler(logging.Handler):
    """Formats a record where it is logged and leaves the line to a LogWriter, whose notices it words."""

    def __init__(self, writer: LogWriter, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = writer
        writer.notice = lambda count: self._line(
            _record(logging.WARNING, "%d lines of the log were dropped: they were not read in time", count)
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Never blocks. A record that can't be formatted becomes a line that says so."""
        try:
            line = self._line(record)
        except Exception as error:
            kind = type(error).__name__
            line = self._line(
                _record(logging.ERROR, "a record of %s can't be formatted: %s", record.name, kind)
            )
        self._writer.put(line)

    def flush(self) -> None:
        """Wait until all is written; for a second at most."""
        self._writer.flush()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")


STDERR = LogWriter(2, lambda count: b"keypool: %d lines were dropped\n" % count)
"""What writes to standard error, for the whole process."""


def configure(level: str, format: str) -> None:
    """Send everything to standard error in one of the two formats."""
    handler = QueueingHandler(STDERR, JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("tornado.general").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # Whatever the level: what was done to the keys, and where the server is to be found.
    for name in ("keypool.audit", "keypool.ready"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)


def access_line(request_id: str, operation: str, status: int, outcome: str, seconds: float) -> None:
    """Log a request that was answered, at level debug; 0.1 µs if that isn't logged.

    The line names the call and never the path, which may hold a key.
    """
    if not access_log.isEnabledFor(logging.DEBUG):
        return
    fields = {
        "request_id": request_id,
        "operation": operation,
        "status": status,
        "outcome": outcome,
        "milliseconds": round(seconds * 1000, 1),
    }
    access_log.debug("%s %s %d %s %.1f ms", *fields.values(), extra={"fields": fields})


def name_process(number: int) -> None:
    """Have every line of this process say which of several it is, from 1."""
    global _process  # noqa: PLW0603 - a process is one, for good
    _process = number


def _record(level: int, message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("keypool", level, __file__, 0, message, args, None)


def _hinted(found: re.Match[str]) -> str:
    return hint(found.group())


def _moment(record: logging.LogRecord) -> str:
    return moment(record.created)
