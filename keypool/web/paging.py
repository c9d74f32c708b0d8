"""Links between the pages of a list, which the engine gives in one direction only, by cursors.

A page's URL has the cursor where it begins, `after`, and in `back` those of the pages before it, so that there is a way
back without scripts, too. Only the last ones: a URL has a limit. From the page before them a link leads to the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlencode

FIRST = "first"
"""Stands for the first page among cursors."""
MOST_BACK = 20  # pages; static/js/lists.js has the same


class Links(NamedTuple):
    """The URLs of other pages of a list, None where there is no such page."""

    first: str | None
    previous: str | None
    next: str | None


def url_of(path: str, query: Mapping[str, str]) -> str:
    """A URL with those parameters that aren't empty."""
    asked = {name: value for name, value in query.items() if value}
    return f"{path}?{urlencode(asked)}" if asked else path


def links(path: str, query: Mapping[str, str], after: str | None, back: str, following: str | None) -> Links:
    """The links of the page of a list at `path`, which begins at `after`, and is followed by the one at `following`."""
    behind = [] if after is None else [cursor for cursor in back.split(".") if cursor][-MOST_BACK:]
    previous = None
    if behind:
        *before, cursor = behind
        place = {} if cursor == FIRST else {"after": cursor, "back": ".".join(before)}
        previous = url_of(path, {**query, **place})
    passed = [*behind, after or FIRST][-MOST_BACK:]
    return Links(
        None if after is None else url_of(path, query),
        previous,
        None if following is None else url_of(path, {**query, "after": following, "back": ".".join(passed)}),
    )
