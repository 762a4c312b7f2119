"""Tasks of the package reasoning-gym, by name (Stojanovski et al., 2025, arXiv 2505.24760)."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from rlsys.config.errors import UserError
from rlsys.config.schema import ReasoningGymData
from rlsys.data.base import Dataset, LazyRows, Row, user_row

# Problem i of a generator is seeded with seed + i: held-out ones start further off than any training set is long.
_HELD_OUT_SEED = 1 << 30
_OWN_KEYS = {"size": "data.size"}

Entry = dict[str, Any]


def load_reasoning_gym(config: ReasoningGymData) -> Dataset:
    """Generated problems; held-out ones whose question is asked in training, or twice, are left out.

    Raises:
        UserError: no such task or option, options that the task refuses, or no held-out problem is left.
    """
    seed = config.options.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"a seed is an integer, not {seed!r}", where="data.options.seed", fix="set data.options.seed=0")
    train = _generate(config, config.size, seed)
    seen = {entry["question"] for entry in train}
    held_out: list[Entry] = []
    for entry in _generate(config, config.eval_size, seed + _HELD_OUT_SEED) if config.eval_size else ():
        if entry["question"] not in seen:
            seen.add(entry["question"])
            held_out.append(entry)
    if config.eval_size and not held_out:
        raise UserError(
            f"every question of '{config.task}' that was to be held out is also asked in training",
            where="data.eval_size",
            fix="lower data.size, widen data.options, or set data.eval_size=0",
        )
    return Dataset(_rows(config.task, "train", train), _rows(config.task, "eval", held_out))


def _rows(task: str, split: str, entries: list[Entry]) -> LazyRows:
    def row(place: int) -> Row:
        row_id, entry = f"{task}-{split}-{place}", entries[place]
        answer, metadata = entry["answer"], json_like(entry["metadata"])
        # The verifier that scores the answer is found by the metadata's source_dataset.
        return user_row(row_id, entry["question"], {"answer": answer, "metadata": metadata}, row_id)

    return LazyRows(len(entries), row)


def _generate(config: ReasoningGymData, size: int, seed: int) -> list[Entry]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # syntax warnings of the packages that it imports
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    if config.task not in DATASETS:
        raise UserError(
            f"reasoning-gym has no task '{config.task}'", where="data.task", fix=_nearest(config.task, DATASETS)
        )
    known = {field.name for field in fields(DATASETS[config.task][1])} - _OWN_KEYS.keys()
    for name in config.options:
        if name in _OWN_KEYS:
            raise UserError(f"'{name}' is not set here", where=f"data.options.{name}", fix=f"set {_OWN_KEYS[name]}")
        if name not in known:
            raise UserError(
                f"the task '{config.task}' has no option '{name}'",
                where=f"data.options.{name}",
                fix=_nearest(name, known),
            )
    try:
        return list(reasoning_gym.create_dataset(config.task, **(config.options | {"size": size, "seed": seed})))
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as error:  # how its tasks refuse
        raise UserError(
            f"the task '{config.task}' refuses its options: {str(error) or type(error).__name__}",
            where="data.options",
            fix="see the task's configuration in reasoning-gym",
        ) from error


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(names) or 'none'}"


def json_like(value: Any) -> Any:
    """Metadata as JSON content. Tuples stay, which JSON writes as lists: some verifiers compare with them."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case dict():
            return {name: json_like(item) for name, item in value.items()}
        case tuple():
            return tuple(json_like(item) for item in value)
        case list():
            return [json_like(item) for item in value]
        case set() | frozenset():
            return sorted(json_like(item) for item in value)
    return value.item() if hasattr(value, "item") else str(value)
