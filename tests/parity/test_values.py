"""A few draws of each parity case; ``python -m benchmarks.parity`` runs them all."""

from __future__ import annotations

import pytest

from benchmarks.parity.case import Case, errors
from benchmarks.parity.values import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_its_oracle(case: Case, seed: int) -> None:
    if case.oracle.startswith(("verl", "trl")):
        pytest.importorskip("verl.trainer.ppo.core_algos" if case.oracle.startswith("verl") else "trl")
    absolute, relative = errors(case, seed)
    assert absolute <= 1e-5
    assert relative <= 1e-5
