"""Logs: text for people, JSON lines for machines, on standard error.

No key and no token is ever logged: callers log ids and hints. Tornado's own notes about malformed requests
are left out, since they quote what was sent.
"""

from __future__ import annotations

import logging
import sys

import msgspec

from keypool.keys import moment


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO keypool: what happened`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        """The moment, as everywhere in keypool."""
        return _moment(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. What a record has as `extra={"audit": …}` stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line = {
            "at": _moment(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        audit = getattr(record, "audit", None)
        if audit is not None:
            line |= audit
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure(level: str, format: str) -> None:
    """Send everything to standard error in one of the two formats."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("tornado.general").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.captureWarnings(True)


def _moment(record: logging.LogRecord) -> str:
    return moment(record.created)
