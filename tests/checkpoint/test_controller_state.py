"""The controller's state survives the disk, generators included."""

import random
from pathlib import Path

import numpy as np
import pytest

from rlsys.checkpoint.controller_state import ControllerState, capture_rng, restore_rng
from rlsys.config.errors import UserError


def test_round_trip(tmp_path: Path):
    state = ControllerState(step=7, lineage=2, data={"epoch": 1, "offset": 96}, best_metric=0.5, best_step=5)
    state.write(tmp_path)
    assert ControllerState.read(tmp_path) == state


def test_generators_go_on_where_they_were(tmp_path: Path):
    random.gauss(0, 1)
    np.random.standard_normal()
    ControllerState(step=1, lineage=0, rng=capture_rng()).write(tmp_path)
    expected = [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random()]
    restore_rng(ControllerState.read(tmp_path).rng)
    assert [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random()] == expected


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"step": 1}', '{"step": 1, "lineage": 0, "other": 2}'])
def test_unreadable_state_is_the_users_to_know(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "controller.json").write_text(content)
    with pytest.raises(UserError, match="controller's state"):
        ControllerState.read(tmp_path)
