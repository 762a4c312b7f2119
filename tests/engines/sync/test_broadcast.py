"""The order of a bucket's load and of the wait for its copies. The channel itself takes GPUs."""

from __future__ import annotations

import torch

from rlsys.engines.sync.broadcast import settled


def test_a_bucket_is_copied_before_the_next_one_comes() -> None:
    happened: list[str] = []
    load = settled(lambda weights: happened.extend(name for name, _ in weights), lambda: happened.append("wait"))
    for names in (["a", "b"], ["c"]):
        load([(name, torch.zeros(1)) for name in names])
    assert happened == ["a", "b", "wait", "c", "wait"]
