"""Fixtures of the chaos suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_runs import WHOLE, Chaos, ChaosRun
from model_folders import make_model_folder


@pytest.fixture(scope="session")
def chaos_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model."""
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory, chaos_model: Path) -> Iterator[Chaos]:
    """``chaos(*overrides, **variables)`` starts a :class:`ChaosRun` of the tiny model; it ends with the tests at
    the latest. What became of each is a line of the file that ``CHAOS_TABLE`` names, if it does."""
    made: list[ChaosRun] = []

    def start(*overrides: str, **variables: str) -> ChaosRun:
        run = ChaosRun(tmp_path_factory.mktemp("run"), f"model.path={chaos_model}", *overrides, **variables)
        made.append(run)
        return run

    yield start
    table = os.environ.get("CHAOS_TABLE")
    for run in made:
        run.close()
        if table is not None and len(list((run.root / "runs").iterdir())) == 1:
            with Path(table).open("a", encoding="utf-8") as file:
                file.write(run.account() + "\n")


@pytest.fixture(scope="session")
def undisturbed(chaos: Chaos) -> Path:
    """Folder of a run that nothing is done to: two trainer ranks, and so many steps."""
    run = chaos(*WHOLE)
    assert run.ends() == 0
    return run.folder
