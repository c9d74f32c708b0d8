"""The dashboard's templates, compiled once a process: each start of a server would take 0.2 s for it."""

from __future__ import annotations

from functools import partial
from types import CodeType

from jinja2 import BytecodeCache
from jinja2.bccache import Bucket

from keypool.web import dashboard


class InMemory(BytecodeCache):
    """Jinja's cache of compiled templates, in a dict."""

    def __init__(self) -> None:
        self._code: dict[tuple[str, str], CodeType | None] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Fill the bucket, if the template was compiled before."""
        bucket.code = self._code.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep what was compiled."""
        self._code[bucket.key, bucket.checksum] = bucket.code


def share() -> None:
    """Let all dashboards that this process and its forks make have the same compiled templates."""
    dashboard.make_templates = partial(dashboard.make_templates, InMemory())
    templates = dashboard.make_templates()
    for name in templates.list_templates():
        templates.get_template(name)
