"""The controller's state survives the disk."""

from pathlib import Path

import pytest

from rlsys.checkpoint.controller_state import ControllerState
from rlsys.config.errors import UserError


def test_round_trip(tmp_path: Path):
    state = ControllerState(step=7, lineage=2, data={"epoch": 1, "offset": 96})
    state.write(tmp_path)
    assert ControllerState.read(tmp_path) == state


@pytest.mark.parametrize("content", [None, "{", "[1]", '{"step": 1}', '{"step": 1, "lineage": 0, "other": 2}'])
def test_unreadable_state_is_the_users_to_know(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "controller.json").write_text(content)
    with pytest.raises(UserError, match="controller's state"):
        ControllerState.read(tmp_path)
