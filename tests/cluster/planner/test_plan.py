"""What a plan says: sums that add up, and that more of a thing never helps the wrong way."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from composing import run_config
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.cluster.memory import Device, phases
from rlsys.cluster.planner import calibration, timing
from rlsys.cluster.planner.advice import candidates, changed, faster, fitting
from rlsys.cluster.planner.fitting import fit_rates, nonnegative
from rlsys.cluster.planner.needs import total
from rlsys.cluster.planner.plan import Question, RunPlan, plan_run, report
from rlsys.cluster.planner.shape import from_config
from rlsys.cluster.topology import expected
from rlsys.cluster.unified import sampler_share
from rlsys.config.errors import UserError

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 40960,
}  # fmt: skip
SHAPE = from_config(QWEN3, name="Qwen3 1.7B")
HUGE = from_config(QWEN3 | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}, name="huge")
REAL = ("model=hub", "model.path=none", "data=gsm8k", "data.path=none", "rollout.workers=8")
HOST = ("rollout=torch", "model.path=none", "data=gsm8k", "data.path=none")


def question(*overrides: str, shape: Any = SHAPE, cluster: str = "h100_node", **more: Any) -> Question:
    config = run_config(*overrides, f"cluster={cluster}")
    return Question(config, shape, expected(config.cluster), **more)


def planned(*overrides: str, **more: Any) -> RunPlan:
    return plan_run(question(*REAL, *overrides, **more))


def needed(plan: RunPlan) -> int:
    return plan.memory.peak[1]


@pytest.fixture(scope="module")
def many_prompts() -> Question:
    return question(*REAL, "data.prompts_per_step=256")


def test_a_small_model_fits_a_node_and_a_huge_one_does_not() -> None:
    assert planned("cluster.placement=colocated").memory.fits
    assert not planned("cluster.placement=colocated", shape=HUGE).memory.fits


def test_the_least_is_part_of_what_is_planned() -> None:
    plan = planned("cluster.placement=colocated")
    work = plan.work
    least = phases(work.config, work.shape.sizes, work.layout, Device(work.machine.total, work.machine.total))
    for phase, parts in least.items():
        for name, size in parts.items():
            assert plan.memory.phases[phase][name] >= size
    assert least.keys() == plan.memory.phases.keys()


def test_states_of_the_trainer_are_sixteen_bytes_a_weight_over_its_ranks() -> None:
    parts = planned("cluster.placement=disaggregated", "trainer.ranks=4", "rollout.workers=4").memory.phases["training"]
    states = sum(parts[f"the trainer's {name}"] for name in ("weights", "gradient", "moments"))
    assert states == pytest.approx(16 * SHAPE.parameters / 4, rel=1e-6)


def test_the_cache_is_its_formula() -> None:
    plan = planned("rollout=torch", "cluster.placement=disaggregated", "trainer.ranks=4", "rollout.workers=4")
    rows = min(256, max(32 * 8 // 4, 1000 // 4))
    assert plan.memory.phases["sampling"]["the sampler's cache"] == rows * 1024 * 28 * 2 * 8 * 128 * 2


@settings(max_examples=6)
@given(
    st.sampled_from(["shared", "colocated"]), st.sampled_from(["keep", "recompute"]), st.sampled_from(["fsdp", "zero3"])
)
def test_more_ranks_need_no_more_of_each(placement: str, activations: str, backend: str) -> None:
    given_ = (f"cluster.placement={placement}", f"trainer.activations={activations}", f"trainer={backend}")
    asked = question(*REAL, *given_)
    found = [
        needed(plan_run(replace(asked, config=changed(asked.config, (("trainer.ranks", ranks),)))))
        for ranks in (1, 2, 4, 8)
    ]
    assert found == sorted(found, reverse=True)


@settings(max_examples=10)
@given(st.integers(2048, 16384), st.integers(1, 8192))
def test_larger_micro_batches_need_no_less(many_prompts: Question, tokens: int, more: int) -> None:
    asked = many_prompts
    sizes = [
        needed(plan_run(replace(asked, config=changed(asked.config, (("trainer.micro_batch_tokens", n),)))))
        for n in (tokens, tokens + more)
    ]
    assert sizes[0] <= sizes[1]


def test_each_way_to_need_less_needs_less() -> None:
    training = {
        key: total(planned("cluster.placement=colocated", key, "data.prompts_per_step=256").memory.phases["training"])
        for key in (
            "trainer.activations=keep", "trainer.activations=recompute", "trainer.activations=offload",
            "trainer.offload=all", "trainer.shard_ranks=2", "+model.lora.rank=8",
        )
    }  # fmt: skip
    assert training["trainer.activations=recompute"] < training["trainer.activations=keep"]
    assert training["trainer.activations=offload"] < training["trainer.activations=keep"]
    assert training["trainer.offload=all"] < training["trainer.activations=keep"]
    assert training["trainer.shard_ranks=2"] > training["trainer.activations=keep"]
    assert training["+model.lora.rank=8"] < training["trainer.activations=keep"]


def test_what_waits_in_main_memory_is_counted_there() -> None:
    assert "weights, moments and gradient that wait" in planned("cluster.placement=colocated").memory.main
    assert "weights, moments and gradient that wait" not in planned().memory.main
    spark = plan_run(question(*REAL[:-1], cluster="gb10"))
    assert spark.memory.main == {}  # one memory for both
    assert spark.memory.capacity < 120 * 2**30 - 15 * 2**30


@pytest.mark.parametrize("page_cache", [4, 40])
def test_of_one_memory_a_plan_gives_the_sampler_what_a_run_would(page_cache: int) -> None:
    cluster = f"cluster.page_cache_gib={page_cache}"
    plan = plan_run(question(*REAL[:-1], "rollout.gpu_memory_fraction=0.3", cluster, cluster="gb10"))
    (parts,) = plan.memory.phases.values()
    whole = plan.work.machine.total
    assert parts["the sampler's weights"] + parts["the sampler's cache"] == pytest.approx(0.3 * whole, rel=1e-6)
    others = {name: size for name, size in parts.items() if not name.startswith("the sampler's")}
    most = sampler_share(plan.work.config, others, whole)
    for more, fits in ((-0.001, True), (0.001, False)):
        asked = question(*REAL[:-1], f"rollout.gpu_memory_fraction={most + more}", cluster, cluster="gb10")
        assert plan_run(asked).memory.fits == fits


def test_phases_are_those_of_the_run_and_add_up() -> None:
    plain, more = (
        planned(),
        planned("algorithm.kl.coef=0.1", "trainer.updates_per_step=2", "cluster.placement=colocated"),
    )
    assert set(plain.phases) == {"rollout", "update", "sync", "driver"}
    assert set(more.phases) == {"rollout", "reference", "old_logprobs", "update", "sync", "turns", "driver"}
    assert plain.step_s == pytest.approx(sum(s for phase in plain.phases.values() for s in phase.parts.values()))
    assert 0 < plain.mfu < 1
    assert plain.phases[plain.bottleneck].seconds == max(phase.seconds for phase in plain.phases.values())


def test_more_tokens_take_longer_and_longer_tails_most_of_all() -> None:
    short, long = planned(response_tokens=64.0), planned(response_tokens=256.0)
    assert short.step_s < long.step_s
    level = planned("data.max_response_tokens=256", response_tokens=256.0)
    assert level.phases["rollout"].seconds < long.phases["rollout"].seconds  # the same tokens, and no tail


def test_recomputing_and_a_critic_take_longer() -> None:
    update = planned().phases["update"].seconds
    assert planned("trainer.activations=recompute").phases["update"].seconds > update
    assert planned("algorithm=ppo").phases["update"].seconds == pytest.approx(2 * update)


def test_the_price_is_that_of_all_nodes() -> None:
    plan = planned(dollars_per_hour=10.0)
    assert plan.dollars == pytest.approx(10.0 * plan.step_s / 3.6)
    pool = planned("cluster.nodes=4", cluster="gpu_pool", dollars_per_hour=10.0)
    assert pool.dollars == pytest.approx(40.0 * pool.step_s / 3.6)
    hourly = [
        planned("cluster.nodes=2", f"cluster.gpus_per_node={gpus}", cluster="gpu_pool").work.machine.dollars
        for gpus in (4, 8)
    ]
    assert hourly[0] == pytest.approx(hourly[1] / 2), "others have the rest of those nodes"


def test_advice_is_better_by_its_own_account() -> None:
    asked = question(*REAL, "trainer.activations=recompute", "trainer.rows=padded")
    plan = plan_run(asked)
    found = faster(asked, plan)
    assert found
    for advice in found:
        again = plan_run(replace(asked, config=changed(asked.config, advice.overrides)))
        assert again.step_s == advice.plan.step_s < plan.step_s
        assert again.memory.fits
    assert "trainer.rows=packed" in [advice.text for advice in found]


def test_what_does_not_fit_is_told_what_would() -> None:
    asked = question(*REAL, "rollout.gpu_memory_fraction=0.8", "data.prompts_per_step=256")
    plan = plan_run(asked)
    assert not plan.memory.fits
    rescue = fitting(asked, plan)
    assert rescue is not None
    assert plan_run(replace(asked, config=changed(asked.config, rescue.overrides))).memory.fits
    assert fitting(question(*REAL, shape=HUGE), planned(shape=HUGE)) is None


def test_candidates_are_keys_of_the_configuration() -> None:
    plan = planned()
    for override in candidates(plan.work.config, plan):
        changed(plan.work.config, (override,))


@pytest.mark.parametrize(
    ("overrides", "more", "said"),
    [
        ((), {"cluster": "ray"}, "only known when it is there"),
        ((), {"response_tokens": 1e9}, "--response-tokens"),
        ((), {"prompt_tokens": 0.0}, "--prompt-tokens"),
        (("data.max_response_tokens=41000", "trainer.micro_batch_tokens=65536"), {}, "the model allows 40960"),
        (("trainer.ranks=16",), {}, "there are 8 GPUs"),
    ],
)
def test_what_cannot_be_planned_is_named(overrides: tuple[str, ...], more: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned(*overrides, **more)


def test_a_host_without_gpus_is_planned_as_a_whole() -> None:
    plan = plan_run(question(*HOST, cluster="local"))
    if plan.work.topology.gpus:
        pytest.skip("this machine has a GPU")
    assert set(plan.memory.phases) == {"every phase"}
    assert plan.memory.capacity == plan.work.machine.main


def test_a_report_is_json_and_has_every_part() -> None:
    plan = planned()
    content = json.loads(json.dumps(report(plan)))
    assert content["step_s"] == pytest.approx(plan.step_s)
    assert content["memory"]["phases"] == plan.memory.phases
    assert sum(content["time"]["rollout"]["parts"].values()) == pytest.approx(content["time"]["rollout"]["seconds"])


# --- calibration


def test_nonnegative_finds_the_factors_and_none_below_zero() -> None:
    rows = [[1.0, 2.0, 0.0], [3.0, 1.0, 1.0], [0.5, 4.0, 2.0]]
    assert nonnegative(
        rows, [sum(r * x for r, x in zip(row, (2, 0.5, 1), strict=True)) for row in rows]
    ) == pytest.approx([2, 0.5, 1])
    assert min(nonnegative([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]], [1.0, 3.0, 5.0])) >= 0
    assert nonnegative([[1.0, 1.0], [2.0, 1.0]], [0.5, 4.0], (1.0, 0.0))[0] >= 1


def test_a_fit_finds_the_coefficients_that_the_runs_were_made_of() -> None:
    """Runs whose times are the planner's own, with other coefficients than it starts from."""
    if expected(run_config(*HOST).cluster).gpus:
        pytest.skip("this machine has a GPU")
    start = calibration.load("cpu").coefficients
    truth = replace(
        start, matmul_fraction=0.6, activation_passes=5.0, layer_s=0.002, decode_matmul_fraction=0.3,
        decode_bandwidth_fraction=0.5, decode_layer_s=0.0004, sync_gbs=2.0, sync_s=0.02, driver_s=0.05,
        driver_sample_s=0.0003,
    )  # fmt: skip
    sizes = [(128, 1, 4), (256, 4, 8), (512, 8, 32)]
    runs = []
    for hidden, layers, prompts in sizes:
        shape = from_config(
            QWEN3
            | {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden, "vocab_size": 512},
            name="x",
        )
        asked = question(*HOST, f"data.prompts_per_step={prompts}", shape=shape, cluster="local")
        plan = plan_run(replace(asked, calibration=calibration.Calibration(truth, "", True)))
        run = {f"time/{name}_s": phase.seconds for name, phase in plan.phases.items()} | {"time/step_s": plan.step_s}
        runs.append((asked, run))
    found = fit_rates(start, runs)
    for name in ("matmul_fraction", "activation_passes", "layer_s", "decode_layer_s", "sync_gbs", "driver_sample_s"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.02), name


def test_the_file_of_coefficients_is_whole() -> None:
    for kind in ("cpu", "gpu"):
        known = calibration.load(kind)
        assert known.source
        fractions = {name: value for name, value in vars(known.coefficients).items() if name.endswith("_fraction")}
        assert all(value > 0 for value in fractions.values()), fractions
    assert not calibration.load("gpu").measured


def test_saving_keeps_the_other_kind(tmp_path: Any) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(calibration.FILE.read_text(encoding="utf-8"), encoding="utf-8")
    known = calibration.load("cpu", path)
    calibration.save("cpu", replace(known, source="elsewhere"), {"machine": "m"}, path)
    assert calibration.load("cpu", path).source == "elsewhere"
    assert calibration.load("gpu", path) == calibration.load("gpu")


def test_slots_are_bounded_by_the_cache() -> None:
    plenty = planned("rollout.gpu_memory_fraction=0.5", "data.prompts_per_step=2048")
    little = planned("rollout.gpu_memory_fraction=0.06", "data.prompts_per_step=2048")
    assert timing.slots(little.work) < timing.slots(plenty.work) <= 1024
    assert little.phases["rollout"].seconds > plenty.phases["rollout"].seconds
