"""``rlsys profile`` as a user types it: the trace of a whole run, and the metrics that come of the same meters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from running import RUN_S, SMALL, environment, only_run, steps_of

from rlsys import cli

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


class Profiled(NamedTuple):
    folder: Path
    output: str

    def trace(self) -> dict[str, Any]:
        return json.loads((self.folder / "trace.json").read_text())


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    root = tmp_path_factory.mktemp("profile")
    overrides = ("+recipe=grpo_qwen", *SMALL, "rollout=torch", "data.prompts_per_step=4")
    done = subprocess.run(
        [sys.executable, "-m", "rlsys.cli", "profile", *overrides, "--steps", "2"],
        cwd=root, capture_output=True, text=True, timeout=RUN_S, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Profiled(only_run(root), done.stdout)


@pytest.mark.slow
def test_every_actor_and_phase_is_on_one_clock(profiled: Profiled) -> None:
    events = profiled.trace()["traceEvents"]
    actors = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    assert actors.keys() == {"driver", "trainer_0", "rollout_0", "reward_0"}
    timed = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in timed)

    def of(actor: str, kind: str, name: str | None = None) -> list[dict[str, Any]]:
        return [e for e in timed if e["pid"] == actors[actor] and e["cat"] == kind and name in (None, e["name"])]

    steps = of("driver", "step")
    assert [step["name"] for step in steps] == ["step 1", "step 2"]
    assert all(_inside(phase, steps) for phase in of("driver", "phase"))
    assert all(_inside(verb, of("driver", "phase", "update")) for verb in of("trainer_0", "verb", "forward_backward"))
    assert all(_inside(verb, of("driver", "phase", "collect")) for verb in of("rollout_0", "verb", "generate"))
    assert len(of("rollout_0", "verb", "generate")) == 2


@pytest.mark.slow
def test_torchs_operators_lie_inside_the_verbs_of_the_last_step(profiled: Profiled) -> None:
    timed = [e for e in profiled.trace()["traceEvents"] if e["ph"] == "X"]
    last = [e for e in timed if e["name"] == "step 2"]
    for verb, operator in (("forward_backward", "aten::mm"), ("generate", "aten::mm")):
        (span,) = [e for e in timed if e["name"] == verb and _inside(e, last)]
        found = [e for e in timed if e["cat"] == "op" and e["name"] == operator and e["pid"] == span["pid"]]
        assert found
        assert any(_inside(e, [span]) for e in found)
        assert all(_inside(e, last) for e in found)


@pytest.mark.slow
def test_a_table_says_where_the_time_went(profiled: Profiled) -> None:
    for word in ("phase of the loop", "update", "trainer_0", "forward_backward", "idle", "aten::mm", "trace.json"):
        assert word in profiled.output


@pytest.mark.slow
def test_each_step_has_the_metrics(profiled: Profiled) -> None:
    for step in steps_of(profiled.folder):
        assert 0 < step["throughput/mfu"] < 1.5
        assert step["throughput/sampled_tokens_per_s"] > 0
        assert step["throughput/trained_tokens_per_s"] > 0
        shares = {name: value for name, value in step.items() if name.startswith("share/")}
        assert sum(shares.values()) == pytest.approx(1.0, abs=0.02)
        for actor in ("trainer_0", "rollout_0", "reward_0"):
            assert 0 <= step[f"idle/{actor}"] <= 1
        assert step["idle/trainer_0"] < 1
        assert step["memory/trainer_forward_backward_bytes"] > 10 << 20


@pytest.mark.parametrize(
    ("arguments", "says"), [(("steps=5",), "--steps"), (("--steps", "0"), "at least one"), (("nothing=1",), "nothing")]
)
def test_bad_input_is_one_clear_error(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "+recipe=grpo_qwen", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def _inside(event: dict[str, Any], outer: list[dict[str, Any]], slack_us: float = 2000.0) -> bool:
    """slack: operators' clock is torch's, calibrated against the system's once."""
    return any(
        o["ts"] - slack_us <= event["ts"] and event["ts"] + event["dur"] <= o["ts"] + o["dur"] + slack_us for o in outer
    )
