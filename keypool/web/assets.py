"""The dashboard's style sheets and scripts: read once, served from memory under a versioned path.

    /static/3f9a0c12d4e5/js/main.js

The second part is a digest of all files together. So browsers may cache a file for ever, and modules that
import each other by relative paths are always of the same version, even in a page that was open during an
upgrade. A changed file is served after a restart.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("templates", "static")
_PACKAGE = Path(__file__).resolve().parents[1]

TYPES = {
    ".css": "text/css; charset=UTF-8",
    ".js": "text/javascript; charset=UTF-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file: its content, plain and gzipped."""

    content_type: str
    body: bytes
    compressed: bytes


def folder(name: str, package: Path = _PACKAGE) -> Path:
    """The folder `templates` or `static`. It may not exist, if this copy of keypool has no dashboard.

    In a checkout both are at the top, beside server.py; a wheel has copies inside the package (setup.py). A
    checkout's are found first, so that an edit shows without building anything.
    """
    if name not in FOLDERS:
        raise ValueError(f"{name!r} is not one of {', '.join(FOLDERS)}")
    top = package.parent
    if (top / "server.py").is_file() and (top / name).is_dir():
        return top / name
    return package / "_web" / name


class Assets:
    """All files of `static/`, by path. Blocks while it reads them, once."""

    def __init__(self, root: Path | None = None) -> None:
        root = root or folder("static")
        digest = hashlib.sha256()
        self._files: dict[str, Asset] = {}
        for path in sorted(root.rglob("*")):
            if path.suffix in TYPES:
                name, body = path.relative_to(root).as_posix(), path.read_bytes()
                digest.update(f"{name} {len(body)} ".encode() + body)
                self._files[name] = Asset(TYPES[path.suffix], body, gzip.compress(body, mtime=0))
        self.version = digest.hexdigest()[:12]

    def url(self, name: str) -> str:
        """The URL path of a file. Raises KeyError if there is no such file."""
        if name not in self._files:
            raise KeyError(name)
        return f"/static/{self.version}/{name}"

    def get(self, version: str, name: str) -> Asset | None:
        """The file, or None if there is no such file in this version."""
        return self._files.get(name) if version == self.version else None
