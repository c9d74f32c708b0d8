"""Where the dashboard's templates and static files are: in a checkout, and in an installed package.

In a checkout they stand at the top, beside server.py, where people look for them. The wheel can't have them
there, so building it copies both folders into the package (setup.py). What is found first is the checkout's,
so that an edit shows without building anything.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("templates", "static")
PACKED = "_web"
"""The folder inside the package that a wheel has them in."""

_PACKAGE = Path(__file__).resolve().parents[1]


def folder(name: str, package: Path = _PACKAGE) -> Path:
    """The folder `templates` or `static`. It may not exist, if this copy of keypool has no dashboard."""
    if name not in FOLDERS:
        raise ValueError(f"{name!r} is none of {', '.join(FOLDERS)}")
    top = package.parent
    if (top / "server.py").is_file() and (top / name).is_dir():
        return top / name
    return package / PACKED / name
