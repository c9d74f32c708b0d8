"""`keypool completion SHELL`: a script that completes subcommands, flags and the values of some flags.

    bash   eval "$(keypool completion bash)"          in ~/.bashrc
    zsh    eval "$(keypool completion zsh)"           in ~/.zshrc, after compinit
    fish   keypool completion fish > ~/.config/fish/completions/keypool.fish

The words are taken from the parser when the script is printed: completing asks nobody and starts nothing.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from keypool.cli.status import Status
from keypool.cli.words import parser


class Words(NamedTuple):
    """What may follow a subcommand. `choices` are the words that each flag, or "" an argument, takes."""

    about: str
    flags: list[str]
    choices: dict[str, list[str]]


def completion(args: argparse.Namespace) -> Status:
    """Print the script."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](all_words()))
    return Status.OK


def all_words() -> dict[str, Words]:
    """Every subcommand with its words."""
    [commands] = [
        action
        for action in parser()._actions  # noqa: SLF001 - argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction)  # noqa: SLF001
    ]
    return {name: _words(sub, sub.description or "") for name, sub in commands.choices.items()}


def _words(sub: argparse.ArgumentParser, about: str) -> Words:
    flags: list[str] = []
    choices: dict[str, list[str]] = {}
    for action in sub._actions:  # noqa: SLF001
        flags += action.option_strings
        for name in action.option_strings or [""]:
            if action.choices is not None:
                choices[name] = [str(choice) for choice in action.choices]
    return Words(about, flags, choices)


def bash(commands: dict[str, Words]) -> str:
    """The script for bash; zsh uses it too."""
    cases = []
    for name, words in commands.items():
        values = [f"{flag}) words='{' '.join(of)}' ;;" for flag, of in words.choices.items() if flag]
        first = " ".join([*words.choices.get("", []), *words.flags])
        inner = " ".join(["case $before in", *values, f"*) words='{first}' ;; esac"])
        cases.append(f"        {name}) {inner} ;;")
    return "\n".join(
        [
            "_keypool() {",
            "    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]}",
            "    local command= words= word",
            '    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            "        case $word in -*) ;; *) command=$word; break ;; esac",
            "    done",
            "    case $command in",
            *cases,
            f"        *) words='{' '.join(commands)}' ;;",
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _keypool keypool",
        ]
    )


def zsh(commands: dict[str, Words]) -> str:
    """The script for zsh, which has a way to take bash's."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash(commands)


def fish(commands: dict[str, Words]) -> str:
    """The script for fish."""
    lines = ["complete -c keypool -f -n __fish_use_subcommand"]
    for name, words in commands.items():
        lines.append(f"complete -c keypool -f -n __fish_use_subcommand -a {name} -d '{words.about}'")
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        for flag in words.flags:
            kind = "-l" if flag.startswith("--") else "-s"
            takes = f" -x -a '{' '.join(words.choices[flag])}'" if flag in words.choices else ""
            lines.append(f"complete -c keypool {seen} {kind} {flag.lstrip('-')}{takes}")
        if "" in words.choices:
            lines.append(f"complete -c keypool {seen} -f -a '{' '.join(words.choices[''])}'")
    return "\n".join(lines)
