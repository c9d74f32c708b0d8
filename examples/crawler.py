"""An asynchronous crawler: many pages at once, but never more than there are keys, and a keeper for the keys.

    python examples/crawler.py [PAGES]      against the server at $KEYPOOL_URL, which makes three keys for it

$KEYPOOL_TOKEN needs the role admin, which may generate keys.
"""

from __future__ import annotations

import asyncio
import sys

from keypool.client import AsyncKeyPool


async def fetch(pool: AsyncKeyPool, page: int) -> str:
    """One page, fetched with a key of its own for as long as that takes."""
    async with pool.lease(owner=f"crawler, page {page}", wait=None) as key:
        key.check(5)  # raises LeaseLost unless more than 5 s remain
        await asyncio.sleep(0.01)  # in place of a request, with key.secret in its headers
        return f"page {page}: fetched under lease {key.lease}"


async def main(pages: int) -> None:
    """Fetch them all."""
    async with AsyncKeyPool.from_env() as pool:
        keys = await pool.generate_many(3)

        def died(key: str) -> None:
            print(f"a key died: {key[:4]}…", file=sys.stderr)

        async with pool.keeper(keys, on_dead=died):
            for line in await asyncio.gather(*(fetch(pool, page) for page in range(pages))):
                print(line)
        await pool.delete_many(keys)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 20))
