"""`keypool completion SHELL`: a script that completes commands, flags and the values of some flags.

    bash   eval "$(keypool completion bash)"          in ~/.bashrc
    zsh    eval "$(keypool completion zsh)"           in ~/.zshrc, after compinit
    fish   keypool completion fish > ~/.config/fish/completions/keypool.fish

The script contains all words: completing neither starts keypool nor calls a server. After `run --` the shell
completes the command to run.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Iterable

from keypool.cli.arguments import COMMANDS, GLOBAL_FLAGS, Argument, Command, argument, switch
from keypool.cli.status import Status

_HELP = switch("--help -h", "show help")
_GLOBAL = (*GLOBAL_FLAGS, _HELP, switch("--version", "show the version"))

_BASH = """\
_keypool() {
    local current=${COMP_WORDS[COMP_CWORD]} command= flag= words= word i
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == = ]]; then continue; fi
        if [[ -n $flag ]]; then flag=; continue; fi
        case $word in
            --) if [[ $command == run ]]; then _keypool_run $((i + 1)); return; fi ;;
            @VALUED@) flag=$word ;;
            -*) ;;
            *) if [[ -z $command ]]; then command=$word; elif [[ $command == run ]]; then _keypool_run $i; return; fi ;;
        esac
    done
    if [[ $current == = ]]; then current=; fi
    case "$command $flag $current" in
@CASES@
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
_keypool_run() {
    if type _command_offset >/dev/null 2>&1; then _command_offset $1
    elif ((COMP_CWORD == $1)); then COMPREPLY=($(compgen -c -- "${COMP_WORDS[COMP_CWORD]}"))
    else COMPREPLY=(); fi
}
complete -o default -F _keypool keypool"""

_FISH = """\
function __keypool_in_command
    contains -- -- (commandline -opc)
end
function __keypool_complete_command
    __fish_complete_subcommand --fcs-skip=(contains -i -- -- (commandline -opc))
end
complete -c keypool -f
complete -c keypool -n __keypool_in_command -x -a '(__keypool_complete_command)'"""


def completion(args: argparse.Namespace) -> Status:
    """Print the script."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell]())
    return Status.OK


def bash() -> str:
    """The script for bash. A case is the command, the flag whose value is typed, and how the word begins."""
    valued: set[str] = set()
    cases: list[str] = []

    def case(beginning: str, words: Iterable[str]) -> None:
        cases.append(f"        '{beginning}'*) words='{' '.join(words)}' ;;")

    for command in COMMANDS:
        arguments = _arguments(command)
        for flag in arguments:
            for name in flag.names if flag.takes_value else ():
                valued.add(name)
                case(f"{command.name} {name} ", flag.choices)
        case(f"{command.name}  -", (name for each in arguments if each.is_flag for name in each.names))
        if command.name == "run":
            cases.append("        'run  '*) _keypool_run $COMP_CWORD; return ;;")
        case(f"{command.name}  ", (word for each in arguments if not each.is_flag for word in each.choices))
    case("  -", (name for flag in _GLOBAL for name in flag.names))
    case("  ", (command.name for command in COMMANDS))
    return _BASH.replace("@VALUED@", "|".join(sorted(valued))).replace("@CASES@", "\n".join(cases))


def zsh() -> str:
    """The script for zsh, which can use bash's."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    """The script for fish."""
    lines = [_FISH]

    def complete(condition: str, each: Argument) -> None:
        words = [f"complete -c keypool -n '{condition}'"]
        if each.is_flag:
            words += [f"-l {name[2:]}" if name[1] == "-" else f"-s {name[1]}" for name in each.names]
            words.append(f"-d {shlex.quote(each.options['help'])}")
        if each.options.get("metavar") == "FILE":
            words.append("-r -F")
        elif each.choices:
            words.append(f"-x -a '{' '.join(each.choices)}'")
        elif each.takes_value:
            words.append("-x")
        lines.append(" ".join(words))

    for command in COMMANDS:
        about = shlex.quote(command.about)
        lines.append(f"complete -c keypool -n __fish_use_subcommand -a {command.name} -d {about}")
        for each in _arguments(command):
            complete(f"__fish_seen_subcommand_from {command.name}; and not __keypool_in_command", each)
    for flag in _GLOBAL:
        complete("__fish_use_subcommand", flag)
    return "\n".join(lines)


def _arguments(command: Command) -> list[Argument]:
    """A command's arguments. The server's flags come from its settings, if the server is installed."""
    if command.name != "serve":
        return [*command.arguments, *GLOBAL_FLAGS, _HELP]
    try:
        options = importlib.import_module("keypool.config.settings").OPTIONS
    except ImportError:
        options = ()
    flags = [
        argument(
            each.flag,
            each.about,
            "FILE" if each.name in ("data", "config") else None,
            choices=getattr(each.kind, "words", ()),
        )
        for each in options
    ]
    return [*flags, switch("--print-config", "print the effective settings"), _HELP]
