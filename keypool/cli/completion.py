"""`keypool completion SHELL`: a script that completes commands, flags and the values of some flags.

    bash   eval "$(keypool completion bash)"          in ~/.bashrc
    zsh    eval "$(keypool completion zsh)"           in ~/.zshrc, after compinit
    fish   keypool completion fish > ~/.config/fish/completions/keypool.fish

The words are written into the script: completing starts no keypool and asks no server. After `run --` the
shell completes the command that is to be run.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Sequence

from keypool.cli.arguments import COMMANDS, GLOBAL_FLAGS, Argument, Command
from keypool.cli.status import Status

_HELP = Argument(("--help", "-h"), {"action": "help", "help": "show help"})
_PRINT_CONFIG = Argument(("--print-config",), {"action": "store_true", "help": "print the settings in force"})
_VERSION = Argument(("--version",), {"action": "version", "help": "show the version"})

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
    for command in COMMANDS:
        arguments = _arguments(command)
        flags = [name for flag in arguments if flag.is_flag for name in flag.names]
        for flag in arguments:
            if flag.takes_value:
                valued.update(flag.names)
                cases += [_case(f"{command.name} {name} ", flag.choices) for name in flag.names]
        cases.append(_case(f"{command.name}  -", flags))
        if command.name == "run":
            cases.append("        'run  '*) _keypool_run $COMP_CWORD; return ;;")
        words = [word for each in arguments if not each.is_flag for word in each.choices]
        cases.append(_case(f"{command.name}  ", words))
    cases.append(_case("  -", [name for flag in (*GLOBAL_FLAGS, _HELP, _VERSION) for name in flag.names]))
    cases.append(_case("  ", [command.name for command in COMMANDS]))
    return _BASH.replace("@VALUED@", "|".join(sorted(valued))).replace("@CASES@", "\n".join(cases))


def _case(beginning: str, words: Sequence[str]) -> str:
    return f"        '{beginning}'*) words='{' '.join(words)}' ;;"


def zsh() -> str:
    """The script for zsh, which can use bash's."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    """The script for fish."""
    lines = [_FISH]
    for command in COMMANDS:
        about = shlex.quote(command.about)
        lines.append(f"complete -c keypool -n __fish_use_subcommand -a {command.name} -d {about}")
        condition = f"-n '__fish_seen_subcommand_from {command.name}; and not __keypool_in_command'"
        lines += [f"complete -c keypool {condition} {_fish(argument)}" for argument in _arguments(command)]
    top = map(_fish, (*GLOBAL_FLAGS, _HELP, _VERSION))
    lines += [f"complete -c keypool -n __fish_use_subcommand {flag}" for flag in top]
    return "\n".join(lines)


def _fish(argument: Argument) -> str:
    """How fish describes a flag, or the words that a positional argument takes."""
    parts = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in argument.names]
    if argument.is_flag:
        parts.append(f"-d {shlex.quote(argument.options['help'])}")
    else:
        parts.clear()
    if argument.options.get("metavar") in ("FILE", "PLACE"):
        parts.append("-r -F")
    elif argument.choices:
        parts.append(f"-x -a '{' '.join(argument.choices)}'")
    elif argument.takes_value:
        parts.append("-x")
    return " ".join(parts)


def _arguments(command: Command) -> tuple[Argument, ...]:
    """A command's arguments. The server's flags come from its settings, if the server is installed."""
    if command.name != "serve":
        return (*command.arguments, *GLOBAL_FLAGS, _HELP)
    try:
        options = importlib.import_module("keypool.config.settings").OPTIONS
    except ImportError:
        return (_HELP,)
    flags = [
        Argument((each.flag,), {"help": each.about, "choices": getattr(each.kind, "words", ())})
        for each in options
    ]
    return (*flags, _PRINT_CONFIG, _HELP)
