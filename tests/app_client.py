"""A browser for the tests of the application in this process: what pytest-tornado's `http_client` fetches, as pages.

The fixtures `io_loop`, `app`, `http_server` and `base_url` in conftest.py serve the application on the loop of the
test. Of the command line and the environment, `serves(...)` marks a test with those of its application.
"""

from __future__ import annotations

import json as jsonlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import pytest
from support import ADMIN_TOKEN, API, CLIENT_TOKEN, JSON, VIEWER_TOKEN
from tornado.httpclient import AsyncHTTPClient
from tornado.httputil import HTTPHeaders

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def serves(*flags: str, **variables: str) -> pytest.MarkDecorator:
    """Marks a test whose application has these settings."""
    return pytest.mark.serves(*flags, **variables)


guarded = serves(
    KEYPOOL_CLIENT_TOKEN=CLIENT_TOKEN, KEYPOOL_VIEWER_TOKEN=VIEWER_TOKEN, KEYPOOL_ADMIN_TOKEN=ADMIN_TOKEN
)
"""Marks a test whose application has a token of each role."""


@dataclass
class Page:
    """One answer."""

    status: int
    headers: HTTPHeaders
    body: bytes

    @property
    def text(self) -> str:
        """The body."""
        return self.body.decode()

    @property
    def json(self) -> Any:
        """The body."""
        return jsonlib.loads(self.body)

    @property
    def cookie(self) -> str:
        """The cookie that the answer sets, without its attributes."""
        return self.headers.get("Set-Cookie", "").split(";")[0]

    def expect(self, status: int, code: str | None = None) -> Any:
        """The JSON body, if status (and the problem's code) are these."""
        assert self.status == status, f"wanted {status}, got {self.status}: {self.body[:500]!r}"
        answer: Any = self.json if self.body else {}
        assert code is None or answer["code"] == code, answer
        return answer


class Browser:
    """Fetches pages of the application, and calls its API as an admin."""

    def __init__(self, client: AsyncHTTPClient, base_url: str) -> None:
        self.base_url = base_url
        self._client = client

    async def request(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        decompress: bool = True,
    ) -> Page:
        """One request; redirects aren't followed. The client asks for gzip itself if `decompress` is set."""
        answer = await self._client.fetch(
            self.base_url + path, method=method, body=body, headers=dict(headers or {}),
            follow_redirects=False, raise_error=False, allow_nonstandard_methods=True,
            connect_timeout=60, request_timeout=60, decompress_response=decompress,
        )  # fmt: skip
        return Page(answer.code, answer.headers, answer.body)

    async def fetch(self, path: str, form: Mapping[str, str] | None = None, **headers: str) -> Page:
        """A page, or what a form is answered; underscores in a header's name stand for dashes."""
        sent = BROWSER | {name.replace("_", "-"): value for name, value in headers.items()}
        if form is None:
            return await self.request(path, headers=sent)
        sent["Content-Type"] = "application/x-www-form-urlencoded"
        return await self.request(path, "POST", urlencode(form).encode(), sent)

    async def call(
        self, method: str, path: str, json: Any = None, token: str | None = ADMIN_TOKEN, **headers: str
    ) -> Page:
        """A call of the API. An open server takes no notice of the token."""
        sent = JSON | {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            sent["Authorization"] = f"Bearer {token}"
        body = None if json is None else jsonlib.dumps(json).encode()
        return await self.request(API + path, method, body, sent)

    async def make(self, count: int = 1) -> list[dict[str, Any]]:
        """New keys."""
        made = (await self.call("POST", "/batch", {"op": "generate", "count": count})).expect(201)
        keys: list[dict[str, Any]] = made["keys"]
        return keys

    async def acquire(self, owner: str = "worker-7") -> dict[str, Any]:
        """A key served."""
        lease: dict[str, Any] = (await self.call("POST", "/keys/acquire", {"owner": owner})).expect(200)
        return lease

    async def sign_in(self, token: str) -> str:
        """The cookie of a new session."""
        page = await self.fetch("/login", form={"token": token, "next": "/"}, Origin=self.base_url)
        assert page.status == 303, page.text
        return page.cookie

    async def proof(self, cookie: str) -> str:
        """The token against cross-site requests that the session's pages hold."""
        found = re.search(r'<meta name="xsrf" content="(\w+)"', (await self.fetch("/", Cookie=cookie)).text)
        assert found
        return found[1]
