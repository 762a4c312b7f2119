"""Stand-in until the full room arrives."""
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    row_id: str
    messages: list
    task: dict
    where: str


@dataclass(frozen=True)
class Dataset:
    train: list
    held_out: list


def load_dataset(config) -> Dataset:
    import random
    rows = [Row(f"{a:02d}+{b:02d}", [{"role": "user", "content": f"{a:02d}+{b:02d}="}], {"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a+b:03d}"}, "arith") for a in range(100) for b in range(100)]
    random.Random(config.split_seed).shuffle(rows)
    return Dataset(rows[config.held_out:], rows[:config.held_out])
