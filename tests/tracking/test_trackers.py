"""Trackers record what they are given, and none of them can stop a run."""

import math
import sys
from pathlib import Path

import pytest

from rlsys.config.errors import UserError
from rlsys.tracking.trackers import TRACKERS, TrackerSet
from rlsys.tracking.trackers.wandb import has_credentials

CONFIG = {"name": "grpo", "tracker": {"project": "tests"}}
SUMMARY = {"status": "finished", "steps": 2, "eval/final_accuracy": 0.9}


class Recorder:
    """A user's own tracker, found by its import path."""

    calls: list = []  # noqa: RUF012 - looked at by the tests

    def start(self, config, folder):
        self.calls.append("start")
        return "look here"

    def log(self, metrics, step):
        self.calls.append((step, dict(metrics)))

    def finish(self, summary):
        self.calls.append("finish")


class FailsAtLog(Recorder):
    def log(self, metrics, step):
        raise ConnectionError("no network")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path under which this module's classes are found."""
    monkeypatch.setitem(sys.modules, "my_trackers", sys.modules[__name__])
    monkeypatch.setattr(Recorder, "calls", [])
    return "my_trackers"


def test_the_two_are_there():
    assert {"tensorboard", "wandb"} <= set(TRACKERS.names())


def test_an_unknown_tracker_is_refused_before_anything_starts():
    with pytest.raises(UserError, match="wandbb") as refusal:
        TrackerSet(["wandbb"], print)
    assert "'wandb'" in refusal.value.fix


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find_spec(name))
    with pytest.raises(UserError, match=package) as refusal:
        TrackerSet([package], print)
    assert "rlsys[tracking]" in refusal.value.fix


def test_one_that_fails_is_reported_once_and_the_others_go_on(own: str, tmp_path: Path):
    reports: list[str] = []
    trackers = TrackerSet([f"{own}.FailsAtLog", f"{own}.Recorder"], reports.append)
    trackers.start(CONFIG, tmp_path)
    for step in (1, 2):
        trackers.log({"x": 0.5}, step)
    trackers.finish(SUMMARY)
    assert Recorder.calls == ["start", "start", (1, {"x": 0.5}), (2, {"x": 0.5}), "finish"]
    failures = [report for report in reports if "no network" in report]
    assert len(failures) == 1
    assert "FailsAtLog" in failures[0]
    assert f"{own}.Recorder: look here" in reports


def test_an_interrupt_is_not_swallowed(own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "log", interrupted)
    trackers = TrackerSet([f"{own}.Recorder"], print)
    with pytest.raises(KeyboardInterrupt):
        trackers.log({}, 1)


def test_tensorboard_can_be_read_back_and_a_resumed_run_replaces(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, offset in (((1, 2, 3), 0.0), ((2, 3), 10.0)):
        trackers = TrackerSet(["tensorboard"], print)
        trackers.start(CONFIG, tmp_path)
        for step in steps:
            trackers.log({"reward/mean": step + offset, "bad": math.nan}, step)
        trackers.finish(SUMMARY)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert values == [(1, 1.0), (2, 12.0), (3, 13.0)]


@pytest.mark.parametrize("mode", [None, "online", "offline"])
def test_wandb_records_offline_without_asking_for_a_key(
    mode: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    reports: list[str] = []
    trackers = TrackerSet(["wandb"], reports.append)
    trackers.start(CONFIG, tmp_path)
    trackers.log({"reward/mean": 0.5}, 1)
    trackers.finish(SUMMARY)
    assert len(reports) == 1
    assert reports[0].startswith("wandb: recording offline")
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_credentials_are_looked_for_where_wandb_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_credentials()
    netrc.write_text("machine api.wandb.ai login user password x\n")
    netrc.chmod(0o600)
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_credentials()
