"""The dashboard's pages about who holds keys, who waits for one, and which tokens there are."""

from __future__ import annotations

from collections.abc import Sequence

from keypool.api.auth import Caller
from keypool.core.answers import HolderRow, WaiterRow
from keypool.core.cursor import HolderQuery, WaiterQuery
from keypool.engine import Client
from keypool.web.handlers import DashboardHandler, Query, query_of
from keypool.web.paging import links


class _ListHandler(DashboardHandler):
    """A list of a pool, 50 rows a page."""

    of_pool = True

    def query(self, kind: type[Query]) -> Query:
        """What the URL asks for. Raises BadRequest."""
        return query_of(kind, {"after": self.get_query_argument("after", "") or None})

    async def show_rows(
        self, name: str, rows: Sequence[HolderRow | WaiterRow], after: str | None, following: str | None
    ) -> None:
        """The page `name` with the rows that begin at `after`, which go on at `following`."""
        back = self.get_query_argument("back", "")
        self.show(
            f"{name}.html",
            page=name,
            title=name.capitalize(),
            rows=rows,
            links=links(self.request.path, {}, after, back, following),
            after=after,
            stats=await self.engine.stats(),
        )


class OwnerList(_ListHandler):
    """/owners: who holds keys."""

    async def get(self, *args: str) -> None:
        query = self.query(HolderQuery)
        found = await self.engine.owners(query)
        await self.show_rows("owners", found.owners, query.after, found.next)


class WaiterList(_ListHandler):
    """/waiters: who waits for a key at this server."""

    async def get(self, *args: str) -> None:
        query = self.query(WaiterQuery)
        found = await self.engine.waiters(query)
        await self.show_rows("waiters", found.waiters, query.after, found.next)


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
