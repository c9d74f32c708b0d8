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
import re
import shlex
from collections.abc import Iterable

from keypool.cli.arguments import (
    COMMANDS,
    GLOBAL_FLAGS,
    Argument,
    Command,
    argument,
    shared_flags,
    switch,
)
from keypool.cli.status import Status

_HELP = switch("--help -h", "show help")
_VERSION = switch("--version", "show the version")
_SHARED = (*GLOBAL_FLAGS, _HELP)
_GLOBAL = (*_SHARED, _VERSION)

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

_ZSH = """\
#compdef keypool
_keypool() {
    local state command=
    local -i i
    local -a line
    local -A opt_args
    local -a about=(
@COMMANDS@
    )
    local -a flags=(@FLAGS@
    )
    for ((i = 2; i < CURRENT; i++)); do
        case $words[i] in
            @VALUED@) ((i++)) ;;
            -*) ;;
            *) command=$words[i]; break ;;
        esac
    done
    if [[ -z $command ]]; then
        _arguments -S $flags @TOP@ '1:command:->command'
        if [[ $state == command ]]; then _describe command about; fi
        return
    fi
    shift $((i - 1)) words
    ((CURRENT -= i - 1))
    case $command in
@CASES@
    esac
}
_keypool_run() {
    local -i i
    for ((i = 2; i < CURRENT; i++)); do
        case $words[i] in
            @VALUED@) ((i++)) ;;
            --) ((i++)); break ;;
            -*) ;;
            *) break ;;
        esac
    done
    if ((i > CURRENT)) || [[ $words[i] == -* && $words[i-1] != -- ]]; then
        _arguments -S $flags "$@"
    elif ((i == CURRENT)); then
        _command_names -e
    else
        shift $((i - 1)) words
        ((CURRENT -= i - 1))
        _normal
    fi
}
if [[ $funcstack[1] == _keypool ]]; then _keypool "$@"; else compdef _keypool keypool; fi"""

# `__keypool_command` prints the command that was typed, empty before it; for the words of the command that `run` runs,
# it prints "run --" and the index of their first.
_FISH = """\
function __keypool_command
    set -l words (commandline -opc)
    set -l command ''
    set -l value ''
    set -l i 0
    for word in $words
        set i (math $i + 1)
        if test $i = 1
            continue
        else if test -n "$value"
            set value ''
            continue
        end
        switch $word
            case --
                if test "$command" = run
                    printf '%s\\n' 'run --' (math $i + 1)
                    return
                end
            case @VALUED@
                set value $word
            case '-*'
            case '*'
                if test -z "$command"
                    set command $word
                else if test "$command" = run
                    printf '%s\\n' 'run --' $i
                    return
                end
        end
    end
    echo $command
end
function __keypool_at
    set -l found (__keypool_command)
    contains -- "$found[1]" $argv
end
function __keypool_complete_command
    set -l words (commandline -opc)
    set -l found (__keypool_command)
    set -l typed
    if test (count $found) = 2; and test $found[2] -le (count $words)
        set typed (string escape -- $words[$found[2]..-1])
    end
    complete -C "$typed "(commandline -ct | string collect)
end
complete -c keypool -f
complete -c keypool -n '__keypool_at run "run --"' -x -a '(__keypool_complete_command)'"""


def completion(args: argparse.Namespace) -> Status:
    """Print the script."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell]())
    return Status.OK


def bash() -> str:
    """The script for bash. A case is the command, the flag whose value is typed, and how the word begins."""
    cases: list[str] = []

    def case(beginning: str, words: Iterable[str]) -> None:
        cases.append(f"        '{beginning}'*) words='{' '.join(words)}' ;;")

    for command in COMMANDS:
        arguments = _arguments(command)
        for flag in arguments:
            for name in flag.names if flag.takes_value else ():
                case(f"{command.name} {name} ", flag.choices)
        case(f"{command.name}  -", (name for each in arguments if each.is_flag for name in each.names))
        if command.name == "run":
            cases.append("        'run  '*) _keypool_run $COMP_CWORD; return ;;")
        case(f"{command.name}  ", (word for each in arguments if not each.is_flag for word in each.choices))
    case("  -", (name for flag in _GLOBAL for name in flag.names))
    case("  ", (command.name for command in COMMANDS))
    return _BASH.replace("@VALUED@", "|".join(_valued_flags())).replace("@CASES@", "\n".join(cases))


def zsh() -> str:
    """The script for zsh. It may also be a file named _keypool in a directory of $fpath."""
    cases = []
    for command in COMMANDS:
        does = "_keypool_run" if command.name == "run" else "_arguments -S"
        shared = "" if command.name == "serve" else " $flags"
        own = [each for each in _arguments(command) if each not in _SHARED or not shared]
        cases.append(f"        {command.name}) {does}{shared}{_zsh_specs(own, 12)} ;;")
    commands = (shlex.quote(f"{each.name}:{each.about}") for each in COMMANDS)
    replaced = {
        "@COMMANDS@": "\n".join(f"        {each}" for each in commands),
        "@FLAGS@": _zsh_specs(_SHARED, 8),
        "@TOP@": " ".join(shlex.quote(spec) for spec in _zsh_spec(_VERSION)),
        "@VALUED@": "|".join(_valued_flags()),
        "@CASES@": "\n".join(cases),
    }
    script = _ZSH
    for name, text in replaced.items():
        script = script.replace(name, text)
    return script


def _zsh_specs(arguments: Iterable[Argument], indent: int) -> str:
    """The arguments for `_arguments`, each on a line of its own."""
    specs = (shlex.quote(spec) for each in arguments for spec in _zsh_spec(each))
    return "".join(f" \\\n{' ' * indent}{spec}" for spec in specs)


def _zsh_spec(each: Argument) -> list[str]:
    """`--state=[only keys in this state]:state:(available blocked)` and the like, one for each name of a flag."""
    if each.options.get("nargs") == argparse.REMAINDER:
        return []
    values = f"({' '.join(each.choices)})" if each.choices else ""
    values = "_files" if _is_file(each) else values
    value = f":{each.names[0].lstrip('-')}:{values}"
    if not each.is_flag:
        return [f"*{value}" if each.options.get("nargs") == "+" else value]
    about = re.sub(r"([\[\]\\])", r"\\\1", each.options["help"])
    value = f"=[{about}]{value}" if each.takes_value else f"[{about}]"
    before = "*" if each.options.get("action") == "append" else f"({' '.join(each.names)})"
    return [f"{before}{name}{value}" for name in each.names]


def _is_file(each: Argument) -> bool:
    """Whether it takes the name of a file, perhaps among others."""
    return "FILE" in str(each.options.get("metavar")).split("|")


def fish() -> str:
    """The script for fish."""
    lines: list[str] = []

    def complete(command: str, each: Argument) -> None:
        words = [f"complete -c keypool -n '__keypool_at {command}'"]
        if each.is_flag:
            words += [f"-l {name[2:]}" if name[1] == "-" else f"-s {name[1]}" for name in each.names]
            words.append(f"-d {shlex.quote(each.options['help'])}")
        if _is_file(each):
            words.append("-r -F")
        elif each.choices:
            words.append(f"-x -a '{' '.join(each.choices)}'")
        elif each.takes_value:
            words.append("-x")
        lines.append(" ".join(words))

    for command in COMMANDS:
        lines.append(
            f"complete -c keypool -n '__keypool_at \"\"' -a {command.name} -d {shlex.quote(command.about)}"
        )
        for each in _arguments(command):
            complete(command.name, each)
    for flag in _GLOBAL:
        complete('""', flag)
    return "\n".join([_FISH.replace("@VALUED@", " ".join(_valued_flags())), *lines])


def _valued_flags() -> list[str]:
    """The flags, of all commands, after which the next word is a value."""
    flags = [*_GLOBAL, *(each for command in COMMANDS for each in _arguments(command))]
    return sorted({name for flag in flags if flag.takes_value for name in flag.names})


def _arguments(command: Command) -> list[Argument]:
    """A command's arguments. The server's flags come from its settings, if the server is installed."""
    if command.name != "serve":
        return [*command.arguments, *shared_flags(command), _HELP]
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
