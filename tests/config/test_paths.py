"""Names that a file gives do not lead out of its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlsys.checkpoint import manifest as checkpoints
from rlsys.config.errors import UserError
from rlsys.config.paths import inside
from rlsys.data.manifest import NAME, differences, read_manifest, write_manifest


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a\0b", "a/.."])
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leads out"):
        inside(tmp_path, name, where="an index")


@pytest.mark.parametrize("name", ["a", "a/b.safetensors", "..a", "a..b/c"])
def test_a_name_within_is_taken(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name, where="an index") == tmp_path / name


def test_a_checkpoint_that_lists_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model").write_text("x")
    sealed = checkpoints.seal(folder, step=1, lineage=0, metric=None, extra={})
    moved = replace(sealed, files={"../outside": sealed.files["model"]})
    with pytest.raises(UserError, match="leads out"):
        checkpoints.check_files(folder, moved)


def test_a_data_manifest_that_lists_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "rows").write_text("x")
    write_manifest(folder, {"rows": 1}, fixture=False)
    path = folder / NAME
    path.write_text(path.read_text().replace('"rows": {', '"../outside": {'))
    found = read_manifest(folder)
    assert found is not None
    with pytest.raises(UserError, match="leads out"):
        differences(folder, found)
