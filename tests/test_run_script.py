"""`./run`: sets up once, tells what is missing, believes nothing half made, and gets out of the server's way.

Each test has a copy of the script in its own folder, beside a server that says what it was started with.
Python is a stub that notes its calls, so that setting up takes milliseconds and no network; one test does
it in earnest.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

RUN = Path(__file__).parent.parent / "run"
TOOLS = ("basename", "cat", "cp", "dirname", "mkdir", "readlink", "rm", "rmdir", "sh", "sleep")
SHELLS = [shell for shell in ("sh", "dash", "bash", "ksh", "zsh", "yash") if shutil.which(shell)]

# A Python as ./run sees it. STUB_... variables make it old, incomplete, slow or failing; with STUB_PIP_UNTIL pip
# goes on until there is a file of that name. What is not part of
# setting up goes to a real Python. It turns into sleep, as a shell may miss an interrupt while it starts one.
STUB = f"""#!/bin/sh
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
    -V) echo "Python ${{STUB_VERSION:-3.11.0}}" ;;
    *version_info*) exit "${{STUB_OLD:-0}}" ;;
    *ensurepip*) exit "${{STUB_NO_VENV:-0}}" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) [ -z "${{STUB_PIP_STATUS-}}" ] || exit "$STUB_PIP_STATUS"
        while [ "${{STUB_PIP_UNTIL-}}" ] && ! [ -e "$STUB_PIP_UNTIL" ]; do sleep 0.02; done
        exec sleep "${{STUB_PIP_SECONDS:-0}}" ;;
    "-m "*) ;;
    *) exec '{sys.executable}' "$@" ;;
esac
"""

UV_STUB = """#!/bin/sh
echo "uv $*" >>"$CALLS"
[ "$1" = pip ] || { for last; do :; done; mkdir -p "$last/bin" && cp "$STUB_PYTHON" "$last/bin/python"; }
"""

SERVER = """\
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "cwd": os.getcwd()}), flush=True)
if "--wait" in sys.argv:
    signal.pause()
"""


class Checkout:
    """A copy of the repository as far as `./run` knows it, and the machine that it runs on."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "a checkout"
        self.bin = directory / "bin"
        self.calls_file = directory / "calls"
        self.started: list[subprocess.Popen[str]] = []
        self.environ = {"PATH": str(self.bin), "CALLS": str(self.calls_file), "HOME": str(directory)}
        self.root.mkdir()
        self.bin.mkdir()
        self.calls_file.touch()
        shutil.copy(RUN, self.root)
        (self.root / "server.py").write_text(SERVER)
        (self.root / "requirements.txt").write_text("# none\n")
        (self.root / "requirements-secrets.txt").write_text("# none\n")
        (self.root / "requirements-dev.txt").write_text("-r requirements.txt\n")
        (self.root / "requirements-bench.txt").write_text("-r requirements.txt\n")
        for tool in TOOLS:
            where = shutil.which(tool)
            assert where, f"this machine has no {tool}"
            (self.bin / tool).symlink_to(where)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def lock(self) -> Path:
        return self.root / ".venv.lock"

    def install(self, name: str, text: str = STUB) -> None:
        """Put a program into PATH."""
        program = self.bin / name
        program.write_text(text)
        program.chmod(0o755)

    def start(
        self, *arguments: str, command: tuple[str, ...] = ("./run",), cwd: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        # A group of its own, so that it can be ended with all that it started.
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=cwd or self.root,
            env=self.environ | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **options)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def serve(self, *arguments: str, **options: Any) -> dict[str, Any]:
        """Run the server to its end and return what it says of itself."""
        done = self.run(*arguments, **options)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def calls(self, word: str) -> list[str]:
        """The calls of Python or uv so far that have this word in them."""
        return [line for line in self.calls_file.read_text().splitlines() if word in line]


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Checkout]:
    """A checkout on a machine without Python."""
    checkout = Checkout(tmp_path)
    yield checkout
    checkout.close()


@pytest.fixture
def checkout(bare: Checkout) -> Checkout:
    """A checkout on a machine with a Python that is new enough."""
    bare.install("python3")
    return bare


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


# Setting up


def test_sets_up_once_with_a_message_and_is_silent_the_next_time(checkout: Checkout) -> None:
    first = checkout.run()
    assert (first.returncode, first.stderr) == (
        0,
        "run: setting up .venv\nrun: installing requirements.txt\n",
    )
    second = checkout.run()
    assert (second.returncode, second.stderr) == (0, "")
    assert len(checkout.calls("-m venv")) == len(checkout.calls("-m pip")) == 1
    assert not checkout.lock.exists()


@pytest.mark.thorough
def test_sets_up_in_earnest(bare: Checkout) -> None:
    pytest.importorskip("ensurepip")
    (bare.bin / "python3").symlink_to(os.path.realpath(sys.executable))
    said = bare.serve("--port=0")
    assert said["argv"] == ["--port=0"]
    assert bare.run().stderr == ""
    pip = subprocess.run(
        [bare.venv / "bin/python", "-m", "pip", "--version"], capture_output=True, check=True
    )
    assert str(bare.venv).encode() in pip.stdout


def test_tests_add_their_requirements_without_removing_what_a_server_may_run_from(checkout: Checkout) -> None:
    checkout.run()
    added = checkout.run("test")
    assert (added.returncode, added.stderr) == (0, "run: installing requirements-dev.txt\n")
    assert len(checkout.calls("-m venv")) == 1
    assert checkout.run("test").stderr == checkout.run().stderr == ""
    assert len(checkout.calls("-m pip")) == 2


def test_tests_on_a_fresh_machine_install_once(checkout: Checkout) -> None:
    checkout.run("test")
    assert checkout.run().stderr == ""
    assert [call.split()[-1] for call in checkout.calls("-m pip")] == ["requirements-dev.txt"]


@pytest.mark.parametrize(
    ("file", "job"),
    [("requirements.txt", ()), ("requirements-secrets.txt", ()), ("requirements-dev.txt", ("test",))],
)
def test_changed_requirements_are_installed(checkout: Checkout, file: str, job: tuple[str, ...]) -> None:
    checkout.run("test")
    (checkout.root / file).write_text("# another\n")
    assert "installing" in checkout.run(*job).stderr
    assert checkout.run(*job).stderr == ""


def test_changed_requirements_of_the_tests_do_not_concern_the_server(checkout: Checkout) -> None:
    checkout.run("test")
    (checkout.root / "requirements-dev.txt").write_text("# another\n")
    assert checkout.run().stderr == ""


def test_newer_python_of_the_system_makes_a_new_environment(checkout: Checkout) -> None:
    checkout.run()
    assert "setting up .venv" in checkout.run(STUB_VERSION="3.12.0").stderr
    assert checkout.run(STUB_VERSION="3.12.0").stderr == ""


def test_uv_is_taken_where_there_is_one(checkout: Checkout) -> None:
    checkout.install("uv", UV_STUB)
    python = str(checkout.bin / "python3")
    assert checkout.serve("--port=0", STUB_PYTHON=python)["argv"] == ["--port=0"]
    assert [call.split()[1] for call in checkout.calls("uv ")] == ["venv", "pip"]
    assert checkout.calls("-m venv") == checkout.calls("-m pip") == []
    assert checkout.run(STUB_PYTHON=python).stderr == ""


def test_environment_may_stand_elsewhere(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "of mine" / "venv"
    checkout.serve(KEYPOOL_VENV=f"{elsewhere}/")
    assert (elsewhere / "bin/python").exists()
    assert not checkout.venv.exists()
    assert checkout.run(KEYPOOL_VENV=str(elsewhere)).stderr == ""
    # It is ours once made, so it is also made anew there.
    (elsewhere / "ready-to-run").unlink()
    assert "setting up" in checkout.run(KEYPOOL_VENV=str(elsewhere)).stderr


def test_folder_of_somebody_else_is_not_removed(checkout: Checkout, tmp_path: Path) -> None:
    elsewhere = tmp_path / "thesis"
    elsewhere.mkdir()
    (elsewhere / "chapter-1").write_text("long ago")
    done = checkout.run(KEYPOOL_VENV=str(elsewhere))
    assert done.returncode == 1
    assert f"{elsewhere} is in the way and was not made by ./run" in done.stderr
    assert [path.name for path in elsewhere.iterdir()] == ["chapter-1"]
    assert not Path(f"{elsewhere}.lock").exists()


# What is missing


def test_without_python_it_says_what_to_install(bare: Checkout) -> None:
    done = bare.run()
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "Python 3.11 or newer" in lines[0]
    assert "apt install python3-venv" in lines[1]
    assert "uv" in lines[1]
    assert not bare.venv.exists()
    assert not bare.lock.exists()


def test_an_old_python_is_not_used(checkout: Checkout) -> None:
    done = checkout.run(STUB_OLD="1")
    assert done.returncode == 1
    assert "Python 3.11 or newer" in done.stderr


@pytest.mark.parametrize("broken", ["python3", "python3.14"])
def test_the_newest_python_that_works_is_found_under_its_own_name(bare: Checkout, broken: str) -> None:
    for name in ("python3", "python3.11", "python3.13"):
        bare.install(name)
    bare.install(broken, "#!/bin/sh\nexit 1\n")
    assert bare.run().returncode == 0
    assert bare.calls("-m venv") == ["python3.13 -m venv .venv"]


def test_python_without_venv_is_named_with_what_to_install(checkout: Checkout) -> None:
    done = checkout.run(STUB_NO_VENV="1")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("run: python3 cannot make virtual environments")
    assert "apt install python3-venv" in lines[1]
    assert len(lines) == 2
    assert not checkout.venv.exists()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="root may write everywhere but in /proc")
def test_folder_that_cannot_be_written_is_named(checkout: Checkout) -> None:
    done = checkout.run(KEYPOOL_VENV="/proc/keypool")
    assert done.returncode == 1
    assert "run: cannot write to /proc" in done.stderr


# What is half made


def test_environment_whose_requirements_did_not_arrive_is_not_believed(checkout: Checkout) -> None:
    failed = checkout.run(STUB_PIP_STATUS="3")
    assert failed.returncode != 0
    assert failed.stdout == ""
    assert not checkout.lock.exists()
    assert "setting up .venv" in checkout.run().stderr


@pytest.mark.parametrize("broken", ["empty", "no python", "dangling python", "dead python", "foreign"])
def test_broken_environment_is_made_anew(checkout: Checkout, broken: str) -> None:
    python = checkout.venv / "bin/python"
    if broken in ("empty", "foreign"):
        python.parent.mkdir(parents=True)
    else:
        checkout.run()
        python.unlink()
    if broken == "dangling python":
        python.symlink_to("/nowhere/python3")
    if broken in ("dead python", "foreign"):
        python.write_text("#!/bin/sh\nexit 127\n")
        python.chmod(0o755)
    (checkout.venv / "leftover").touch()
    done = checkout.run()
    assert (done.returncode, done.stderr.splitlines()[0]) == (0, "run: setting up .venv")
    assert not (checkout.venv / "leftover").exists()
    assert checkout.run().stderr == ""


def test_run_that_was_killed_leaves_nothing_that_is_believed_or_waited_for(checkout: Checkout) -> None:
    killed = checkout.start(STUB_PIP_SECONDS="60")
    wait_until(lambda: checkout.calls("-m pip"), "pip")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    assert checkout.lock.exists()
    done = checkout.run()
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["run: setting up .venv", "run: installing requirements.txt"]
    assert not checkout.lock.exists()
    assert not Path(f"{checkout.lock}.break").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_run_that_is_interrupted_takes_its_lock_along(checkout: Checkout, number: signal.Signals) -> None:
    stopped = checkout.start(STUB_PIP_SECONDS="60")
    wait_until(lambda: checkout.calls("-m pip"), "pip")
    os.killpg(stopped.pid, number)
    assert stopped.wait(60) != 0
    assert not checkout.lock.exists()
    assert "setting up .venv" in checkout.run().stderr


# Two at once


def test_two_at_once_set_up_once(checkout: Checkout) -> None:
    end = checkout.root / "end"
    first = checkout.start("first", STUB_PIP_UNTIL=str(end))
    wait_until(lambda: checkout.calls("-m pip"), "pip")
    second = checkout.start("second")
    said = second.stderr
    assert said is not None
    wait_until(lambda: select.select([said], [], [], 0)[0], "what the second one says")
    end.touch()
    out, err = zip(first.communicate(timeout=60), second.communicate(timeout=60), strict=True)
    assert [json.loads(line)["argv"] for line in out] == [["first"], ["second"]]
    assert err[1] == "run: waiting for another run that sets up .venv\n"
    assert len(checkout.calls("-m venv")) == len(checkout.calls("-m pip")) == 1


def test_many_at_once_that_find_the_lock_of_a_dead_one_set_up_once(checkout: Checkout) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    checkout.lock.mkdir()
    (checkout.lock / "owner").write_text(f"{dead.pid}\n")
    crowd = [checkout.start(str(i), STUB_PIP_SECONDS="0.2") for i in range(8)]
    done = [(one.communicate(timeout=60), one.returncode) for one in crowd]
    assert [status for _, status in done] == [0] * 8
    assert len(checkout.calls("-m venv")) == len(checkout.calls("-m pip")) == 1
    assert not checkout.lock.exists()


# Starting


def test_becomes_the_server_with_its_flags_untouched(checkout: Checkout) -> None:
    flags = ["--port=0", "a b", "", "*", "$HOME", "--wait"]
    process = checkout.start(*flags)
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    assert said == {"pid": process.pid, "argv": flags, "cwd": str(checkout.root.resolve())}
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7


@pytest.mark.thorough
@pytest.mark.parametrize("shell", SHELLS)
def test_any_posix_shell_will_do(checkout: Checkout, shell: str) -> None:
    command = (str(shutil.which(shell)), "./run")
    process = checkout.start("--wait", command=command)
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["pid"] == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 7
    assert checkout.run(command=command).stderr == ""


def test_runs_from_another_folder_and_through_links(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "absolute").symlink_to(checkout.root / "run")
    (tmp_path / "links" / "relative").symlink_to("../a checkout/run")
    (tmp_path / "links" / "twice").symlink_to("relative")
    for name in ("absolute", "relative", "twice"):
        for command in (f"links/{name}", f"{tmp_path}/links/{name}"):
            said = checkout.serve("x", command=(command,), cwd=tmp_path, CDPATH="/")
            assert (said["cwd"], said["argv"]) == (str(checkout.root.resolve()), ["x"])
    assert checkout.serve(command=("a checkout/run",), cwd=tmp_path)["cwd"] == str(checkout.root.resolve())


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], "-m not thorough -n auto --dist worksteal"),
        (["--all"], "-n auto --dist worksteal"),
        (["-k", "pool", "--all", "-x"], "-n auto --dist worksteal -k pool -x"),
        (["-n0", "-x"], "-m not thorough -n0 -x"),
        (["-x", "-n", "4"], "-m not thorough -x -n 4"),
        (["--all", "--numprocesses=2"], "--numprocesses=2"),
        (["-p", "no:xdist"], "-m not thorough -p no:xdist"),
        (["--no-header"], "-m not thorough -n auto --dist worksteal --no-header"),
    ],
)
def test_tests_of_the_quick_tier_run_on_all_cores_by_default(
    checkout: Checkout, arguments: list[str], passed: str
) -> None:
    assert checkout.run("test", *arguments).returncode == 0
    assert checkout.calls("-m pytest") == [f"python -m pytest {passed}"]


def test_lint_runs_all_linters_though_one_fails(bare: Checkout) -> None:
    bare.install("python3", STUB.replace('"-m "*) ;;', '"-m ruff check"*) exit 1 ;;\n"-m "*) ;;'))
    assert bare.run("lint").returncode == 1
    linters = ["python -m ruff check .", "python -m ruff format --check .", "python -m mypy"]
    assert bare.calls("-m ruff") + bare.calls("-m mypy") == linters


def test_scripts_and_styles_are_linted_where_there_is_npx(checkout: Checkout) -> None:
    """Without it, lint says what it leaves out; with it, a complaint of the linter fails the job."""
    without = checkout.run("lint")
    assert (without.returncode, "npx is not installed" in without.stderr) == (0, True)
    checkout.install("npx", '#!/bin/sh\necho "npx $*" >>"$CALLS"\nexit 3\n')
    assert checkout.run("lint").returncode == 1
    [call] = checkout.calls("npx")
    assert re.fullmatch(r"npx --yes @biomejs/biome@[\d.]+ lint --error-on-warnings static", call)


def test_bench_passes_its_name_and_arguments(checkout: Checkout) -> None:
    checkout.run("bench", "acquire", "--keys", "10")
    assert checkout.calls("-m bench") == ["python -m bench acquire --keys 10"]
