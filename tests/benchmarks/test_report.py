"""What the benchmarks share."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks import report


def test_sides_take_turns_and_every_other_round_runs_backwards():
    called: list[str] = []
    clock = itertools.count()
    timed = report.alternate(
        {"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3, repeats=2, clock=lambda: next(clock)
    )
    assert called == [*"aabb", *"bbaa", *"aabb", *"bbaa"]
    assert timed.seconds == {"a": [0.5] * 3, "b": [0.5] * 3}  # the round that warms up is not among them


def test_ratio_is_that_of_a_typical_round():
    timed = report.Timings({"slow": [2.0, 30.0, 4.0], "fast": [1.0, 10.0, 1.0]})
    assert timed.ratio("slow", "fast") == 3.0
    assert timed.median("slow") == 4.0


def test_a_page_and_its_figures_are_written(tmp_path, capsys):
    arguments = report.parser("What it does.").parse_args(["--json", str(tmp_path / "f.json"), "--out", str(tmp_path)])
    page = "# Title\n\n" + report.table(("x", "y"), [(1, "a"), (2, "b")]) + "\n\n" + report.measured("benchmarks.x")
    report.finish(arguments, "title", page=page, figures={"ratios": {"x": 2.0}}, packages=["numpy"])
    assert (tmp_path / "title.md").read_text().startswith("# Title\n\n| x | y |\n|---|---|\n| 1 | a |\n| 2 | b |\n")
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["ratios"] == {"x": 2.0}
    assert {"rlsys", "torch", "numpy", "Python"} <= found["versions"].keys()
    assert "cores" in found["machine"]
    assert all(len(line) <= 120 for line in page.splitlines())
    assert "Title" in capsys.readouterr().out


def test_an_unknown_package_has_no_version():
    assert "no-such-package" not in report.versions("no-such-package")


@pytest.mark.parametrize("option", ["--quick", "--json=x", "--out=y"])
def test_every_benchmark_has_these_options(option):
    report.parser(None).parse_args([option])
