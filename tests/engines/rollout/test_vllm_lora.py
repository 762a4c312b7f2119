"""A real vLLM sampler that follows a trainer's adapter: by itself, and merged."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import make_model_folder
from training_batches import process_group, random_batch

from rlsys.algorithms.channels import PolicyGradient
from rlsys.algorithms.objective import Objective
from rlsys.batch import DataProto, jagged
from rlsys.batch.versions import WeightVersion
from rlsys.config.schema import LoraConfig, ModelConfig, TrainerConfig, VllmRollout
from rlsys.engines.rollout import start_engine
from rlsys.engines.sync.buckets import Parcel, pack
from rlsys.engines.sync.checksum import WeightsChecksum, weights_checksum
from rlsys.engines.sync.shared_memory import Segment
from rlsys.engines.sync.verify import SyncError, check_sync
from rlsys.engines.train import load_engine
from rlsys.engines.train.lora import resolve_targets
from rlsys.environments.base import Sample, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
pytest.importorskip("vllm")

POLICY = Objective({"policy": (PolicyGradient(), 1.0)})
PROMPTS = [[3, 4, 5], [9], list(range(6, 30))]


class Pair:
    """A trainer with an adapter on one rank, and a sampler."""

    def __init__(self, folder: Path, what: str, targets: Any = "all-linear", **rollout: Any):
        given = ModelConfig(path=str(folder), lora=LoraConfig(rank=3, alpha=6.0, targets=targets))
        model = resolve_targets(given)
        self.trainer: Any = load_engine(
            model, TrainerConfig(lr=1e-2, micro_batch_tokens=200), temperature=1.0, total_steps=50, seed=0
        )
        self.what, self.step, self.batch, self.segment = what, 0, random_batch(), Segment()
        config = VllmRollout(engine="vllm", samples_per_prompt=1, kv_cache_gib=0.1, **rollout)
        self.runner = asyncio.Runner()
        adapter = model.lora if what == "adapter" else None
        start = start_engine(str(folder), config, max_length=64, threads=1, adapter=adapter)
        self.sampler: Any = self.runner.run(start)

    def train(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.trainer.forward_backward(self.batch, POLICY)
            self.trainer.optim_step()

    def exported(self) -> list[tuple[str, torch.Tensor]]:
        export = self.trainer.export_adapter if self.what == "adapter" else self.trainer.export_weights
        return [(name, weight.clone()) for name, weight in export(torch.float32)]

    def checksum(self, weights: list[tuple[str, torch.Tensor]]) -> str:
        checksum = WeightsChecksum()
        frozen = self.trainer.export_weights(torch.float32, adapter=False) if self.what == "adapter" else ()
        for name, weight in (*frozen, *weights):
            checksum.add(name, weight)
        return checksum.hexdigest()

    def sync(self, parcels: list[Parcel] | None = None) -> tuple[str, str]:
        """Checksums: of what was to be sent, and of what the sampler then holds."""
        weights = self.exported()
        if parcels is None:
            for _ in self.segment.write(weights):
                pass
            parcels = [self.segment.bucket()]
        self.step += 1
        held = self.runner.run(self.sampler.update_weights(parcels, WeightVersion(0, self.step)))
        return self.checksum(weights), held

    def sample(self) -> list[Sample]:
        async def together() -> list[Sample]:
            params = [SamplingParams(1.0, 12, seed) for seed in range(len(PROMPTS))]
            return await asyncio.gather(
                *(self.sampler.generate(p, s) for p, s in zip(PROMPTS, params, strict=True)),
            )

        return self.runner.run(together())

    def assert_alike(self) -> list[list[int]]:
        """The sampler's log-probs are the trainer's. Returns the tokens."""
        samples = self.sample()
        rows = [torch.tensor(sample.token_ids) for sample in samples]
        batch = DataProto.from_dict(
            tensors={
                "prompt_ids": jagged.from_rows([torch.tensor(prompt) for prompt in PROMPTS]),
                "response_ids": jagged.from_rows(rows),
                "response_mask": jagged.from_rows([torch.ones(len(row), dtype=torch.bool) for row in rows]),
            }
        )
        ours = jagged.values(self.trainer.forward(batch).batch["logprobs"])
        theirs = torch.tensor([value for sample in samples for value in sample.logprobs])
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
        assert {version for sample in samples for version in sample.versions} == {WeightVersion(0, self.step)}
        return [sample.token_ids for sample in samples]

    def close(self) -> None:
        self.runner.run(self.sampler.close())
        self.runner.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    with process_group():
        yield


def assert_follows(pair: Pair) -> None:
    seen = [pair.assert_alike()]
    for _ in range(2):
        pair.train()
        sent, held = pair.sync()
        assert held == sent
        seen.append(pair.assert_alike())
    assert len({str(tokens) for tokens in seen}) == 3, "with the same seeds, each version samples something else"


@pytest.mark.slow
def test_an_adapter_reaches_the_sampler_and_nothing_else_does(folder: Path) -> None:
    pair = Pair(folder, "adapter")
    try:
        assert_follows(pair)
        before = pair.checksum(pair.exported())
        old = list(pack(pair.exported()))
        pair.train()
        sent, held = pair.sync(old)
        assert held == before, "what was sent the last time"
        with pytest.raises(SyncError, match="did not"):
            check_sync(sender_before=before, sender_after=sent, sampler_before=before, sampler_after=held)
        half = list(pack(pair.exported()[2:], bucket_bytes=4096))  # one layer's pair is missing
        sent, held = pair.sync(half)
        assert held != sent
        sent, held = pair.sync(list(pack(pair.exported(), bucket_bytes=4096)))
        assert held == sent
        pair.assert_alike()
    finally:
        pair.close()


@pytest.mark.slow
def test_merged_weights_reach_the_sampler(folder: Path) -> None:
    pair = Pair(folder, "merged")
    try:
        assert_follows(pair)
        assert pair.runner.run(pair.sampler.checksum()) == weights_checksum(pair.exported())
    finally:
        pair.close()


@pytest.mark.slow
@pytest.mark.parametrize("spread", [{"tensor_parallel": 2}, {"pipeline_parallel": 2}], ids=str)
def test_ranks_of_a_sampler_hold_the_adapter_together(folder: Path, spread: dict[str, int]) -> None:
    """A layer that sums over ranks, and a fused layer of which one part has no adapter."""
    pair = Pair(folder, "adapter", ["q_proj", "v_proj", "down_proj"], **spread)
    try:
        assert_follows(pair)
    finally:
        pair.close()
