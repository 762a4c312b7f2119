"""More or fewer samplers while a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlsys import cli
from rlsys.cluster.placement import ActorSpec
from rlsys.controller.scaling import FILE, Scaling


class Samplers:
    """Stands for a fleet: who is there, and who has been asked to leave."""

    def __init__(self, count: int, gpus: float = 0.0):
        self.specs = {i: ActorSpec("rollout", i, gpus=gpus, bundle=i, node=f"node{i}") for i in range(count)}
        self.gone: list[int] = []

    def join(self, spec: ActorSpec) -> None:
        assert spec.index not in self.specs
        self.specs[spec.index] = spec

    def leave(self, index: int) -> None:
        self.gone.append(index)

    def leaving(self) -> list[int]:
        return self.gone

    def next_index(self) -> int:
        return max(self.specs) + 1


def scaled(run: Path, samplers: Samplers, *, free: float = 0.0, fixed: str | None = None) -> list[str]:
    said: list[str] = []
    Scaling(run, samplers, lambda: samplers.specs, lambda: free, said.append, fixed).look()
    return said


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    return tmp_path


def test_samplers_join_behind_the_last_one_and_anywhere(run: Path) -> None:
    samplers = Samplers(2)
    assert cli.main(["scale", str(run), "4"]) == 0
    assert scaled(run, samplers) == []
    assert [samplers.specs[i].index for i in sorted(samplers.specs)] == [0, 1, 2, 3]
    assert samplers.specs[3].bundle is None
    assert samplers.specs[3].node is None
    assert scaled(run, samplers) == [], "a wish is granted once"
    assert not (run / FILE).exists()


def test_the_last_ones_leave_and_one_always_stays(run: Path) -> None:
    samplers = Samplers(3)
    cli.main(["scale", str(run), "2"])
    scaled(run, samplers)
    assert samplers.gone == [2]
    cli.main(["scale", str(run), "1"])
    scaled(run, samplers)
    assert samplers.gone == [2, 1]


def test_as_many_join_as_there_are_free_gpus(run: Path) -> None:
    samplers = Samplers(1, gpus=2.0)
    cli.main(["scale", str(run), "4"])
    (said,) = scaled(run, samplers, free=5.0)
    assert sorted(samplers.specs) == [0, 1, 2]
    assert "1 of 3 samplers cannot join: 5 GPUs are free, each takes 2" in said


def test_samplers_that_take_turns_stay_as_many(run: Path) -> None:
    samplers = Samplers(1)
    cli.main(["scale", str(run), "2"])
    assert scaled(run, samplers, fixed="they take turns") == ["the number of samplers stays: they take turns"]
    assert sorted(samplers.specs) == [0]


def test_a_wish_that_is_none_is_named_and_taken_away(run: Path) -> None:
    (run / FILE).write_text('{"rollout_workers": "many"}')
    (said,) = scaled(run, Samplers(1))
    assert "rlsys scale" in said
    assert not (run / FILE).exists()


@pytest.mark.parametrize(
    ("ended", "workers", "words"), [(True, "2", "the run has ended"), (False, "0", "cannot sample with 0 workers")]
)
def test_bad_input_is_one_error(
    ended: bool, workers: str, words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if ended:
        (run / "summary.json").touch()
    assert cli.main(["scale", str(run), workers]) == 2
    assert words in capsys.readouterr().err
    assert cli.main(["scale", str(run / "nothing"), "1"]) == 2
