"""The dashboard's pages about who holds keys, who waits for one, and which tokens there are."""

from __future__ import annotations

from typing import TypeVar

from msgspec import ValidationError, convert

from keypool.api.auth import Caller
from keypool.core.cursor import HolderQuery, WaiterQuery
from keypool.core.errors import BadRequest
from keypool.engine import Client
from keypool.web.handlers import DashboardHandler
from keypool.web.paging import Links, links

Query = TypeVar("Query", HolderQuery, WaiterQuery)


class _ListHandler(DashboardHandler):
    """A list of a pool, 50 rows a page."""

    of_pool = True

    def query(self, kind: type[Query]) -> Query:
        """What the URL asks for. Raises BadRequest."""
        try:
            return convert({"after": self.get_query_argument("after", "") or None}, kind)
        except ValidationError:
            raise BadRequest("after is not the next of a page of this list") from None

    def links(self, query: HolderQuery | WaiterQuery, following: str | None) -> Links:
        """The links to its other pages."""
        return links(self.request.path, {}, query.after, self.get_query_argument("back", ""), following)


class OwnerList(_ListHandler):
    """/owners: who holds keys."""

    async def get(self, *args: str) -> None:
        query = self.query(HolderQuery)
        found = await self.engine.owners(query)
        self.show(
            "owners.html",
            page="owners",
            title="Owners",
            rows=found.owners,
            links=self.links(query, found.next),
            after=query.after,
            stats=await self.engine.stats(),
        )


class WaiterList(_ListHandler):
    """/waiters: who waits for a key at this server."""

    async def get(self, *args: str) -> None:
        query = self.query(WaiterQuery)
        found = await self.engine.waiters(query)
        self.show(
            "waiters.html",
            page="waiters",
            title="Waiters",
            rows=found.waiters,
            links=self.links(query, found.next),
            after=query.after,
            stats=await self.engine.stats(),
        )


class TokenList(DashboardHandler):
    """/tokens: the tokens by name, without anything that they could be guessed from.

    A session that is for some pools sees the tokens for these, and of their pools only those that it may see.
    """

    async def get(self, *args: str) -> None:
        seen = None if self.session is None else self.session.caller.pools
        rows = []
        for caller in sorted(self.access.callers().values(), key=_by_name):
            pools = caller.pools if seen is None else seen if caller.pools is None else caller.pools & seen
            if pools is None or pools:
                named = caller.name is not None and seen is None
                held = await self.pools.held(Client(caller.token, caller.max_held)) if named else None
                rows.append((caller, None if pools is None else sorted(pools), held))
        self.show("tokens.html", page="tokens", title="Tokens", rows=rows)


def _by_name(caller: Caller) -> tuple[bool, str, str]:
    return caller.name is None, caller.name or caller.role.value, caller.token
