"""Weights on their way into a real vLLM: over two ranks, through every transport, and what its checksum sees."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model, make_model_folder

from rlsys.batch.versions import WeightVersion
from rlsys.config.errors import UserError
from rlsys.config.schema import VllmRollout
from rlsys.engines.rollout import start_engine
from rlsys.engines.sync.buckets import Parcel, pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.engines.sync.delta import DeltaSender, Mirror
from rlsys.engines.sync.shared_memory import Segment
from rlsys.environments.base import Sample, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
pytest.importorskip("vllm")


def config(**given: Any) -> VllmRollout:
    return VllmRollout(**{"engine": "vllm", "samples_per_prompt": 1, "kv_cache_gib": 0.1} | given)


class Running:
    """An engine, the loop that it lives in, and how many updates it has had."""

    def __init__(self, folder: Path, **given: Any):
        self.runner = asyncio.Runner()
        self.engine: Any = self.runner.run(start_engine(str(folder), config(**given), max_length=64, threads=2))
        self.step = 0

    def load(self, parcels: list[Parcel]) -> str:
        self.step += 1
        return self.runner.run(self.engine.update_weights(parcels, WeightVersion(0, self.step)))

    def sample(self, prompts: list[list[int]]) -> list[Sample]:
        async def together() -> list[Sample]:
            params = [SamplingParams(1.0, 12, seed) for seed in range(len(prompts))]
            return await asyncio.gather(*(self.engine.generate(p, s) for p, s in zip(prompts, params, strict=True)))

        return self.runner.run(together())

    def close(self) -> None:
        self.runner.run(self.engine.close())
        self.runner.close()


@torch.no_grad()
def assert_sampled_from(model: torch.nn.Module, running: Running) -> None:
    prompts = [[3, 4, 5], [9], list(range(6, 30))]
    for prompt, sample in zip(prompts, running.sample(prompts), strict=True):
        logits = model(torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)
        assert set(sample.versions) == {WeightVersion(0, running.step)}


SPREAD = [
    # biases, and one key head a rank
    pytest.param("qwen2", False, {"tensor_parallel": 2}, id="tensor parallel", marks=pytest.mark.slow),
    pytest.param("llama", True, {"tensor_parallel": 2}, id="tensor parallel, tied", marks=pytest.mark.slow),
    pytest.param("qwen3", True, {"pipeline_parallel": 2}, id="pipeline", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "tied", "spread"), SPREAD)
def test_ranks_of_a_sampler_hold_the_weights_together(
    family: Any, tied: bool, spread: dict[str, int], tmp_path: Path
) -> None:
    """The checksum is the sender's, before and after an update, and log-probs are those of one process."""
    running = Running(make_model_folder(tmp_path, family, tied=tied), **spread)
    try:
        first = make_model(family, tied=tied)
        assert running.runner.run(running.engine.checksum()) == weights_checksum(first.named_parameters())
        assert_sampled_from(first, running)
        segment = Segment()
        for seed in (1, 2):
            model = make_model(family, tied=tied, seed=seed)
            for _ in segment.write(model.named_parameters()):
                pass
            assert running.load([segment.bucket()]) == weights_checksum(model.named_parameters())
            assert_sampled_from(model, running)
    finally:
        running.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(make_model_folder(tmp_path_factory.mktemp("sync")))
    yield made
    made.close()


def test_every_transport_delivers_the_same_weights(running: Running) -> None:
    segment, sender, mirror, base = Segment(), DeltaSender(), Mirror(), None
    for seed in (1, 2):
        model = make_model(seed=seed)
        expected = weights_checksum(model.named_parameters())
        other = make_model(seed=seed + 10)
        for _ in segment.write(model.named_parameters()):
            pass
        assert running.load([segment.bucket()]) == expected
        assert running.load(list(pack(other.named_parameters()))) != expected
        version = WeightVersion(0, running.step)
        changes = list(sender.encode(((n, p.detach()) for n, p in model.named_parameters()), version, base))
        assert running.load([mirror.apply(changes)]) == expected
        assert_sampled_from(model, running)
        base = version


def test_a_single_bit_that_changed_on_the_way_is_seen(running: Running) -> None:
    model = make_model(seed=3)
    sent = weights_checksum(model.named_parameters())
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        damaged = {n: p.detach().clone() for n, p in model.named_parameters()}
        damaged[name].view(torch.int32).view(-1)[-1] ^= 1
        assert running.load(list(pack(damaged.items()))) != sent
    assert running.load(list(pack(model.named_parameters()))) == sent


def test_weights_that_were_left_out_are_seen(running: Running) -> None:
    """A sampler that keeps old weights of one layer does not have the sender's checksum."""
    running.load(list(pack(make_model(seed=4).named_parameters())))
    model = make_model(seed=5)
    kept = [(n, p) for n, p in model.named_parameters() if "layers.1.mlp" not in n]
    assert running.load(list(pack(kept))) != weights_checksum(model.named_parameters())
    assert running.load(list(pack(model.named_parameters()))) == weights_checksum(model.named_parameters())


def test_a_cache_too_small_for_one_sequence_is_refused_before_loading(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, max_length=100_000)
    with pytest.raises(UserError, match=r"are missing") as caught:
        asyncio.run(start_engine(str(folder), config(kv_cache_gib=0.05), max_length=100_000))
    assert caught.value.where == "rollout.kv_cache_gib"


def test_a_machine_too_small_for_weights_and_cache_is_refused_before_loading(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"for weights and KV cache, and .* are missing"):
        asyncio.run(start_engine(str(folder), config(kv_cache_gib=1e6), max_length=64))


def test_weights_are_counted_from_the_files_headers(tmp_path: Path) -> None:
    from rlsys.engines.rollout.vllm_memory import weights_bytes

    folder = make_model_folder(tmp_path, tied=False)
    expected = sum(p.numel() for p in make_model(tied=False).parameters())
    assert weights_bytes(folder, torch.bfloat16) == 2 * expected
    assert weights_bytes(tmp_path / "nowhere", torch.bfloat16) == 0
