"""replay.*: preference pairs of files and of prompt groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from composing import with_leaves
from experiences import make_experience
from replay_shards import TOKENIZER, said, shard

from knobs.table import Actors, Bench, entry
from rlsys.batch import jagged
from rlsys.config.schema import RunConfig
from rlsys.controller import job as jobs
from rlsys.controller.inputs import _pairs
from rlsys.data.prompts import PromptEncoder
from rlsys.replay.pairs import PairStream, pairs_from_groups

ON = "algorithm.preference.weight=0.1"
SIMPO = "algorithm.preference.loss=simpo"  # reads no reference


def pair_file(path: Path, count: int, chosen: str = "4") -> Path:
    rows = ({"prompt": f"{i}+2=", "chosen": chosen, "rejected": "9"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def state_file(path: Path) -> Path:
    """States at which two and at which three teachers agree against the policy."""
    votes = [["4", "4", "5"], ["4", "4", "4"]]
    rows = ({"prompt": f"{i}+2=", "policy": "9", "teachers": teachers} for i, teachers in enumerate(votes))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(bench: Bench, **replay: Any) -> PairStream | None:
    """The run's stream of pairs, as its inputs load it."""
    leaves = {"algorithm.preference.weight": 0.1, **{f"replay.{name}": value for name, value in replay.items()}}
    config: RunConfig = with_leaves(bench.config(), leaves)
    return _pairs(config, PromptEncoder(TOKENIZER, max_prompt_tokens=16), TOKENIZER)[0]


def first(stream: PairStream | None) -> list[str]:
    """The chosen responses of the first step."""
    assert stream is not None
    rows = jagged.to_rows(stream.next_batch().batch["chosen_ids"])
    return [TOKENIZER.decode(row, skip_special_tokens=True) for row in rows]


@entry("replay.path", "replay.pairs_per_step")
def path(bench: Bench) -> None:
    one, two = (str(pair_file(bench.tmp / f"{chosen}.jsonl", 5, chosen)) for chosen in "46")
    assert all(text.endswith("4") for text in first(pairs(bench, source="file", path=one)))
    assert all(text.endswith("6") for text in first(pairs(bench, source="file", path=two)))
    assert [len(first(pairs(bench, source="file", path=one, pairs_per_step=n))) for n in (2, 3)] == [2, 3]


@entry("replay.agreement_threshold")
def agreement_threshold(bench: Bench) -> None:
    states = str(state_file(bench.tmp / "states.jsonl"))
    found = [pairs(bench, source="agreement", path=states, agreement_threshold=n) for n in (2, 3)]
    assert [stream.state_dict()["pairs"] for stream in found if stream is not None] == [2, 1]


@entry("replay.source", "replay.min_gap")
def source(bench: Bench) -> None:
    assert pairs(bench) is None, "pairs are made of groups"
    assert pairs(bench, source="file", path=str(pair_file(bench.tmp / "a.jsonl", 2))) is not None
    batch, _ = shard([[said("7"), said("4")], [said("1"), said("2")]])
    trainer = Actors(size=1)
    with bench.job(ON, "data.prompts_per_step=2", "replay.min_gap=0.5", trainer=trainer) as job:
        for gap in (0.5, 0.1):
            job.config = with_leaves(job.config, {"replay.min_gap": gap})
            job.load(make_experience([[2, 2], [2, 2]]))
        job.config = with_leaves(job.config, {"algorithm.preference.weight": 0.0})
        job.load(make_experience([[2, 2], [2, 2]]))
    gaps = [options["group_gap"] for _, options in trainer.given("load_batch")]
    assert gaps == [0.5, 0.1, None]
    rewards = np.array([0.0, 1.0, 0.5, 0.7], dtype=np.float32)
    made = [pairs_from_groups(batch, rewards, min_gap=gap) for gap in gaps[:2]]
    assert [int((jagged.lengths(m.batch["chosen_ids"]) > 0).sum()) for m in made] == [1, 2]


@entry("replay.eval_path")
def eval_path(bench: Bench) -> None:
    bench.monkeypatch.setattr(jobs, "evaluate", lambda *_: ({"eval/accuracy": 0.5}, [], 1))
    held_out = pair_file(bench.tmp / "held_out.jsonl", 4)
    trainer = Actors({"pair_margins": lambda pairs, *_: np.linspace(-1.0, 2.0, len(pairs))})

    def figures(*overrides: str) -> dict[str, float]:
        with bench.job(ON, SIMPO, *overrides, trainer=trainer) as job:
            job.begin_step()
            job.evaluate_if_due()
            return job._metrics

    assert "eval/pair_margin" not in figures()
    found = figures(f"replay.eval_path={held_out}")
    assert (found["eval/pair_margin"], found["eval/pair_accuracy"]) == (0.5, 0.5)
