"""The page of placements is what the functions say today."""

from __future__ import annotations

from benchmarks.placement import page
from rlsys.config.assets import asset


def test_the_page_is_up_to_date() -> None:
    path = asset("configs").parent / "docs" / "results" / "placement.md"
    assert path.read_text(encoding="utf-8") == page(), (
        "make it again: python -m benchmarks.placement --out docs/results"
    )
