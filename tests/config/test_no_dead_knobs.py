"""Every leaf of the configuration changes what the code path that it configures does."""

from __future__ import annotations

from pathlib import Path

import pytest
from composing import run_config
from knobs import (  # noqa: F401 - they fill the table
    adapters,
    channels,
    data,
    guards,
    hints,
    reliability,
    replay,
    running,
    steps,
    surroundings,
    training,
)
from knobs.table import TABLE, Bench, Check
from model_folders import make_model_folder

from rlsys.config import build
from rlsys.config import ignored as ignored_keys
from rlsys.config.errors import UserError

LEAVES = sorted(set(build.leaves()))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def bench(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Bench:
    return Bench(tiny_model, tmp_path, monkeypatch, request)


def test_every_leaf_has_a_check() -> None:
    assert sorted(TABLE) == LEAVES, "a new leaf needs an entry in tests/knobs, a removed one loses its own"


# A check that tries several leaves runs once, under the first of them.
CHECKS = {check: [leaf for leaf in TABLE if TABLE[leaf] is check] for check in TABLE.values()}


@pytest.mark.parametrize("check", [pytest.param(c, id="+".join(leaves)) for c, leaves in CHECKS.items()])
def test_the_leaf_changes_what_uses_it(check: Check, bench: Bench) -> None:
    check(bench)


@pytest.mark.parametrize("key", [key for key, *_ in (*ignored_keys._IGNORED, *ignored_keys._IGNORED_ON)])
def test_what_is_said_to_be_ignored_exists(key: str) -> None:
    assert any(key == leaf or key.startswith(f"{leaf}.") or leaf.startswith(f"{key}.") for leaf in LEAVES)


@pytest.mark.parametrize(
    ("overrides", "ignored"),
    [
        (
            ["algorithm.advantage_options.std=none", "algorithm.advantage_options.eps=0.1"],
            "algorithm.advantage_options.eps",
        ),
        (["data=file", "data.path=a", "eval.every=0", "data.eval_path=b"], "data.eval_path"),
        (["data=reasoning_gym", "data.task=a", "eval.every=0", "data.eval_size=5"], "data.eval_size"),
    ],
)
def test_an_override_that_nothing_reads_is_refused(overrides: list[str], ignored: str) -> None:
    with pytest.raises(UserError, match="no effect") as error:
        ignored_keys.refuse_ignored(run_config(*overrides), [override.partition("=")[0] for override in overrides])
    assert error.value.where == ignored


def test_a_memory_limit_of_the_other_kind_of_machine_is_refused() -> None:
    for gpus, ignored, used in (
        (0, "rollout.gpu_memory_fraction", "rollout.kv_cache_gib"),
        (8, "rollout.kv_cache_gib", "rollout.gpu_memory_fraction"),
    ):
        ignored_keys.refuse_ignored_on(gpus, [used, "trainer.lr"])
        with pytest.raises(UserError, match=used) as error:
            ignored_keys.refuse_ignored_on(gpus, [ignored])
        assert error.value.where == ignored
