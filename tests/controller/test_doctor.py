"""Preflight before a run, and ``rlsys doctor``: everything that is wrong is named at once, and nothing is started."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import ray
from composing import run_config
from model_folders import make_model_folder
from running import write_jsonl

from rlsys import cli, launch
from rlsys.cluster.preflight import nodes
from rlsys.cluster.preflight.machine import look
from rlsys.cluster.preflight.report import NAME, SCHEMA_FILE
from rlsys.cluster.session import Session
from rlsys.cluster.topology import found
from rlsys.config.errors import UserError
from rlsys.controller.doctor import check_cluster, preflight
from rlsys.tracking.run import RunFolder

SMALL = ("rollout=torch", "eval.every=0", "data=file", "data.max_prompt_tokens=16", "data.max_response_tokens=8")
ROWS = [{"prompt": "1+1=", "answer": "2"}] * 4


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    """Of a run that could begin here."""
    make_model_folder(tmp_path / "model")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    return ["+recipe=grpo_qwen", *SMALL, "model.path=model", "data.path=train.jsonl"]


def examined(*arguments: str) -> tuple[int, dict[str, str]]:
    """Exit code, and where each code was found."""
    status = cli.main(["doctor", *arguments, "--json", "out/report.json"])
    content = json.loads(Path("out/report.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    assert content["ok"] == (status == 0)
    return status, {issue["code"]: issue["where"] for issue in content["issues"] if issue["severity"] == "error"}


def test_a_sound_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert examined("--bandwidth") == (0, {})
    said = capsys.readouterr().out
    assert "nothing stands against a run" in said
    assert "disk rates" in said


def test_a_run_that_could_begin(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert examined(*overrides) == (0, {})
    assert "training rows 4" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_everything_that_is_wrong_is_named(overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("train.jsonl").write_text("no JSON")
    Path("taken").write_text("")
    broken = ["algorithm.loss=ppo_klip", "model.path=/nowhere", "run_root=taken/runs", "rollout.environment=chess"]
    broken += ["cluster=ray", "cluster.address=127.0.0.1:1"]
    status, wrong = examined(*overrides, *broken)
    assert status == 2
    assert wrong.keys() == {
        "algorithm_unusable",
        "environment_unusable",
        "model_unusable",
        "data_unusable",
        "run_folder_blocked",
        "ray_unreachable",
    }
    assert wrong["algorithm_unusable"] == "algorithm.loss"
    said = capsys.readouterr().out
    assert "did you mean 'ppo_clip'" in said
    assert "6 errors" in said


def test_a_configuration_that_cannot_be_composed_does_not_hide_the_machine() -> None:
    status, wrong = examined("+recipe=grpo_qwen", "trainer.lerning_rate=1")
    assert status == 2
    assert list(wrong) == ["configuration_unusable"]


def test_a_run_names_all_errors_and_leaves_nothing_behind(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("taken").write_text("")
    Path("train.jsonl").unlink()
    before = sorted(Path().rglob("*"))
    assert launch.main([*overrides, "run_root=taken/runs", "cluster=ray", "cluster.address=127.0.0.1:1"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("error:") == 1
    for text in ("no such file", "data.path", "a file, not a folder", "run_root", "no Ray cluster answers"):
        assert text in said
    assert sorted(Path().rglob("*")) == before


def test_a_run_goes_on_only_with_its_data(overrides: list[str], tmp_path: Path) -> None:
    config = run_config(*overrides[1:])
    started = tmp_path / "runs" / "started"
    started.mkdir(parents=True)
    preflight(config).report.write(started)
    resumed = replace(config, resume=str(started))
    assert preflight(resumed).report.ok
    write_jsonl(tmp_path / "train.jsonl", [*ROWS[1:], {"prompt": "2+2=", "answer": "4"}])
    with pytest.raises(UserError, match="was started with another content") as error:
        preflight(resumed)
    assert error.value.where == "data.path=train.jsonl"


def test_a_run_that_is_being_written_hides_nothing_else(overrides: list[str], tmp_path: Path) -> None:
    config = run_config(*overrides[1:])
    with RunFolder.create(tmp_path / "runs", config.name, config) as run:
        (run.checkpoints / "step-00000001").mkdir()
        status, wrong = examined(*overrides, "resume=auto", "algorithm.loss=ppo_klip")
    assert status == 2
    assert wrong == {"algorithm_unusable": "algorithm.loss", "run_unusable": str(run.path)}


def test_what_does_not_fit_is_refused_before_anything_is_started(overrides: list[str]) -> None:
    config = run_config(*overrides[1:], "trainer.ranks=2")
    crowded = replace(look(), gpus=(), memory_available=1 << 20)
    with pytest.raises(UserError, match=r"needs at least .* GiB on this machine"):
        preflight(config, crowded)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_node_is_asked(overrides: list[str], tmp_path: Path) -> None:
    config = run_config(*overrides[1:])
    preflight(config).report.write(tmp_path)
    session = Session(found(ray.nodes()), local=True, logs="")
    check_cluster(config, session, tmp_path)
    check_cluster(config, session, tmp_path)  # after a host was lost: once more, not once more beside
    content = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    assert [p["name"] for p in content["probes"]].count("nodes") == 1
    facts = {probe["name"]: probe["facts"] for probe in content["probes"]}
    (node,) = facts["nodes"]["nodes"].values()
    assert node["cores"] == look().cores
    (ahead,) = facts["clocks"]["ahead_s"].values()
    assert abs(ahead) < 1
    other = replace(look(), packages={**look().packages, "torch": "1.0"})
    differing = nodes.look_at(ray.nodes())
    issues = [i for _, i in nodes.run_probes(nodes.probes_of(differing, other, nodes.Link())).issues]
    assert [(i.code, i.where, i.severity) for i in issues] == [("version_differs", "torch", "error")]
