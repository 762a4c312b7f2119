"""docs/how-to/choose-an-algorithm.md lists what is registered, and refuses what it says is refused."""

from __future__ import annotations

import re
import shlex
from typing import get_args

import pytest
from composing import composed
from pages import tables, text_of

from rlsys.algorithms.advantages import ADVANTAGES
from rlsys.algorithms.aggregation import Aggregation
from rlsys.algorithms.corrections import CORRECTIONS
from rlsys.algorithms.divergences import DIVERGENCES
from rlsys.algorithms.filters import GROUP_FILTERS
from rlsys.algorithms.kl import KLEstimator
from rlsys.algorithms.losses import POLICY_LOSSES
from rlsys.algorithms.preferences import PREFERENCE_LOSSES
from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import overridden_keys
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored
from rlsys.controller.trial import try_out

PAGE = "how-to/choose-an-algorithm.md"
KNOWN = {
    "Advantages": ADVANTAGES.names(),
    "Policy losses": POLICY_LOSSES.names(),
    "Aggregations": get_args(Aggregation),
    "KL to the reference": get_args(KLEstimator),
    "Rollout corrections": CORRECTIONS.names(),
    "Group filters": GROUP_FILTERS.names(),
    "Divergences": DIVERGENCES.names(),
    "Preference losses": PREFERENCE_LOSSES.names(),
}


def names(page: str, heading: str) -> list[str]:
    return [cells[0].strip("`") for cells in tables(page, heading)[0]]


@pytest.mark.parametrize("heading", KNOWN)
def test_every_name_is_listed_once_and_no_other(heading: str) -> None:
    assert sorted(names(PAGE, heading)) == sorted(KNOWN[heading])


@pytest.mark.parametrize(
    ("page", "heading", "of"),
    [
        ("how-to/self-distillation.md", "Divergences", "Divergences"),
        ("how-to/preferences.md", "Losses", "Preference losses"),
    ],
)
def test_the_channels_pages_list_theirs(page: str, heading: str, of: str) -> None:
    assert sorted(names(page, heading)) == sorted(KNOWN[of])


def test_every_recipe_is_listed() -> None:
    rows = re.findall(r"^\| `(\w+_qwen)` \|", text_of(PAGE), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (asset("configs") / "recipe").glob("*.yaml"))


@pytest.mark.parametrize("overrides", [cells[0].strip("`") for cells in tables(PAGE, "What is refused")[0]])
def test_what_is_said_to_be_refused_is_refused(overrides: str) -> None:
    words = shlex.split(overrides)
    with pytest.raises(UserError) as refused:
        refuse(words)
    assert not re.match(
        "there is no (such key|.* called)", refused.value.what
    )  # for a reason, not for a slip of the page


def refuse(overrides: list[str]) -> None:
    """What a run does before it starts anything."""
    config = build(composed(*overrides))
    refuse_ignored(config, overridden_keys(overrides))
    try_out(config)


def test_and_what_is_not_is_not() -> None:
    refuse(["algorithm.advantage=rloo", "algorithm.loss=cispo", "algorithm.correction.veto={}"])
