"""The checkpoints of one run: written beside and renamed, sealed by a manifest, verified before loading, pruned.

A run never goes on silently from an older checkpoint than its newest: :meth:`CheckpointStore.latest` refuses a damaged
one, names the newest sound one before it, and leaves the choice to the user.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint import manifest as manifests
from rlsys.checkpoint.atomic import PARTIAL, clear_leftovers, move_into_place, writing
from rlsys.config.errors import UserError

_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A finished checkpoint. metric: higher is better; extra: what its writer wanted known."""

    path: Path
    version: WeightVersion
    metric: float | None
    extra: dict[str, Any]

    @property
    def step(self) -> int:
        return self.version.step


class CheckpointStore:
    """Folders ``step-00000040/`` under ``folder``. One process owns the store (the controller); others only fill the
    folder that :meth:`begin` returned.

    Newest means the highest (lineage, step): after going back to an older checkpoint, what the new lineage writes is
    newer than the abandoned checkpoints of later steps.

    Args:
        folder: made if it is missing; leftovers of an interrupted write are removed from it.
        keep_last: how many of the newest stay.
        keep_best: the one with the best metric stays too (of equals the newest).

    Raises:
        UserError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, keep_last: int, keep_best: bool):
        if keep_last < 1:
            raise ValueError("the newest checkpoint always stays: keep_last must be at least 1")
        self.folder = Path(folder).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        with writing("the folder of checkpoints", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of ``step`` into, until :meth:`commit` or :meth:`abort`."""
        partial = self.folder / f"{PARTIAL}step-{step:08d}"
        with writing(f"the checkpoint of step {step}", partial):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
        return partial

    def commit(
        self,
        path: Path,
        *,
        step: int,
        metric: float | None = None,
        lineage: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Seals what was written into ``path``, moves it into place (over a checkpoint of the same step) and prunes.

        Args:
            path: what :meth:`begin` returned; every writer is done with it.
            step: training steps behind it.
            metric: higher is better; None or NaN: not evaluated.
            lineage: of the weights.
            extra: JSON content for the manifest.

        Returns:
            The checkpoint's final folder.

        Raises:
            UserError: the disk is full or the folder cannot be written to; earlier checkpoints are untouched.
        """
        final = self.folder / f"step-{step:08d}"
        known = None if metric is None or math.isnan(metric) else float(metric)
        with writing(f"the checkpoint of step {step}", final):
            manifests.seal(path, step=step, lineage=lineage, metric=known, extra=extra or {})
            move_into_place(path, final)
            self._prune()
        return final

    def abort(self, path: Path) -> None:
        """Removes a folder that :meth:`begin` returned and that will not be finished."""
        if path.parent != self.folder or not path.name.startswith(PARTIAL):
            raise ValueError(f"{path} is no unfinished checkpoint of this store")
        shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def verify(path: Path) -> Checkpoint:
        """Checks every file of the checkpoint at ``path`` against its manifest.

        Raises:
            UserError: no finished checkpoint, or a damaged one; names the files, with what was expected and found.
        """
        manifest = manifests.read(path)
        manifests.check_files(path, manifest)
        return _checkpoint(path, manifest)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, verified; None where there is none yet.

        Raises:
            UserError: the newest one is damaged; the error offers the newest sound one before it.
        """
        candidates = self._newest_first()
        if not candidates:
            return None
        try:
            return self.verify(candidates[0])
        except UserError as error:
            before = self._first_sound(candidates[1:])
            raise UserError(error.what, where=error.where, fix=_how_to_go_on(candidates[0], before)) from error

    def latest_valid(self) -> Checkpoint | None:
        """The newest checkpoint that passes verification, however many damaged ones are newer."""
        return self._first_sound(self._newest_first())

    def best(self) -> Checkpoint | None:
        """The checkpoint with the highest metric, of equals the newest; by the manifests, without hashing files."""
        return _best(self._readable())

    def versions(self) -> list[WeightVersion]:
        """Of all finished checkpoints, oldest first; by the manifests, without hashing files."""
        return [checkpoint.version for checkpoint in self._readable()]

    def _first_sound(self, candidates: list[Path]) -> Checkpoint | None:
        for path in candidates:
            try:
                return self.verify(path)
            except UserError:
                continue
        return None

    def _folders(self) -> dict[Path, int]:
        """Finished checkpoints and the step in their name."""
        found = {path: _FOLDER.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir()}
        return {path: int(match[1]) for path, match in found.items() if match}

    def _readable(self) -> list[Checkpoint]:
        """Checkpoints with a sound manifest, oldest first."""
        readable = []
        for path in self._folders():
            try:
                readable.append(_checkpoint(path, manifests.read(path)))
            except UserError:
                continue  # its files may still be worth something to a person: pruning leaves it alone
        return sorted(readable, key=lambda checkpoint: checkpoint.version)

    def _newest_first(self) -> list[Path]:
        """All finished checkpoints. One whose manifest is unreadable counts as of the newest lineage: better refused
        aloud than passed over."""
        readable = {checkpoint.path: checkpoint.version for checkpoint in self._readable()}
        lineage = max((version.lineage for version in readable.values()), default=0)
        versions = {path: readable.get(path, WeightVersion(lineage, step)) for path, step in self._folders().items()}
        return sorted(versions, key=lambda path: versions[path], reverse=True)

    def _prune(self) -> None:
        """Removes what is neither among the newest nor the best. Each folder first leaves its name, so that an
        interrupted removal leaves no checkpoint with half its files."""
        readable = self._readable()
        best = _best(readable) if self._keep_best else None
        for checkpoint in readable[: -self._keep_last]:
            if checkpoint is not best:
                doomed = checkpoint.path.with_name(PARTIAL + checkpoint.path.name)
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed)


def _checkpoint(path: Path, manifest: manifests.Manifest) -> Checkpoint:
    return Checkpoint(path, WeightVersion(manifest.lineage, manifest.step), manifest.metric, manifest.extra)


def _best(oldest_first: list[Checkpoint]) -> Checkpoint | None:
    evaluated = [checkpoint for checkpoint in oldest_first if checkpoint.metric is not None]
    return max(evaluated, key=lambda checkpoint: (checkpoint.metric, checkpoint.version), default=None)


def _how_to_go_on(damaged: Path, before: Checkpoint | None) -> str:
    if before is None:
        return f"no sound checkpoint is left before it; delete {damaged} to start from the beginning"
    return (
        f"go on from the one before it (step {before.step}, verified): resume={before.path}\n"
        f"         or delete {damaged} and use resume=auto"
    )
