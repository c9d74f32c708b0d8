"""The wheel: what is in it, and that it works in a fresh environment, in an empty folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from client_support import environment
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

from keypool import __version__
from keypool.web import assets

pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, with one more file in templates/ and in static/, as the dashboard's come to be there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    source.mkdir()
    for name in ("keypool", "templates", "static"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=kept)
    for path in ROOT.iterdir():
        if path.is_file() and (
            path.suffix in (".py", ".toml", ".txt", ".in", ".md") or path.name == "LICENSE"
        ):
            shutil.copy(path, source)
    for name in ("templates/probe/page.html", "static/probe/style.css"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    ran = subprocess.run(
        [*pip, "--disable-pip-version-check", "-w", str(folder), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No module named pip" in ran.stderr:
        pytest.skip("there is no pip in this environment")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with that wheel and its own dependencies, and with nothing else.

    The dependencies are those of this environment, made visible by links: nothing is downloaded for the test.
    """
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in _needed_by("httpx2"):
        files = metadata.files(name) or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    return python.parent


def _needed_by(name: str) -> set[str]:
    """A package and all that it requires, here and now."""
    found: set[str] = set()
    wanted = [name]
    while wanted:
        each = canonicalize_name(wanted.pop())
        if each not in found:
            found.add(each)
            requirements = map(Requirement, metadata.requires(each) or ())
            wanted += [
                one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})
            ]
    return found


def _environment() -> dict[str, str]:
    kept = environment()
    del kept["PYTHONPATH"]
    return kept


def _keypool(fresh: Path, cwd: Path, word: str, *, check: bool) -> subprocess.CompletedProcess[str]:
    """What the installed command prints for a word, in an empty folder."""
    return subprocess.run(
        [fresh / "keypool", word], capture_output=True, text=True, cwd=cwd, env=_environment(), check=check
    )


@pytest.mark.thorough
def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "keypool/py.typed",
        "keypool/__main__.py",
        "keypool/client/pool.py",
        "keypool/cli/main.py",
    } <= names
    for path in (ROOT / "keypool").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    lua = {
        f"keypool/engine/valkey/lua/{path.name}"
        for path in (ROOT / "keypool/engine/valkey/lua").glob("*.lua")
    }
    assert lua
    assert lua <= names
    assert {"keypool/_web/templates/probe/page.html", "keypool/_web/static/probe/style.css"} <= names
    for folder in assets.FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file():
                assert f"keypool/_web/{path.relative_to(ROOT).as_posix()}" in names
    assert all(name.startswith(("keypool/", "keypool_service-")) for name in names), names


@pytest.mark.thorough
def test_its_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [described] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    [entries] = [
        archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")
    ]
    assert "keypool = keypool.cli.main:main" in entries
    assert "Name: keypool-service" in described
    assert f"Version: {__version__}" in described
    assert "License-Expression: MIT" in described
    assert "License-File: LICENSE" in described
    assert "Description-Content-Type: text/markdown" in described
    needed = [line for line in described.splitlines() if line.startswith("Requires-Dist: ")]
    bare = [line.removeprefix("Requires-Dist: ") for line in needed if "extra ==" not in line]
    assert [Requirement(line) for line in bare] == [Requirement("httpx2>=2,<3")], (
        "bare: the client and the command"
    )
    for name in ("tornado", "hiredis"):
        assert any(line.startswith(f"Requires-Dist: {name}") and "server" in line for line in needed)


def test_the_lock_holds_what_the_requirements_ask_for() -> None:
    """Every requirement, and what it requires in turn, is in the lock in a version that it allows, with hashes."""
    locked: dict[str, tuple[str, str]] = {}
    elsewhere = set()  # what other platforms and Pythons need
    for block in (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines():
        if "==" in block and not block.startswith("#"):
            name, _, rest = block.partition("==")
            locked[canonicalize_name(name)] = (rest.split()[0], block)
            _, _, marker = block.partition(" --hash")[0].partition(";")
            if marker and not Marker(marker).evaluate():
                elsewhere.add(canonicalize_name(name))
    wanted = [
        Requirement(line)
        for name in ("requirements.txt", "requirements-secrets.txt")
        for line in (ROOT / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    reached: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement} is not in requirements.lock"
        version, block = locked[name]
        assert requirement.specifier.contains(version), f"requirements.lock has {version}, not {requirement}"
        assert "--hash=sha256:" in block, f"{name} has no hash in requirements.lock"
        if name not in reached and (requirement.marker is None or requirement.marker.evaluate()):
            wanted += [
                inner
                for inner in map(Requirement, metadata.requires(name) or ())
                if inner.marker is None or inner.marker.evaluate({"extra": ""})
            ]
        reached.add(name)
    assert reached | elsewhere == set(locked), "requirements.lock has packages that nothing asks for"


@pytest.mark.thorough
def test_client_and_command_need_only_their_own_dependencies(fresh: Path, tmp_path: Path) -> None:
    code = "import keypool.client; print(keypool.client.KeyPool())"
    ran = subprocess.run([fresh / "python", "-W", "error", "-c", code], capture_output=True, text=True,
                         cwd=tmp_path, env=_environment(), check=True)  # fmt: skip
    assert ran.stdout == "KeyPool('http://127.0.0.1:8888')\n"
    helped = _keypool(fresh, tmp_path, "--help", check=True)
    assert "serve" in helped.stdout
    wanting = _keypool(fresh, tmp_path, "serve", check=False)
    assert wanting.returncode == 1
    assert "keypool-service[server]" in wanting.stderr
    assert len(wanting.stderr.splitlines()) == 1
    events = _keypool(fresh, tmp_path, "events", check=False)
    assert (events.returncode, len(events.stderr.splitlines())) == (1, 1), events.stderr
    assert "tornado" in events.stderr


@pytest.mark.thorough
def test_serving_from_an_empty_folder(fresh: Path, tmp_path: Path) -> None:
    """The dependencies are this environment's, made visible by path: nothing is downloaded for the test."""
    site = next(fresh.parent.glob("lib/python*/site-packages"))
    link = site / "dependencies.pth"
    link.write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    process = subprocess.Popen(
        [fresh / "keypool", "serve", "--port=0", "--data=:memory:"],
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=_environment(),
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "ready on" in line), "")
        url = line.split("ready on ")[1].strip()
        for words in (["generate"], ["acquire"], ["stats"]):
            ran = subprocess.run(
                [fresh / "keypool", "--url", url, "--json", *words], capture_output=True, text=True, cwd=tmp_path,
                env=_environment(), check=True,
            )  # fmt: skip
            assert json.loads(ran.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        link.unlink()
    code = "from keypool.web import assets; print(assets.folder('templates')); print(assets.folder('static'))"
    ran = subprocess.run(
        [fresh / "python", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=_environment(),
        check=True,
    )
    templates, static = map(Path, ran.stdout.splitlines())
    assert (templates / "probe" / "page.html").read_text() == "templates/probe/page.html"
    assert (static / "probe" / "style.css").read_text() == "static/probe/style.css"


def test_resources_of_a_checkout_come_first(tmp_path: Path) -> None:
    package = tmp_path / "keypool"
    packed, top = package / "_web" / "static", tmp_path / "static"
    assert assets.folder("static", package) == packed
    top.mkdir()
    assert assets.folder("static", package) == packed  # some folder of that name beside an installed package
    (tmp_path / "server.py").write_text("")
    assert assets.folder("static", package) == top
    with pytest.raises(ValueError, match="templates"):
        assets.folder("secrets")
