"""What only vLLM can get wrong: fused, padded and packed weights, its arguments, its processes."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from model_folders import Family, make_model, make_model_folder

from rlsys.batch.versions import WeightVersion
from rlsys.config.errors import UserError
from rlsys.config.schema import VllmRollout
from rlsys.engines.rollout import start_engine
from rlsys.engines.sync.buckets import pack
from rlsys.engines.sync.checksum import weights_checksum
from rlsys.environments.base import SamplingParams

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


def config(**given: Any) -> VllmRollout:
    return VllmRollout(**{"engine": "vllm", "samples_per_prompt": 1, "kv_cache_gib": 0.1} | given)


def test_every_refused_argument_is_one_that_vllm_has() -> None:
    from vllm import AsyncEngineArgs

    from rlsys.engines.rollout.vllm_args import OWNED

    assert set(OWNED) <= {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def test_config_reaches_vllm(tmp_path: Path) -> None:
    from rlsys.engines.rollout.vllm import engine_arguments

    free = {"max_num_batched_tokens": 99, "enforce_eager": False}
    given = config(max_concurrent=7, dtype="bfloat16", engine_args=free)
    arguments = engine_arguments(str(tmp_path), given, max_length=31, seed=5)
    assert arguments["max_num_seqs"] == 7
    assert arguments["max_num_batched_tokens"] == 99
    assert arguments["max_model_len"] == 31
    assert (arguments["seed"], arguments["dtype"], arguments["enforce_eager"]) == (5, "bfloat16", False)


def test_an_unknown_argument_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_num_batched_tokens"):
        asyncio.run(start_engine(str(tmp_path), config(engine_args={"max_num_batched_token": 1}), max_length=8))


def test_what_vllm_refuses_is_said_in_its_own_words(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path, max_length=64)
    with pytest.raises(UserError, match=r"max_model_len \(65\)") as caught:
        asyncio.run(start_engine(str(folder), config(), max_length=65))
    assert "input_value" not in str(caught.value)


def test_the_environment_is_as_it_was_afterwards() -> None:
    from rlsys.engines.rollout.vllm_environment import core_environment

    before = dict(os.environ)
    with core_environment(3, on_cpu=True, eager=True):
        assert os.environ["OMP_NUM_THREADS"] == "3"
        os.environ["LD_PRELOAD"] = "added by vLLM"
    assert dict(os.environ) == before


FAMILIES = [
    pytest.param(family, tied, dtype, marks=[] if (family, tied, dtype) == fast else [pytest.mark.slow])
    for fast in [("qwen2", False, "bfloat16")]
    for family in ("qwen2", "qwen3", "llama")
    for tied in (True, False)
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("family", "tied", "dtype"), FAMILIES)
def test_what_it_holds_is_what_was_sent(family: Family, tied: bool, dtype: str, tmp_path: Path) -> None:
    """Checksums agree for the weights of the folder and for new ones, and log-probs follow them."""
    folder = make_model_folder(tmp_path, family, tied=tied)

    async def check() -> None:
        engine = await start_engine(str(folder), config(dtype=dtype), max_length=32, threads=1)
        try:
            for seed in (0, 1, 2):
                model = make_model(family, tied=tied, seed=seed).to(getattr(torch, dtype))
                expected = weights_checksum(model.named_parameters())
                if seed:
                    buckets = pack(model.named_parameters(), 1 << 14)
                    assert await engine.update_weights(buckets, WeightVersion(0, seed)) == expected
                assert await engine.checksum() == expected
                sample = await engine.generate([3, 4, 5], SamplingParams(1.0, 10, seed))
                with torch.no_grad():
                    logits = model(torch.tensor([[3, 4, 5, *sample.token_ids]])).logits[0, 2:-1].float()
                logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
                tolerance = 1e-4 if dtype == "float32" else 0.25
                torch.testing.assert_close(torch.tensor(sample.logprobs), logprobs, atol=tolerance, rtol=0)
        finally:
            await engine.close()

    asyncio.run(check())


STARTER = """
import asyncio, sys
from rlsys.config.schema import VllmRollout
from rlsys.engines.rollout import start_engine
async def main():
    config = VllmRollout(engine="vllm", samples_per_prompt=1, kv_cache_gib=0.1)
    engine = await start_engine(sys.argv[1], config, max_length=32, threads=1)
    print("ready", flush=True)
    sys.stdin.read()
    await engine.close()
if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "closed"])
def test_its_processes_end_with_their_owner(end: str, tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    (tmp_path / "starter.py").write_text(STARTER)
    owner = subprocess.Popen(
        [sys.executable, str(tmp_path / "starter.py"), str(folder)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert owner.stdout.readline() == "ready\n"
    started = psutil.Process(owner.pid).children(recursive=True)
    assert started
    if end == "killed":
        owner.kill()
    else:
        owner.stdin.close()
    owner.wait()
    _, alive = psutil.wait_procs(started, timeout=60)
    for left in alive:
        left.kill()
    assert not alive


def test_how_many_sequences_are_decoded_at_once_follows_from_the_cache(tmp_path: Path) -> None:
    from vllm import AsyncEngineArgs

    from rlsys.engines.rollout.vllm import engine_arguments
    from rlsys.engines.rollout.vllm_memory import MOST_CONCURRENT, concurrent_sequences, sequence_bytes

    folder = make_model_folder(tmp_path, max_length=64)
    arguments = engine_arguments(str(folder), config(), max_length=64, seed=0)
    vllm_config = AsyncEngineArgs(**arguments).create_engine_config()
    sequence = sequence_bytes(vllm_config) / 2**30
    rooms = {room: config(kv_cache_gib=sequence * room) for room in (1.0, 2.5, 1e6)}
    assert arguments["max_num_seqs"] == MOST_CONCURRENT[0]
    assert [concurrent_sequences(vllm_config, folder, each) for each in rooms.values()] == [4, 10, MOST_CONCURRENT[0]]
