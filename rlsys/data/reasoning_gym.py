"""Tasks of the package reasoning-gym, which generates problems and verifies answers."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import warnings
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import ReasoningGymData
from rlsys.data.base import Dataset, LazyRows, Row

_REDRAWS = 50


def load_reasoning_gym(config: ReasoningGymData) -> Dataset:
    """Training problems are generated as they are drawn; the held-out ones now, each question once.

    Raises:
        UserError: there is no such task, or it does not take the options.
    """
    evaluation = _generator(config, config.eval_size, "eval") if config.eval_size else []
    held_out: dict[str, Row] = {}
    for index in range(config.eval_size):
        entry = evaluation[index]
        held_out.setdefault(entry["question"], _row(config.task, f"eval-{index}", entry))
    training = _TrainingProblems(config, frozenset(held_out))
    return Dataset(LazyRows(config.size, training), list(held_out.values()))


class _TrainingProblems:
    """Problem ``index`` of the training seed; where its question is held out, of the next seed, and so on."""

    def __init__(self, config: ReasoningGymData, held_out: frozenset[str]):
        self._config, self._held_out = config, held_out
        self._generators = [_generator(config, config.size, "train 0")]

    def __call__(self, index: int) -> Row:
        for attempt in range(_REDRAWS):
            if attempt == len(self._generators):
                self._generators.append(_generator(self._config, self._config.size, f"train {attempt}"))
            entry = self._generators[attempt][index]
            if entry["question"] not in self._held_out:
                return _row(self._config.task, f"train-{index}", entry)
        raise UserError(
            f"{self._config.task} has so few different questions that {_REDRAWS} draws in a row are held out",
            where="data.eval_size",
            fix="hold out fewer, or give data.options that make more different questions",
        )


def _row(task: str, name: str, entry: dict[str, Any]) -> Row:
    fields = {"prompt": entry["question"], **entry}
    return Row(name, [{"role": "user", "content": entry["question"]}], fields, f"reasoning-gym {task}, {name}")


def _generator(config: ReasoningGymData, size: int, part: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # syntax warnings of the packages that it imports
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    if config.task not in DATASETS:
        near = difflib.get_close_matches(config.task, DATASETS, n=3)
        raise UserError(
            f"reasoning-gym has no task '{config.task}'",
            where="data.task",
            fix=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(DATASETS))}",
        )
    _check_options(config, [f.name for f in dataclasses.fields(DATASETS[config.task][1])])
    try:
        return reasoning_gym.create_dataset(
            config.task, size=size, seed=_seed(config.task_seed, part), **config.options
        )
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(
            f"{config.task} does not take these options: {error}", where="data.options", fix="change the options"
        ) from error


def _check_options(config: ReasoningGymData, known: list[str]) -> None:
    for name in config.options:
        if name in ("size", "seed"):
            own = "data.size" if name == "size" else "data.task_seed"
            raise UserError(f"'{name}' is no option of the task here", where=f"data.options.{name}", fix=f"set {own}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(
                f"{config.task} has no option '{name}'",
                where=f"data.options.{name}",
                fix=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}",
            )


def _seed(task_seed: int, part: str) -> int:
    """A generator's seed, 0 … 2³¹-1. Problem i is drawn from seed + i, so that seeds must be far apart, not 0, 1, 2, …"""
    digest = hashlib.blake2b(f"{task_seed} {part}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
