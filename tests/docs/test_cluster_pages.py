"""docs/how-to/submit.md and sweeps.md: every command composes, in every job that it makes, and the file on the page is
one that Ray takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from composing import run_config
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from pages import blocks, commands, text_of

from rlsys import cli
from rlsys.cluster.submission import runtime_env
from rlsys.config.compose import overridden_keys
from rlsys.config.ignored import refuse_ignored

PAGES = ("how-to/submit.md", "how-to/sweeps.md")
COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


def jobs_of(command: list[str]) -> list[list[str]]:
    """The command lines of a sweep's jobs; a search's at one end of each interval."""
    words = [re.sub(r"tag\(log,\s*interval\(([^,]+),.*\)\)", r"\1", word) for word in command if word != "-m"]
    parsed = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("hydra")])
    (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return batch


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda part: part if isinstance(part, str) else "…")
def test_every_job_of_every_command_composes(page: str, command: list[str]) -> None:
    found = jobs_of(command)
    assert (len(found) > 1) == ("-m" in command)
    for words in found:
        overrides = [word for word in words if not word.startswith("+recipe=")]
        refuse_ignored(run_config(*overrides), overridden_keys(overrides))


def test_the_commands_about_jobs_are_there() -> None:
    lines = [line.strip() for line in text_of("how-to/submit.md").splitlines() if line.startswith("    rlsys ")]
    assert [cli.parser().parse_args(shlex.split(line)[1:]).jobs_command for line in lines] == ["list", "logs", "stop"]


def test_the_file_on_the_page_is_a_runtime_environment(tmp_path: Path) -> None:
    (text,) = blocks("how-to/submit.md", "yaml")
    (tmp_path / "env.yaml").write_text(text, encoding="utf-8")
    sent = runtime_env(str(tmp_path / "env.yaml"), tmp_path, {"HF_TOKEN": "a", "USER": "me"})
    assert sent["env_vars"]["WANDB_PROJECT"] == "me-runs"
    assert sent["working_dir"] == str(tmp_path)


def test_the_launcher_that_the_page_speaks_of_is_the_default() -> None:
    assert "hydra/launcher: rlsys" in (Path(__file__).parents[2] / "configs" / "config.yaml").read_text()
