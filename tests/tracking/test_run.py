"""A run folder is unique, holds no secret, survives a crash, and is found again."""

import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlsys.config.errors import UserError
from rlsys.tracking.metrics import history, read_lines, read_metrics
from rlsys.tracking.run import RunFolder, find_latest, resolve_resume

NOON = datetime(2026, 1, 31, 12, 0, 0)


def make(root: Path, name: str = "grpo", now: datetime = NOON, **config: object) -> RunFolder:
    return RunFolder.create(root, name, {"name": name, **config}, now=now)


def test_folder_holds_config_and_environment(tmp_path: Path):
    with make(tmp_path / "new" / "runs", "my run/1", steps=3) as run:
        assert run.path.name == "20260131-120000-my-run-1"
        assert yaml.safe_load(run.config.read_text())["steps"] == 3
        environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["cpu_count"] >= 1
    assert {"git", "python", "platform", "command"} <= set(environment)


def checkpointed(run: RunFolder) -> Path:
    """Ends the run after its first checkpoint; its folder."""
    (run.checkpoints / "step-00000001").mkdir()
    run.close()
    return run.path


def test_a_folder_that_a_live_run_writes_into_is_not_opened_twice(tmp_path: Path):
    run = make(tmp_path)
    with pytest.raises(UserError, match="another process is writing"):
        RunFolder.open(run.path)
    run.close()
    RunFolder.open(run.path).close()


def test_two_runs_in_one_second_have_folders_of_their_own(tmp_path: Path):
    paths = [checkpointed(make(tmp_path)) for _ in range(3)]
    assert len(set(paths)) == 3
    assert find_latest(tmp_path, "grpo").path == paths[-1]


def test_a_root_that_cannot_be_made_is_the_users_to_fix(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the run folder could not be written") as refusal:
        make(tmp_path / "file" / "runs")
    assert "file" in refusal.value.where


def test_secrets_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "value-of-the-key")
    monkeypatch.setattr("sys.argv", ["rlsys", "tracker.api_key=value-of-the-key", "--token", "value-of-the-key", "x=1"])
    run = make(
        tmp_path,
        tracker={"api_key": "value-of-the-key"},
        hub=["https://me:value-of-the-key@host/x", "hf_" + "a" * 20],
        max_prompt_tokens=7,
        stop_token="<end>",
    )
    written = "".join(path.read_text() for path in run.path.iterdir() if path.is_file())
    assert "value-of-the-key" not in written
    assert "hf_aaaa" not in written
    config = yaml.safe_load(run.config.read_text())
    assert config["max_prompt_tokens"] == 7
    assert config["hub"][0] == "https://***@host/x"
    assert "x=1" in json.loads((run.path / "environment.json").read_text())["command"]


def test_metrics_come_back_as_numbers(tmp_path: Path):
    with make(tmp_path) as run:
        run.log_metrics(
            {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": 3, "bad": math.nan, "worse": math.inf},
            step=1,
            lineage=0,
        )
        text = run.metrics.read_text()
        with pytest.raises(TypeError, match="'d'"):
            run.log_metrics({"d": "text"}, step=2, lineage=0)
    raw = json.loads(text, parse_constant=pytest.fail)
    assert raw["bad"] is None
    assert raw["nonfinite"] == ["bad", "worse"]
    (line,) = read_metrics(run.metrics)
    assert (line["step"], line["a"], line["b"], line["c"]) == (1, 0.5, 2.0, 3)
    assert math.isnan(line["bad"])


def test_a_torn_last_line_is_tolerated_and_gone_after_resuming(tmp_path: Path):
    run = make(tmp_path)
    for step in (1, 2):
        run.log_metrics({"x": step}, step=step, lineage=0)
    run.close()
    whole = run.metrics.read_text()
    run.metrics.write_text(whole[:-20])
    assert [line["step"] for line in read_metrics(run.metrics)] == [1]
    with RunFolder.open(run.path) as again:
        again.log_metrics({"x": 5}, step=2, lineage=1)
    assert [line["x"] for line in read_metrics(run.metrics)] == [1, 5]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lineage": 0}\n{"step": 2\n{"step": 3, "lineage": 0}\n')
    with pytest.raises(UserError) as refusal:
        read_lines(path)
    assert refusal.value.where.endswith("metrics.jsonl:2")
    with pytest.raises(UserError, match="cannot be read"):
        read_metrics(tmp_path / "absent.jsonl")


def line(step: int, lineage: int, **metrics: float) -> dict:
    return {"step": step, "lineage": lineage, **metrics}


def test_work_abandoned_by_a_resume_is_left_out():
    lines = [line(s, 0, x=0) for s in range(1, 8)] + [line(s, 1, x=1) for s in (4, 5)]
    assert [(e["step"], e["x"]) for e in history(lines)] == [(1, 0), (2, 0), (3, 0), (4, 1), (5, 1)]


def test_an_evaluation_after_the_step_joins_its_line():
    assert history([line(3, 0, x=1.0), line(3, 1, acc=0.5)]) == [line(3, 1, x=1.0, acc=0.5)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=5))
def test_history_is_one_line_a_step_of_the_path_taken(sessions: list[tuple[int, int]]):
    """Sessions (how many steps back a resume goes, how many it then does) against a plain simulation."""
    lines, path, step = [], {}, 0
    for lineage, (back, done) in enumerate(sessions):
        step = max(0, step - back) if lineage else 0
        path = {s: owner for s, owner in path.items() if s <= step}
        for _ in range(done):
            step += 1
            path[step] = lineage
            lines.append(line(step, lineage))
    assert {entry["step"]: entry["lineage"] for entry in history(lines)} == path


def test_events_failures_and_rollouts_are_strict_json(tmp_path: Path):
    with make(tmp_path) as run:
        run.log_event("note", "hello", step=3)
        run.log_failure({"row": {"when": NOON, "x": math.nan}, "error": "boom"})
        path = run.write_rollouts(12, [{"reward": 1.0}, {"reward": math.nan}])
        run.write_rollouts(12, [{"reward": 0.5}])
    assert path.name == "step-000012.jsonl"
    assert path.read_text() == '{"reward": 0.5}\n'
    assert json.loads((run.path / "failures.jsonl").read_text())["row"] == {"when": str(NOON), "x": None}
    event = json.loads((run.path / "events.jsonl").read_text())
    assert (event["kind"], event["text"], event["step"]) == ("note", "hello", 3)
    assert [entry.name for entry in run.rollouts.iterdir()] == ["step-000012.jsonl"]


def test_the_newest_run_of_the_name_is_found(tmp_path: Path):
    assert find_latest(tmp_path / "absent", "grpo") is None
    make(tmp_path, now=NOON.replace(hour=9))
    newest = checkpointed(make(tmp_path))
    checkpointed(make(tmp_path, "grpo-2", now=NOON.replace(hour=15)))
    make(tmp_path, now=NOON.replace(hour=16)).close()  # stopped before its first checkpoint: nothing to go on from
    (tmp_path / "notes").mkdir()
    assert find_latest(tmp_path, "grpo").path == newest
    assert find_latest(tmp_path, "other") is None


def test_resume_means_auto_a_run_or_a_checkpoint(tmp_path: Path):
    assert resolve_resume(None, tmp_path, "grpo") is None
    assert resolve_resume("auto", tmp_path, "grpo") is None
    run = make(tmp_path)
    checkpointed(run)
    assert resolve_resume("auto", tmp_path, "grpo").run.path == run.path
    assert resolve_resume(str(run.path), tmp_path, "grpo").checkpoint is None
    point = resolve_resume(str(run.checkpoints / "step-00000001"), tmp_path, "grpo")
    assert (point.run.path, point.checkpoint) == (run.path, run.checkpoints / "step-00000001")
    with pytest.raises(UserError, match="no such checkpoint"):
        resolve_resume(str(run.checkpoints / "step-00000009"), tmp_path, "grpo")
    with pytest.raises(UserError, match="no run folder"):
        resolve_resume(str(tmp_path), tmp_path, "grpo")
