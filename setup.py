"""What pyproject.toml can't say: the wheel has templates/ and static/ inside the package, as keypool/_web/.

keypool/web/assets.py finds them in either place. All the rest is in pyproject.toml.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TOP = Path(__file__).resolve().parent


class BuildWithWeb(build_py):
    """Copies the packages, and then the two folders. An editable install needs no copy."""

    def run(self) -> None:
        """Copy."""
        super().run()
        if self.editable_mode:
            return
        for name in ("templates", "static"):
            target = Path(self.build_lib) / "keypool" / "_web" / name
            shutil.rmtree(target, ignore_errors=True)
            if (TOP / name).is_dir():
                shutil.copytree(TOP / name, target)


setup(cmdclass={"build_py": BuildWithWeb})
