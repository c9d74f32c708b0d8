"""`python -m bench NAME [options]` runs a benchmark; without a name, all are listed and run with short options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from bench.report import Table

BENCHES = (
    "pool",
    "http",
    "durable",
    "expiry",
    "restore",
    "attack",
    "crash",
    "workers",
    "scaling",
    "fleet",
    "limits",
    "imports",
    "budgets",
    "walk",
)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark that is named, or all. Exit status 1 if a target was missed, 2 for an unknown name."""
    Table.for_a_page = "--markdown" in arguments
    arguments = [argument for argument in arguments if argument != "--markdown"]
    if arguments and arguments[0] in BENCHES:
        return run(arguments[0], arguments[1:])
    print("python -m bench NAME [--help] [--markdown: tables for a page of docs/]\n")
    for name in BENCHES:
        print(f"  {name:8}{(import_module(f'bench.{name}').__doc__ or '').partition(chr(10))[0]}")
    if arguments:
        return 0 if arguments[0] in ("-h", "--help") else 2
    failed = 0
    for name in BENCHES:
        print(f"\n== {name}, with short options\n")
        failed |= run(name, import_module(f"bench.{name}").QUICK)
    return failed


def run(name: str, arguments: Sequence[str]) -> int:
    """Run one benchmark and return its exit status."""
    status: int = import_module(f"bench.{name}").main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
