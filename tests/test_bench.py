"""The benchmarks: what the pages say of them exists, and what they compute is right. Speed isn't tested."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from bench import __main__, limits
from bench.load import Round
from bench.race import Race, Sample
from bench.report import Table, percentile, size, span

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_pages_name_benchmarks_that_exist(page: str) -> None:
    named = re.findall(r"(?:./run |`)bench ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert set(named) <= set(__main__.BENCHES), page


def test_every_benchmark_has_a_description_and_short_options() -> None:
    for name in __main__.BENCHES:
        module = import_module(f"bench.{name}")
        assert module.__doc__
        assert all(option.startswith("--") for option in module.QUICK[::2]), name


def test_an_unknown_name_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["nonsense"]) == 2
    printed = capsys.readouterr().out
    assert [name for name in __main__.BENCHES if f"  {name}" not in printed] == []


@pytest.mark.parametrize(
    ("policy", "least", "most"),
    list(zip(limits.POLICIES, (0.4, 0.01, 0.0, 0.0), (0.6, 0.08, 0.0, 0.0), strict=True)),
)
def test_fewer_requests_are_refused_the_more_is_reported(policy: str, least: float, most: float) -> None:
    """In ten simulated minutes, in which all of them are served what the service allows."""
    found = limits.Simulation(policy, keys=40, limit=16, workers=200, pause=9.0).run(600.0)
    assert least <= found.refused / found.requests <= most
    assert 0.95 <= (found.requests - found.refused) / 10 / (40 * 16) <= 1.1


def test_ratios_are_taken_within_a_round_and_every_other_round_is_in_reverse() -> None:
    order: list[str] = []
    rates = {"old": [100.0, 10.0, 1000.0], "new": [200.0, 20.0, 1000.0]}

    def load(name: str) -> Sample:
        order.append(name)
        return Sample(rate := rates[name].pop(0), cost=1 / rate)

    race = Race()
    race.add("old", lambda: load("old"))
    race.add("new", lambda: load("new"))
    race.run(3)
    assert order == ["old", "new", "new", "old", "old", "new"]
    assert race.found["new"].of(race.found["old"]) == 2.0
    assert race.found["new"].cheaper(race.found["old"]) == 2.0


def test_a_sample_has_the_figures_of_its_round() -> None:
    measured = Round(requests=4, seconds=2.0, errors=1, cpu=0.4)
    measured.latencies.extend([4.0, 1.0, 3.0, 2.0])
    assert Sample.of(measured) == Sample(2.0, 0.1, p50=3.0, p99=4.0, worst=4.0, errors=1)


def test_figures_are_printed_with_units() -> None:
    assert [span(each) for each in (2.0, 0.0123, 4.5e-6, 7e-9)] == ["2 s", "12.3 ms", "4.5 µs", "7 ns"]
    assert [size(each) for each in (999, 1000, 1_500_000)] == ["999", "1k", "1.5M"]
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0
    table = Table("name", "figure")
    table.row("a", "1")
    assert str(table) == "name  figure\n----  ------\na          1"


def test_a_table_for_a_page_is_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--markdown` prints what docs/architecture.md has."""
    monkeypatch.setattr(Table, "for_a_page", True)
    table = Table("name", "figure")
    table.row("a", "1")
    assert str(table) == "| name | figure |\n| --- | ---: |\n| a | 1 |"
