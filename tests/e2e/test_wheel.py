"""The wheel, installed elsewhere, runs the recipe from any folder on what it brought along."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running import RUN_S, environment, only_run, steps_of

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

CHECKOUT = Path(__file__).resolve().parents[2]
WHERE = """
import rlsys
from hydra_plugins.rlsys_launcher import launcher
from rlsys.cluster.planner import calibration
from rlsys.cluster.preflight import report
from rlsys.config.assets import asset
print(rlsys.__file__, asset("configs"), asset("recipes"), launcher.__file__, calibration.FILE, report.SCHEMA_FILE)
"""


def python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    """Output of this interpreter, with ``path`` before everything that is installed."""
    variables = {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
        env=environment(**variables),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content alone; what it depends on comes from this environment."""
    root = tmp_path_factory.mktemp("wheel")
    python("-m", "build", "--wheel", "--outdir", str(root / "dist"), str(CHECKOUT), cwd=root)
    (wheel,) = (root / "dist").glob("*.whl")
    target = root / "installed"
    with zipfile.ZipFile(wheel) as content:  # what an installer does with a wheel of pure Python
        content.extractall(target)
    return target


def test_package_configs_and_recipes_come_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    found = python("-c", WHERE, cwd=tmp_path, path=installed).split()
    assert len(found) == 6
    assert all(Path(path).is_relative_to(installed) and Path(path).exists() for path in found), found


def test_data_files_of_the_package_are_in_the_wheel_and_leftovers_are_not(installed: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "rlsys", "hydra_plugins"], cwd=CHECKOUT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {path for path in tracked if not (installed / path).is_file()} == set()
    assert not list(installed.rglob("__pycache__"))


def test_the_launcher_of_sweeps_is_chosen_and_a_run_is_planned_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    planned = python("-m", "rlsys.cli", "plan", "+recipe=grpo_qwen", "cluster=h100_node", cwd=tmp_path, path=installed)
    assert "GPU" in planned
    launch = ("-m", "rlsys.launch", "+recipe=grpo_qwen", "--cfg", "hydra")
    composed = python(*launch, cwd=tmp_path, path=installed)
    assert "hydra_plugins.rlsys_launcher.launcher.RayJobLauncher" in composed


def test_the_recipe_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    arguments = ("+recipe=grpo_qwen", "rollout=torch", "steps=1", "eval.problems=20", "tracker.display=plain")
    python("-m", "rlsys.launch", *arguments, cwd=tmp_path, path=installed)
    assert len(steps_of(only_run(tmp_path))) == 1
