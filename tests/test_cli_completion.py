"""The completion scripts, each in its own shell: what it offers for a line that is typed so far."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import run_command

CASES = {
    "keypool acq": {"acquire"},
    "keypool list --st": {"--state"},
    "keypool list --state b": {"blocked"},
    "keypool --json completion f": {"fish"},
    "keypool --url http://x li": {"list"},
    "keypool --tok": {"--token-file"},
    "keypool list --sta": {"--state"},
    "keypool list --limit 5 --ord": {"--order"},
    "keypool serve --http ": {"fast", "tornado"},
    "keypool serve --key-l": {"--key-length"},
    "keypool list --state q": {"quarantined"},
    "keypool unblock one --outcome r": {"rate_limited"},
    "keypool quarantine id:1 --no": {"--now"},
    "keypool pools ap": {"apply"},
    "keypool pools apply a-f": {"a-file"},
    "keypool pools apply --dry": {"--dry-run"},
    "keypool --pool openai li": {"list"},
    "keypool import a-f": {"a-file"},
    "keypool import --exists ": {"skip", "update"},
    "keypool update id:1 --no-l": {"--no-labels"},
    "keypool rekey --wa": {"--wait"},
    "keypool run --overrun ": {"stop", "warn"},
    "keypool run --on-exit 75=ok --on-exit 76=ok --exten": {"--extend"},
    "keypool run --on-exit 75=ok --on-exi": {"--on-exit"},
    "keypool run --owner me --overr": {"--overrun"},
    "keypool run -- a-j": {"a-job"},
    "keypool run a-j": {"a-job"},
    "keypool run --owner me a-j": {"a-job"},
    "keypool --json run --owner run -- a-j": {"a-job"},
    "keypool run -- a-job --overr": set(),
    "keypool run a-job --overr": set(),
    "keypool run -- a-job a-f": {"a-file"},
    "keypool backup a-f": {"a-file"},
    "keypool --token-file a-f": {"a-file"},
}
"""What may follow each line. In the directory are a file, `a-file`, and a command, `bin/a-job`, alone in $PATH."""

_ZSH = r"""
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1= PS2=; cd $1; path=($1/bin); autoload -Uz compinit; compinit -u -D; source $1/script"
# Prints what is offered, between marks.
zpty -w shell 'compadd() {
    local -a offered
    if [[ ${@[1,(i)(-|--)]} != *-(O|A|D)\ * ]]; then builtin compadd -A offered "$@"; fi
    if (( $#offered )); then print -r -- "<<"${^offered}">>"; fi
    builtin compadd "$@"
}
offer() { unset "compstate[vared]"; _main_complete; print -r -- "<<"END">>"; compstate[insert]= compstate[list]=; }
zle -C offer complete-word offer; bindkey "^I" offer; print -r -- "<<"READY">>"'
read_until() { while [[ $out != *$1* ]]; do zpty -r shell part || exit 1; out+=$part; done; print -r -- "$out"; out=; }
read_until "<<READY>>" >/dev/null
shift
for line in "$@"; do
    zpty -n -w shell $'\C-u'"$line"$'\t'
    read_until "<<END>>"
done
zpty -d shell
"""


def in_bash(directory: Path, lines: list[str]) -> list[set[str]]:
    """Calls the function as bash does."""
    script = [f"cd {directory}; PATH={directory}/bin", f"source {directory}/script"]
    for line in lines:
        words = line.split(" ")
        quoted = " ".join(f"'{word}'" for word in words)
        set_up = f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}"
        # `complete -o default`: where the function has nothing to offer, bash offers files.
        files = f"compgen -f -- '{words[-1]}'"
        script.append(f"{set_up}; _keypool; echo ${{COMPREPLY[@]:-$({files})}}")
    return [set(offered.split()) for offered in _ran("bash", ["-c", "\n".join(script)]).split("\n")][:-1]


def in_zsh(directory: Path, lines: list[str]) -> list[set[str]]:
    """Types the lines in an interactive shell, on a terminal of its own."""
    answers = _ran("zsh", ["-f", "-c", _ZSH, "zsh", str(directory), *lines]).split("<<END>>")
    return [{part.partition(">>")[0].strip() for part in answer.split("<<")[1:]} for answer in answers][:-1]


def in_fish(directory: Path, lines: list[str]) -> list[set[str]]:
    """Uses the shell's own command for it."""
    script = [f"cd {directory}; set PATH {directory}/bin; source {directory}/script"]
    script += [f"complete -C '{line}'; echo END" for line in lines]
    answers = _ran("fish", ["--no-config", "-c", "\n".join(script)]).split("END\n")
    return [{row.partition("\t")[0] for row in answer.splitlines()} for answer in answers][:-1]


def _ran(shell: str, words: list[str]) -> str:
    path = shutil.which(shell)
    assert path is not None
    home = {"HOME": "/nonexistent", "TERM": "xterm", "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    ran = subprocess.run(
        [path, *words],
        capture_output=True,
        text=True,
        env=home,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=True,
    )
    assert ran.stderr == ""
    return ran.stdout


SHELLS: dict[str, Callable[[Path, list[str]], list[set[str]]]] = {
    "bash": in_bash,
    "zsh": in_zsh,
    "fish": in_fish,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_what_is_offered(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    script = run_command(None, "completion", shell)
    assert script.status == 0
    (tmp_path / "script").write_text(script.out)
    (tmp_path / "a-file").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "a-job").touch(mode=0o755)
    offered = SHELLS[shell](tmp_path, list(CASES))
    assert dict(zip(CASES, offered, strict=True)) == CASES


def test_bash_divides_a_word_at_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "script").write_text(run_command(None, "completion", "bash").out)
    assert in_bash(tmp_path, ["keypool list --state = b"]) == [{"blocked"}]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_syntactically_right(shell: str, tmp_path: Path) -> None:
    script = run_command(None, "completion", shell)
    assert "acquire" in script.out
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed here")
    (tmp_path / "script").write_text(script.out)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
