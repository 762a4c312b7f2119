"""Whole runs that train an adapter: what samplers got, what the reference was, what is saved and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_folders import make_model_folder
from one_process import Run, one_process
from running import comparable, launch, only_run, steps_of, tensors_below
from transformers import AutoModelForCausalLM

from rlsys.config.errors import UserError
from rlsys.tracking.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

STEPS = 3
OVERRIDES = (
    "model.lora.rank=4",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "algorithm.kl.coef=0.01",
    "eval.every=0",
    "trainer.lr=1e-2",
    "trainer.schedule=constant",
    "checkpoint.every=1",
    "checkpoint.keep_last=99",
)


@pytest.fixture(scope="module")
def run(ray_cluster: None) -> Iterator[Run]:
    with one_process() as run:
        yield run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def whole(run: Run, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert run(root, *OVERRIDES, f"model.path={model}", f"steps={STEPS}") == 0
    return only_run(root)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(3, 43).view(2, 20)).logits


def test_samplers_have_the_adapter_and_the_reference_has_not(whole: Path) -> None:
    lines = steps_of(whole)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["mismatch/logprob_abs_mean"] <= 1e-5 for line in lines)
    assert lines[0]["policy/kl"] == 0, "the adapter's B is 0, and both are computed by the same model"
    assert all(line["policy/kl"] > 1e-4 for line in lines[1:])


def test_the_adapter_and_the_merged_model_are_the_same_policy(whole: Path, model: Path) -> None:
    from peft import PeftModel

    base, merged = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (model, whole / "model"))
    before = logits(base)
    described = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(model)
    adapted = PeftModel.from_pretrained(base, str(whole / "adapter")).eval()
    torch.testing.assert_close(logits(adapted), logits(merged), atol=1e-4, rtol=0)
    assert (logits(merged) - before).abs().max() > 0.1


def test_a_checkpoint_has_an_adapter_that_peft_loads_and_no_frozen_weight(whole: Path, model: Path) -> None:
    from peft import PeftModel

    last = whole / "checkpoints" / f"step-{STEPS:08d}"
    assert tensors_below(last / "adapter") == tensors_below(whole / "adapter")
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    first = PeftModel.from_pretrained(base, str(whole / "checkpoints" / "step-00000001" / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole / "model").eval()
    assert (logits(first) - logits(merged)).abs().max() > 1e-2
    files = [path for path in last.glob("*-of-*.safetensors") if not path.name.startswith("rng")]
    assert sum(path.stat().st_size for path in files) < (model / "model.safetensors").stat().st_size


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(run: Run, model: Path, whole: Path, tmp_path: Path) -> None:
    for steps in (1, STEPS):
        assert run(tmp_path, *OVERRIDES, f"model.path={model}", f"steps={steps}", "resume=auto") == 0
    resumed = only_run(tmp_path)
    assert comparable(resumed) == comparable(whole)
    assert tensors_below(resumed / "adapter") == tensors_below(whole / "adapter")


def test_another_adapter_does_not_go_on(run: Run, model: Path, tmp_path: Path) -> None:
    options = (*OVERRIDES, f"model.path={model}")
    assert run(tmp_path, *options, "steps=1") == 0
    with pytest.raises(UserError, match=r"model\.lora\.rank=4, not 2"):
        run(tmp_path, *options, "steps=2", "model.lora.rank=2", "resume=auto")


def accuracy(folder: Path) -> list[float]:
    return [line["eval/accuracy"] for line in read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in line]


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_an_adapter_learns(tmp_path: Path, sync: str) -> None:
    """A tenth of the weights: the bundled model adds carelessly before, and learns to add."""
    options = ("rollout=torch",) if sync == "merged" else ("model.lora.sync=adapter", "rollout.kv_cache_gib=0.2")
    done = launch("model.lora.rank=8", "trainer.lr=3e-3", "steps=30", "eval.problems=300", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = only_run(tmp_path)
    first, *_, last = accuracy(folder)
    assert first < 0.65
    assert last > 0.85
    assert all(line["mismatch/logprob_abs_mean"] <= 1e-4 for line in steps_of(folder))
