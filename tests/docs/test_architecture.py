"""docs/architecture.md names files that are there, every file of the pure maths, and every column's writer."""

from __future__ import annotations

import re
from pathlib import Path

from pages import text_of

from rlsys.batch.columns import COLUMNS
from rlsys.config.assets import asset

PAGE = "architecture.md"
PACKAGE = Path(__file__).parent.parent.parent / "rlsys"


def test_files_that_it_names_are_there() -> None:
    known = [path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")]
    for name in re.findall(r"`([\w/]+\.py)`", text_of(PAGE)):
        assert any(path == name or path.endswith(f"/{name}") for path in known), name
    folders = {path.relative_to(PACKAGE).as_posix() + "/" for path in PACKAGE.rglob("*") if path.is_dir()}
    run_folders = {"skipped/"}
    for name in re.findall(r"`(\w[\w/]*/)`", text_of(PAGE)):
        assert name in run_folders or any(folder.endswith(name) for folder in folders), name


def test_it_names_every_file_of_algorithms_replay_and_controller() -> None:
    unnamed = {"metrics.py", "resume.py", "run.py", "logprobs.py"}  # what their names say
    for room in ("algorithms", "replay", "controller"):
        for path in (PACKAGE / room).glob("[!_]*"):
            name = f"{path.name}/" if path.is_dir() else path.name
            assert name in text_of(PAGE) or name in unnamed, f"{room}/{name}"


def test_it_names_every_column() -> None:
    pairs = ("chosen_", "rejected_")
    text = text_of(PAGE)
    missing = [name for name in COLUMNS if f"`{name}`" not in text and not name.startswith(pairs)]
    assert not missing
    assert all(f"`{side}…`" in text for side in pairs)


def test_the_floors_are_those_that_the_linter_holds() -> None:
    text = (asset("configs").parent / "pyproject.toml").read_text(encoding="utf-8")
    layers = text.split('name = "rooms import only from the floors below"', 1)[1].split("]", 1)[0]
    held = [re.findall(r"rlsys\.(\w+)", line) for line in layers.splitlines() if "rlsys." in line][::-1]
    table = text_of(PAGE).split("## Rooms and floors", 1)[1]
    rows = re.findall(r"^\| \d \| (.*?) \|", table, re.MULTILINE)
    ground, *above = (re.findall(r"`(\w+)`", row) for row in rows)  # the rooms of floor 0 stand on one another
    assert [sorted(rooms) for rooms in (*([room] for room in ground), *above)] == [sorted(rooms) for rooms in held]
