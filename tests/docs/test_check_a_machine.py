"""docs/how-to/check-a-machine.md: its commands are the command line's, and it names every code that there is."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from pages import blocks, text_of

from rlsys import cli
from rlsys.config.assets import asset
from rlsys.config.compose import compose_run
from rlsys.data.manifest import NAME, read_manifest

PAGE = "how-to/check-a-machine.md"
COMMANDS = [line.strip() for line in text_of(PAGE).splitlines() if line.startswith("    rlsys ")]
SOURCES = [*(asset("configs").parent / "rlsys" / "cluster" / "preflight").glob("*.py")]
SOURCES.append(asset("configs").parent / "rlsys" / "controller" / "doctor.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_of_the_command_line(command: str) -> None:
    arguments = cli.parser().parse_args(shlex.split(command)[1:])
    if overrides := getattr(arguments, "overrides", None):
        compose_run(overrides)


def test_the_short_ones_do_what_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("rlsys doctor", "rlsys fixture --stop-after 25", "rlsys fixture --resume auto"):
        assert command in COMMANDS
        assert cli.main(shlex.split(command)[1:]) == 0
    assert len(list(Path("runs").iterdir())) == 1


def test_every_code_is_on_the_page_and_no_other() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    known = set(re.findall(r'Issue\(\s*"(\w+)"', source))
    known |= set(re.findall(r'"(\w+_(?:unusable|impossible))"', source)) | {"memory_small"}
    section = text_of(PAGE).split("\n## Codes\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"`(\w+)`", section)) == known


def test_the_manifest_of_the_page_is_read(tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "json")
    (tmp_path / NAME).write_text(text, encoding="utf-8")
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert (manifest.fixture, manifest.rows) == (False, {"train.jsonl": 2})
    assert json.loads(text)["format"] == 1
