"""A checkpoint is whole or refused; the newest is never lost; what goes wrong says what to do."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.errors import UserError


def write(store: CheckpointStore, step: int, metric: float | None = None, lineage: int = 0) -> Path:
    path = store.begin(step)
    (path / "weights.bin").write_bytes(bytes([step % 256]) * 1000)
    (path / "rank0").mkdir()
    (path / "rank0" / "optimiser.bin").write_bytes(b"moments" * 50)
    return store.commit(path, step=step, metric=metric, lineage=lineage, extra={"note": step})


def steps(store: CheckpointStore) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in store.folder.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2, keep_best=True)


def test_a_committed_checkpoint_is_found_and_verified(store: CheckpointStore):
    assert store.latest() is None
    path = write(store, 40, metric=0.5, lineage=3)
    assert path.name == "step-00000040"
    latest = store.latest()
    assert latest is not None
    assert (latest.path, latest.version, latest.metric, latest.extra) == (path, WeightVersion(3, 40), 0.5, {"note": 40})


def test_an_unfinished_one_does_not_exist(store: CheckpointStore):
    write(store, 1)
    partial = store.begin(2)
    (partial / "weights.bin").write_bytes(b"half")
    assert store.latest().step == 1
    reopened = CheckpointStore(store.folder, keep_last=2, keep_best=True)
    assert not partial.exists()
    assert reopened.latest().step == 1


def test_abort_leaves_nothing(store: CheckpointStore):
    path = store.begin(5)
    store.abort(path)
    assert steps(store) == []
    with pytest.raises(ValueError, match="no unfinished checkpoint"):
        store.abort(write(store, 6))


def truncate(path: Path) -> None:
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-1])


def edit(path: Path) -> None:
    content = bytearray((path / "rank0" / "optimiser.bin").read_bytes())
    content[17] ^= 1
    (path / "rank0" / "optimiser.bin").write_bytes(content)


def edit_manifest(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    content["metric"] = 1.0
    (path / "manifest.json").write_text(json.dumps(content))


def truncate_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:100])


DAMAGE = {
    truncate: "weights.bin is truncated (999 bytes, written: 1,000)",
    edit: "rank0/optimiser.bin was edited (SHA-256 ",
    edit_manifest: "manifest.json was edited",
    truncate_manifest: "manifest.json is truncated or edited",
    lambda path: (path / "weights.bin").unlink(): "weights.bin is missing",
    lambda path: (path / "manifest.json").unlink(): "no manifest.json",
    lambda path: (path / "manifest.json").write_text("[]"): "manifest.json is truncated or edited",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_and_the_one_before_offered(store: CheckpointStore, damage):
    before, newest = write(store, 10), write(store, 20)
    damage(newest)
    with pytest.raises(UserError) as refusal:
        store.latest()
    assert DAMAGE[damage] in refusal.value.what
    assert str(newest) in refusal.value.where
    assert f"resume={before}" in refusal.value.fix
    assert str(newest) in refusal.value.fix
    assert store.latest_valid().path == before
    shutil.rmtree(newest)
    assert store.latest().path == before


def test_with_nothing_sound_left_the_error_says_so(store: CheckpointStore):
    for path in (write(store, 10), write(store, 20)):
        truncate(path)
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        store.latest()
    assert store.latest_valid() is None


def test_unlisted_files_do_no_harm(store: CheckpointStore):
    path = write(store, 1)
    (path / "notes.txt").write_text("mine")
    assert store.verify(path).step == 1


@given(st.integers(0, 10_000), st.integers(1, 255))
@example(3492, 41)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_found(store: CheckpointStore, position: int, flip: int):
    path = write(store, 7)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = files[position % len(files)]
    before = file.read_bytes()
    content = bytearray(before)
    content[position % len(content)] ^= flip
    # A blank of the manifest turned into a tab is the same manifest: its checksum is that of its content.
    assume(file.name != "manifest.json" or bytes(content).split() != before.split())
    file.write_bytes(content)
    with pytest.raises(UserError):
        store.verify(path)


def test_the_newest_and_the_best_stay(store: CheckpointStore):
    for step, metric in [(1, 0.2), (2, 0.9), (3, 0.4), (4, None), (5, float("nan")), (6, 0.5)]:
        write(store, step, metric)
    assert steps(store) == [2, 5, 6]
    assert store.best().step == 2


def test_of_equal_metrics_the_newest_is_best(store: CheckpointStore):
    for step in range(1, 6):
        write(store, step, 0.7)
    assert store.best().step == 5
    assert steps(store) == [4, 5]


@given(
    st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=6),
    st.integers(1, 4),
    st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_pruning_keeps_exactly_what_it_promises(tmp_path_factory, metrics, keep_last: int, keep_best: bool):
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep_last, keep_best)
    for step, metric in enumerate(metrics):
        write(store, step, metric)
    kept = steps(store)
    newest = list(range(len(metrics)))[-keep_last:]
    assert set(newest) <= set(kept)
    assert len(kept) <= keep_last + keep_best
    known = [metric for metric in metrics if metric is not None]
    if keep_best and known:
        assert store.best().metric == max(known)


def test_without_keep_best_only_the_newest_stay(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep_last=1, keep_best=False)
    for step, metric in [(1, 0.9), (2, 0.1)]:
        write(store, step, metric)
    assert steps(store) == [2]


def test_a_new_lineage_is_newer_than_abandoned_later_steps(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep_last=3, keep_best=False)
    for step in (20, 40):
        write(store, step, lineage=1)
    write(store, 30, lineage=2)
    assert store.latest().version == WeightVersion(2, 30)
    write(store, 40, lineage=2)
    assert store.latest().version == WeightVersion(2, 40)
    assert steps(store) == [20, 30, 40]


def test_a_crash_while_replacing_loses_nothing(store: CheckpointStore):
    final = write(store, 40, lineage=1)
    final.rename(final.with_name(".replaced-" + final.name))  # the first of the two renames happened
    store.begin(40)
    assert CheckpointStore(store.folder, 2, True).latest().version == WeightVersion(1, 40)


def test_a_folder_that_cannot_be_made_is_the_users_to_fix(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"is a file, not a folder"):
        CheckpointStore(tmp_path / "file" / "checkpoints", 1, True)


def test_a_full_disk_keeps_the_earlier_checkpoint(store: CheckpointStore):
    write(store, 1)
    path = store.begin(2)
    (path / "weights.bin").write_bytes(b"x")
    (path / f".partial-{os.getpid()}-manifest.json").symlink_to("/dev/full")  # writes to it fail as on a full disk
    with pytest.raises(UserError, match="the disk is full"):
        store.commit(path, step=2)
    store.abort(path)
    assert store.latest().step == 1
