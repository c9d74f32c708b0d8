"""The types of value that settings take: how each is written, what it allows, how a wrong value is refused.

A type has two ways in, because the sources differ: `spelled` takes the text of a flag or a variable, `typed`
a value that has a type already, from TOML or from code. Both return the value as a setting keeps it. `takes`
describes the allowed values for error messages, `--help` and the docs alike.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from keypool.config.proxies import TrustedProxies
from keypool.core.errors import SettingsError
from keypool.engine.valkey.url import TAKES, parse, without_password

Given = TypeVar("Given")

ONE_DAY = 86_400.0
ONE_YEAR = 366 * ONE_DAY


class Text:
    """Any text that is not empty. Subclasses narrow it in `_parse` and `_check`, which raise ValueError."""

    def __init__(self, takes: str) -> None:
        self.takes = takes

    def spelled(self, source: str, text: str) -> object:
        """The value that a text stands for. Raises SettingsError, which names the setting as `source`."""
        return self._read(self._parse, source, text)

    def typed(self, source: str, value: object) -> object:
        """The value, checked, of one that has a type already. Raises SettingsError."""
        return self._read(self._check, source, value)

    def _read(self, read: Callable[[Given], object], source: str, given: Given) -> object:
        try:
            return read(given)
        except ValueError:
            raise SettingsError(f"{source} takes {self.takes}, not {self._shown(given)}") from None

    def _parse(self, text: str) -> object:
        return self._check(text)

    def _check(self, value: object) -> object:
        if isinstance(value, str) and value:
            return value
        raise ValueError(value)

    def _shown(self, given: object) -> str:
        return shown(given)


class Choice(Text):
    """One of a few words, case-sensitive."""

    def __init__(self, *words: str) -> None:
        *others, last = words
        super().__init__(f"{', '.join(others)} or {last}" if others else last)
        self.words = words

    def _check(self, value: object) -> object:
        if value in self.words:
            return value
        raise ValueError(value)


class DataFile(Text):
    """The path of a data file, which need not exist yet. It has to be printable, for log lines."""

    def _check(self, value: object) -> object:
        if isinstance(value, str) and value and value.isprintable():
            return value
        raise ValueError(value)


class EngineName(Text):
    """The embedded engine, or the URL of a Valkey. A URL that is refused is shown without its password."""

    def __init__(self) -> None:
        super().__init__(TAKES)

    def _check(self, value: object) -> object:
        text = super()._check(value)
        if text != "embedded":
            parse(str(text))
        return text

    def _shown(self, given: object) -> str:
        return shown(without_password(given) if isinstance(given, str) else given)


class Whole(Text):
    """A whole number in decimal, both bounds included. Neither a bool nor a float is one, not even 8888.0."""

    def __init__(self, low: int, high: int) -> None:
        super().__init__(f"a whole number from {low} to {high}")
        self.low, self.high = low, high

    def _parse(self, text: str) -> object:
        return self._check(int(_plain(text)))

    def _check(self, value: object) -> object:
        if type(value) is int and self.low <= value <= self.high:
            return value
        raise ValueError(value)


class Seconds(Text):
    """A length of time in seconds, kept as a float, both bounds included.

    The default upper bound is a day: a longer time is most often meant as milliseconds.
    """

    def __init__(self, low: float = 0.001, high: float = ONE_DAY) -> None:
        super().__init__(f"a number of seconds from {low:.15g} to {high:.15g}, fractions allowed")
        self.low, self.high = low, high

    def _parse(self, text: str) -> object:
        return self._check(float(_plain(text)))

    def _check(self, value: object) -> object:
        # A bool is an int to isinstance; nan is within no bounds.
        if isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
            return float(value)
        raise ValueError(value)


class Percent(Text):
    """A percentage, kept as a float, both bounds included."""

    low, high = 0.0, 100.0

    def __init__(self) -> None:
        super().__init__("a number from 0 to 100, fractions allowed")

    def _parse(self, text: str) -> object:
        return self._check(float(_plain(text)))

    def _check(self, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high:
            return float(value)
        raise ValueError(value)


class Address(Text):
    """An IP address without brackets, or a host name, to listen on. It isn't resolved here."""

    # The last label is never all digits, so that 300.0.0.1 and 127.1 are refused as the typing errors they are.
    _label = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    _host_name = re.compile(rf"(?=.{{1,253}}\Z)(?:{_label}\.)*(?![0-9]+\Z){_label}")

    def __init__(self) -> None:
        super().__init__("an IP address or a host name, without a port")

    def _check(self, value: object) -> object:
        text = str(super()._check(value))
        if not self._host_name.fullmatch(text):
            ipaddress.ip_address(text)
        return text


class Proxies(Text):
    """Addresses and networks of proxies, or `none`, which overrides what a file or a variable has."""

    def __init__(self) -> None:
        super().__init__("addresses or networks (10.0.0.0/8, fd00::/8), separated by commas, or none")

    def _check(self, value: object) -> object:
        text = str(super()._check(value))
        if text != "none":
            TrustedProxies(text)
        return text


class File(Text):
    """The path of a text file that is read whole."""

    def __init__(self, content: str) -> None:
        super().__init__(f"the path of {content}")

    def read(self, source: str, path: str) -> str:
        """The file's text. Blocks. Raises SettingsError if it can't be read or isn't UTF-8."""
        try:
            return Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise self.refused(source, path, "is not text in UTF-8") from None
        except OSError as error:
            raise self.refused(source, path, f"cannot be read: {error.strerror or error}") from None
        except ValueError:
            # A NUL or half a surrogate pair.
            raise self.refused(source, path, "cannot be the name of a file") from None

    def refused(self, source: str, path: str, why: str) -> SettingsError:
        """The error for this file; line breaks in `why` become spaces."""
        return SettingsError(f"{source} takes {self.takes}, but {shown_path(path)} {' '.join(why.split())}")


def shown(given: object) -> str:
    """A given value on one line and not too long; text in quotes, so that a TOML string can be seen as one."""
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, dict | list):
        return "a table" if isinstance(given, dict) else "an array"
    if isinstance(given, int) and abs(given) > 10**50:
        # Python refuses to print a number of thousands of digits, which hexadecimal TOML may hold.
        return "a number that large"
    text = repr(given) if isinstance(given, str) else str(given)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_path(path: str) -> str:
    """The path of a file on one line, in quotes only if it has characters that don't print."""
    return path if path.isprintable() else repr(path)


def _plain(text: str) -> str:
    # int() and float() also take the digits of every script, and blanks around them. Neither is ever meant.
    if text.isascii() and text == text.strip():
        return text
    raise ValueError(text)
