"""Logs on standard error: text for people or JSON lines for machines, written by a thread (log_writer.py).

No key and no token is ever logged: callers log ids and hints. Tornado's messages about malformed requests are
left out, since they quote the request.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import msgspec

from keypool.core.keys import hint, moment
from keypool.ops.log_writer import LogWriter

access_log = logging.getLogger("keypool.access")

_process: int | None = None  # the number of this worker

_LONG = re.compile(r"[A-Za-z0-9]{16,}")  # as keys are


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """The traceback, with a hint in place of everything that may be a key: a KeyError, say, quotes its key."""
        lines = super().formatException(ei).split("\n")
        # Indented lines are source code.
        return "\n".join(line if line[:1] == " " else _LONG.sub(_hinted, line) for line in lines)


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.000Z INFO keypool: what happened`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, with the number of the worker before the message."""
        if _process is not None:
            record.message = f"process={_process} {record.message}"
        return super().formatMessage(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """RFC 3339, as everywhere in keypool."""
        return _moment(record)


class JsonFormatter(_Formatter):
    """One JSON object a line, with the members of the record's `extra={"audit": …}` or "fields" beside the message."""

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
    """Formats a record in the calling thread and queues the line. Also formats the writer's notices."""

    def __init__(self, writer: LogWriter, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = writer
        writer.notice = lambda count: self._line(
            _record(logging.WARNING, "%d lines of the log were dropped: they were not read in time", count)
        )

    def emit(self, record: logging.LogRecord) -> None:
        """Never blocks. For a record that can't be formatted, an error is logged instead."""
        try:
            line = self._line(record)
        except Exception as error:
            kind = type(error).__name__
            line = self._line(
                _record(logging.ERROR, "a record of %s can't be formatted: %s", record.name, kind)
            )
        self._writer.put(line)

    def flush(self) -> None:
        """Wait until all lines are written, at most a second."""
        self._writer.flush()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode(errors="backslashreplace")


STDERR = LogWriter(2, lambda count: b"keypool: %d lines were dropped\n" % count)
"""The process's writer to standard error."""


def configure(level: str, format: str) -> None:
    """Send all logs to standard error in one of the two formats."""
    handler = QueueingHandler(STDERR, JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("tornado.general").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    # At any level: the audit log, and the line with the server's URL.
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
    """Put this worker's number, from 1, into all its lines."""
    global _process  # noqa: PLW0603 - set once, after the fork
    _process = number


def _record(level: int, message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("keypool", level, __file__, 0, message, args, None)


def _hinted(found: re.Match[str]) -> str:
    return hint(found.group())


def _moment(record: logging.LogRecord) -> str:
    return moment(record.created)
