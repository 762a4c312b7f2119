"""Controllers under which sampling and training overlap: what is trained, how old it may be, and what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_folders import make_model_folder
from running import RunJob, job_process, only_run, read_jsonl, steps_of

from rlsys import cli
from rlsys.config.errors import UserError
from rlsys.tracking.ledger import FILE_NAME, State, audit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

STEPS, PROMPTS, SAMPLES = 6, 4, 2
TINY = (
    "rollout=torch",
    f"steps={STEPS}",
    f"data.prompts_per_step={PROMPTS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "eval.every=3",
    "eval.problems=4",
    "checkpoint.every=2",
    "algorithm.loss=decoupled_ppo",
    "reward.parts.correct.use=rewards_for_runs.digits",
    "tracker.rollouts=1000",
)


@pytest.fixture(scope="module")
def run_job() -> Iterator[RunJob]:
    with job_process() as run:
        yield run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


def trained_whole(folder: Path, steps: int = STEPS) -> None:
    """Every step had its groups, and the ledger agrees: nothing lost, nothing twice."""
    assert [line["step"] for line in steps_of(folder)] == list(range(1, steps + 1))
    found = audit(folder)
    assert found.ok, found.violations
    assert found.groups[State.TRAINED] == steps * PROMPTS
    assert len(found.trained_ids) == steps * PROMPTS * SAMPLES


@pytest.mark.parametrize(
    "in_flight",
    ["keep", pytest.param("finish", marks=pytest.mark.slow), pytest.param("recompute", marks=pytest.mark.slow)],
)
def test_nothing_older_than_the_bound_is_trained(in_flight: str, run_job: RunJob, model: Path, tmp_path: Path) -> None:
    bound = 2
    overrides = (f"controller.max_staleness={bound}", f"controller.in_flight={in_flight}", f"model.path={model}")
    assert run_job(tmp_path, "controller=async", *TINY, *overrides) == 0
    folder = only_run(tmp_path)
    trained_whole(folder)
    lines = steps_of(folder)
    assert all(0 <= line["rollout/staleness"] <= bound for line in lines)
    assert max(line["rollout/staleness"] for line in lines) > 0, "samplers ran ahead"
    for line in lines:
        assert line["async/staleness_max"] == line["rollout/staleness"]
        assert line["async/in_flight"] + line["async/ready"] <= bound * PROMPTS
        assert line.get("alerts/mismatch", 0) == 0, "that weights have moved on is no fault of the sampler"


@pytest.mark.slow
def test_each_token_says_which_weights_sampled_it(run_job: RunJob, model: Path, tmp_path: Path) -> None:
    assert run_job(tmp_path, "controller=async", *TINY, f"model.path={model}") == 0
    folder = only_run(tmp_path)
    for line in steps_of(folder):
        for row in read_jsonl(folder / "rollouts" / f"step-{int(line['step']):06d}.jsonl"):
            steps = [span["step"] for span in row["weight_versions"]]
            assert steps == sorted(set(steps)), "weights only get newer along a response"
            assert all(line["step"] - 1 - 4 <= step <= line["step"] - 1 for step in steps)
            assert sum(span["tokens"] for span in row["weight_versions"]) == len(row["response_ids"])


@pytest.mark.slow
def test_one_step_off_trains_what_was_sampled_during_the_step_before(
    run_job: RunJob, model: Path, tmp_path: Path
) -> None:
    assert run_job(tmp_path, "controller=one_step_off", *TINY, f"model.path={model}") == 0
    folder = only_run(tmp_path)
    trained_whole(folder)
    assert all(line["rollout/staleness"] <= 1 for line in steps_of(folder))
    handed_out = {
        uid: line["version"][1]
        for line in read_jsonl(folder / FILE_NAME)
        if line["event"] == "issued"
        for uid, *_ in line["groups"]
    }
    for line in read_jsonl(folder / FILE_NAME):
        if line["event"] == "trained":
            versions = {handed_out[uid] for uid, *_ in line["groups"]}
            assert versions == {max(line["step"] - 2, 0)}, "the weights before those that the step began with"


@pytest.mark.slow
def test_without_staleness_every_step_is_on_policy(run_job: RunJob, model: Path, tmp_path: Path) -> None:
    overrides = ("controller=async", "controller.max_staleness=0", f"model.path={model}")
    assert run_job(tmp_path, *TINY, "algorithm.loss=ppo_clip", *overrides) == 0
    folder = only_run(tmp_path)
    trained_whole(folder)
    assert all(line["rollout/staleness"] == 0 for line in steps_of(folder))
    assert all(line["mismatch/logprob_abs_mean"] <= 1e-4 for line in steps_of(folder))


@pytest.mark.slow
def test_filters_replace_groups_and_a_reference_is_asked(run_job: RunJob, model: Path, tmp_path: Path) -> None:
    overrides = (
        "controller=async",
        "algorithm.filters.zero_variance={}",
        "algorithm.kl.coef=0.1",
        "steps=3",
        f"model.path={model}",
    )
    assert run_job(tmp_path, *TINY, *overrides) == 0
    folder = only_run(tmp_path)
    found = audit(folder)
    assert found.ok, found.violations
    lines = steps_of(folder)
    dropped = sum(line["filter/zero_variance_dropped"] for line in lines)
    assert dropped > 0
    assert found.groups[State.FILTERED] >= dropped
    assert all(line["policy/kl"] >= 0 for line in lines)


@pytest.mark.slow
def test_an_interrupted_stream_goes_on_with_the_groups_that_it_left(
    run_job: RunJob, model: Path, tmp_path: Path
) -> None:
    overrides = ("controller=async", *TINY, f"model.path={model}")
    assert run_job(tmp_path, *overrides, "steps=4") == 0
    assert run_job(tmp_path, *overrides, f"steps={STEPS}", "resume=auto") == 0
    folder = only_run(tmp_path)
    trained_whole(folder)
    assert audit(folder).resumes == 1


@pytest.mark.slow
def test_another_controller_does_not_go_on(run_job: RunJob, model: Path, tmp_path: Path) -> None:
    overrides = (*TINY, f"model.path={model}", "steps=1", "eval.every=0")
    assert run_job(tmp_path, "controller=async", *overrides) == 0
    with pytest.raises(UserError, match="controller"):
        run_job(tmp_path, *overrides, "steps=2", "resume=auto")


@pytest.mark.slow
def test_samplers_join_and_leave_while_the_run_goes_on(run_job: RunJob, model: Path, tmp_path: Path) -> None:
    """The wish for two is there before the run looks for the first time; later it is told to go on with one."""
    steps = 60
    overrides = ("controller=async", *TINY, f"model.path={model}", f"steps={steps}", "eval.every=0")

    def wish() -> None:
        for workers, after in ((2, 1), (1, 30)):
            while not any(len(steps_of(path)) >= after for path in (tmp_path / "runs").glob("*/") if path.is_dir()):
                time.sleep(0.05)
            assert cli.main(["scale", str(only_run(tmp_path)), str(workers)]) == 0

    (tmp_path / "runs").mkdir()
    wisher = threading.Thread(target=wish)
    wisher.start()
    assert run_job(tmp_path, *overrides) == 0
    wisher.join()
    folder = only_run(tmp_path)
    trained_whole(folder, steps)
    kinds = [event["kind"] for event in read_jsonl(folder / "events.jsonl")]
    assert kinds.count("joined") == kinds.count("left") == 1
