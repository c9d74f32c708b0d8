"""The dashboard's files, from memory (assets.py): browsers keep them, since a changed file has a new name."""

from __future__ import annotations

from keypool.core.errors import NotFound
from keypool.web.dashboard import Dashboard
from keypool.web.pages import PageHandler


class Static(PageHandler):
    """/static/VERSION/NAME, for anyone."""

    def get(self, *args: str) -> None:
        """The file, compressed for whoever takes it so."""
        version, name = args
        dashboard: Dashboard = self.application.settings["dashboard"]
        asset = dashboard.assets.get(version, name)
        if asset is None:
            self.refuse(NotFound())
            return
        self.set_header("Content-Type", asset.content_type)
        self.set_header("Cache-Control", "public, max-age=31536000, immutable")
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Vary", "Accept-Encoding")
        if "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            self.finish(asset.compressed)
        else:
            self.finish(asset.body)
