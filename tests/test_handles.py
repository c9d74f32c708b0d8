"""Handles: the texts that name a lease and hold no secret."""

from __future__ import annotations

import base64
import re
from hashlib import blake2s

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keypool.core.handles import SECRET_BYTES, Handle, Handles

SECRET = bytes(range(SECRET_BYTES))
HANDLES = Handles(SECRET)
OTHERS = Handles(SECRET[::-1])
NUMBERS = st.integers(1, 10**19 - 1)
UNHURRIED = settings(deadline=None)
"""An example may take long on a busy machine."""


def test_a_handle_is_a_keyed_digest_of_key_and_lease() -> None:
    """The format stays: clients may hold handles across an upgrade, and other servers of a pool read them."""
    digest = blake2s(b"h:42.17.", digest_size=8, key=SECRET).digest()
    expected = "h:42.17." + base64.urlsafe_b64encode(digest).decode().rstrip("=")
    assert HANDLES.make(42, 17) == expected
    assert len(expected) == len("h:42.17.Vq3xT0aB9cE")


@UNHURRIED
@given(id=NUMBERS, lease=NUMBERS)
def test_a_handle_is_read_as_the_lease_that_it_was_made_of(id: int, lease: int) -> None:
    """Up to the largest numbers, and it needs no quoting in a URL."""
    text = HANDLES.make(id, lease)
    assert HANDLES.read(text) == Handle(id, lease)
    assert re.fullmatch(r"h:[A-Za-z0-9._-]+", text), text


@UNHURRIED
@given(id=NUMBERS, lease=NUMBERS)
def test_a_handle_of_another_pool_is_not_read(id: int, lease: int) -> None:
    """The digits don't fit."""
    assert OTHERS.read(HANDLES.make(id, lease)) is None


@UNHURRIED
@given(
    first=st.tuples(st.integers(1, 999), st.integers(1, 999)),
    second=st.tuples(st.integers(1, 999), st.integers(1, 999)),
)
def test_the_digits_of_a_handle_fit_no_other_lease(first: tuple[int, int], second: tuple[int, int]) -> None:
    """Neither of the same key nor of another one."""
    digits = HANDLES.make(*first).rpartition(".")[2]
    assert (HANDLES.read(f"h:{second[0]}.{second[1]}.{digits}") is not None) == (first == second)


@UNHURRIED
@given(place=st.integers(0, 18), character=st.sampled_from("0aAzZ9_-.:h"))
def test_a_handle_with_one_other_character_is_not_read(place: int, character: str) -> None:
    """Wherever it is."""
    text = HANDLES.make(42, 17)
    changed = text[:place] + character + text[place + 1 :]
    assert (HANDLES.read(changed) is not None) == (changed == text)


WELL = HANDLES.make(42, 17)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "h:",
        WELL[:-1],
        WELL + "A",
        WELL + "\n",
        WELL + "=",
        " " + WELL,
        WELL.upper(),
        WELL.replace("h:", "id:"),
        WELL.replace("42", "042"),
        WELL.replace("42", "+42"),
        WELL.replace("42", "٤٢"),
        WELL.replace("42", "-42"),
        WELL.replace("42", "0"),
        WELL.replace("42", "4" * 20),
        WELL.replace("17", ""),
        WELL * 100,
        "5TRxabcdefghijklVN9w",
    ],
)
def test_what_is_not_a_handle_is_not_read(text: str) -> None:
    """Without an error."""
    assert HANDLES.read(text) is None


@UNHURRIED
@given(text=st.text(max_size=60))
def test_no_text_raises_an_error(text: str) -> None:
    """Whatever a path or a body has."""
    assert HANDLES.read(text) is None
    assert HANDLES.read("h:" + text) is None
