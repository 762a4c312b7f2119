"""Where a resumed run goes on: its folder, a verified checkpoint, and the controller's state there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rlsys.batch.versions import WeightVersion
from rlsys.checkpoint.controller_state import ControllerState
from rlsys.checkpoint.store import CheckpointStore
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.tracking.metrics import read_metrics
from rlsys.tracking.run import RunFolder, find_abandoned, resolve_resume
from rlsys.tracking.secrets import mask

# What may differ from the run that is resumed. Only `steps` changes what the remaining steps compute: a schedule with
# an end is stretched to the new one.
_FREE = (
    "resume",
    "steps",
    "run_root",
    "tracker",
    "deadlines",
    "health",
    "time_limit_minutes",
    "trainer.backend",
    "trainer.ranks",
    "trainer.shard_ranks",
    "trainer.sequence_ranks",
    "trainer.micro_batch_tokens",
    "trainer.offload",
    "rollout.workers",
    "rollout.tensor_parallel",
    "rollout.pipeline_parallel",
    "rollout.gpu_memory_fraction",
    "rollout.kv_cache_gib",
    "rollout.max_concurrent",
    "cluster",
    "checkpoint",
    "reward.workers",
    "reward.timeout_s",
)


@dataclass(frozen=True)
class Origin:
    """folder: of the run; checkpoint: verified, None for its beginning; state: of the controller, in the lineage that
    now begins."""

    folder: RunFolder
    checkpoint: Path | None
    state: ControllerState


def find_origin(config: RunConfig) -> Origin | None:
    """What ``config.resume`` asks for; None for a new run.

    Raises:
        UserError: no such run, a damaged checkpoint (the one before it is offered), or a config that would compute
            something else than the run did.
    """
    point = resolve_resume(config.resume, Path(config.run_root), config.name)
    if point is None:
        return None
    store = CheckpointStore(point.run.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best)
    checkpoint = store.latest() if point.checkpoint is None else store.verify(point.checkpoint)
    if checkpoint is None:
        if config.resume == "auto":
            return None  # it was stopped before its first checkpoint: nothing to go on from
        raise UserError("the run has no checkpoint", where=str(point.run.path), fix="leave resume out for a new run")
    _check_same(config, point.run)
    state = ControllerState.read(checkpoint.path)
    return Origin(point.run, checkpoint.path, replace(state, lineage=_lineage(point.run, store, checkpoint.version)))


def folders_left(config: RunConfig, folder: Path) -> list[Path]:
    """Where a driver before this one has written down its processes: the run's own folder, and with ``resume=auto``
    the newest that was given up, which has nothing to go on from where it had no checkpoint yet."""
    other = find_abandoned(Path(config.run_root), config.name) if config.resume == "auto" else None
    return [folder, *([other] if other is not None else [])]


def last_origin(folder: RunFolder, config: RunConfig, beginning: ControllerState) -> Origin:
    """Where a run whose job broke off goes on, in this same process: its newest checkpoint, or its beginning.

    Args:
        beginning: the state that the run would begin with.

    Raises:
        UserError: the newest checkpoint is damaged.
    """
    store = CheckpointStore(folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_best)
    checkpoint = store.latest()
    if checkpoint is None:
        begun = WeightVersion(beginning.lineage, beginning.step)
        return Origin(folder, None, replace(beginning, lineage=_lineage(folder, store, begun)))
    state = ControllerState.read(checkpoint.path)
    return Origin(folder, checkpoint.path, replace(state, lineage=_lineage(folder, store, checkpoint.version)))


def _lineage(run: RunFolder, store: CheckpointStore, version: WeightVersion) -> int:
    """The lineage of the checkpoint's version, or a new one where the run had gone past it: weights of its later steps
    may have been used, and must not be taken for those that are now computed."""
    lines = read_metrics(run.metrics) if run.metrics.exists() else []
    last = lines[-1] if lines else {"lineage": 0, "step": 0}
    newest = max([WeightVersion(last["lineage"], last["step"]), *store.versions()])
    return version.lineage if version >= newest else newest.lineage + 1


def _check_same(config: RunConfig, run: RunFolder) -> None:
    before = dict(_leaves(yaml.safe_load(run.config.read_text(encoding="utf-8"))))
    now = dict(_leaves(mask(asdict(config))))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not any(key == free or key.startswith(free + ".") for free in _FREE)
    ]
    if changed:
        key = changed[0]
        raise UserError(
            f"the run was made with {key}={before.get(key)!r}, not {now.get(key)!r}"
            + (f" (and {len(changed) - 1} more keys differ: {', '.join(changed[1:6])})" if changed[1:] else ""),
            where=str(run.config),
            fix="resume with the keys that the run was started with, or leave resume out for a new run",
        )


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
