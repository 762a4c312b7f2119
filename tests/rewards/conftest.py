"""What the tests of rewards share."""

from __future__ import annotations

import pytest

from rlsys.config.errors import UserError
from rlsys.rewards.sandbox import check_namespaces


@pytest.fixture
def namespaces() -> None:
    """Skips where bubblewrap does not work."""
    try:
        check_namespaces()
    except UserError as error:
        pytest.skip(error.what)
