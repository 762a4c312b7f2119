"""Sweeps: what a job needs, which may start, how they compare, and ``python -m rlsys.launch -m`` for real."""

from __future__ import annotations

import json
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from composing import run_config
from hypothesis import given
from hypothesis import strategies as st
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from running import command, environment, write_jsonl

from rlsys import launch as command_line
from rlsys.cluster.sweep import (
    Need,
    SweepJob,
    admitted,
    cores_each,
    pool_of,
    prepared,
    reason_of,
    refuse_too_large,
    thread_counts,
)
from rlsys.cluster.topology import Node, Topology, one_host
from rlsys.config.errors import UserError
from rlsys.tracking.compare import Result, objective, read_comparison, short, varying, write_comparison


def hosts(*cores: int, gpus: int = 0) -> Topology:
    return Topology("ray", tuple(Node(f"n{i}", f"10.0.0.{i}", None, gpus, c, 64.0) for i, c in enumerate(cores)))


def job(number: int, need: Need) -> SweepJob:
    return SweepJob(number, (), None, Path(), need)  # type: ignore[arg-type]


# --- what a job needs, and which may start ---


@pytest.mark.parametrize(
    ("cores", "count", "each"),
    [((2,), 6, 1), ((2,), 1, 2), ((64,), 4, 16), ((64,), 6, 10), ((8, 8), 3, 4), ((8, 2), 2, 4), ((16, 16), 2, 16)],
)
def test_cores_are_divided_so_that_all_run_at_once(cores: tuple[int, ...], count: int, each: int) -> None:
    assert cores_each(hosts(*cores), count) == each


NEEDS = st.builds(Need, st.integers(0, 4).map(float), st.integers(1, 4), st.integers(0, 8))


@given(st.lists(NEEDS, max_size=12), st.integers(0, 8), st.integers(1, 12), st.none() | st.integers(1, 5))
def test_the_pool_is_never_overbooked_nor_idle(needs: list[Need], gpus: int, cores: int, limit: int | None) -> None:
    pool = Need(gpus, cores, 10)
    waiting, running = [job(i, need) for i, need in enumerate(needs) if need.fits(pool)], list[SweepJob]()
    ran = 0
    while waiting:
        started = admitted(waiting, running, pool, limit)
        running += started
        assert running, "an empty pool takes any job that it can hold"
        assert sum((each.need for each in running), Need(0, 0)).fits(pool)
        assert limit is None or len(running) <= limit
        waiting = [each for each in waiting if each not in started]
        ran += 1
        running.pop(0)
    assert ran <= len(needs)


def test_a_job_that_never_fits_is_refused_with_what_is_short() -> None:
    with pytest.raises(UserError, match=r"job 1 needs 8 GPUs of 4") as refused:
        refuse_too_large([job(0, Need(4, 1)), job(1, Need(8, 1))], Need(4, 8))
    assert "trainer.ranks" in str(refused.value.fix)


def test_actors_that_take_turns_share_their_cores() -> None:
    workers = {"trainer": 2, "critic": 2, "rollout": 3, "reward": 1}
    assert thread_counts(workers, apart=False) == 3
    assert thread_counts(workers, apart=True) == 5


def test_a_job_books_what_its_run_will_use(tmp_path: Path) -> None:
    config = run_config("rollout=torch")
    shared = prepared(0, ["a=1"], config, tmp_path, one_host(gpus=0, cores=8), 4)
    assert shared.overrides == ("a=1", "cluster.threads=2")
    assert (shared.need.gpus, shared.need.cores) == (0, 2)
    assert shared.need.memory > 1 << 30, "its processes, and its model"
    own = prepared(0, [], run_config("rollout=torch", "cluster.threads=3"), tmp_path, one_host(gpus=0, cores=8), 4)
    assert (own.overrides, own.need.cores) == ((), 3)
    pool = hosts(16, gpus=8)
    two = prepared(0, [], run_config("trainer.ranks=2", "rollout.workers=2"), tmp_path, pool, 4)
    assert (two.need.gpus, two.overrides) == (2, ())
    assert prepared(0, [], run_config(), tmp_path, pool, 4).need.gpus == 8, "trainer.ranks=null: all of them"
    assert pool_of(pool).gpus == 8


# --- how they compare ---


def run_folder(root: Path, number: int, accuracy: list[float]) -> Path:
    folder = root / str(number) / "20260101-000000-grpo_qwen"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: a\n")
    lines = [
        {"step": step, "lineage": 0, "eval/accuracy": value} | ({"reward/mean": 0.5} if step else {})
        for step, value in enumerate(accuracy)
    ]
    write_jsonl(folder / "metrics.jsonl", lines)
    return folder


def result(root: Path, number: int, *words: str, status: str = "finished", **fields: Any) -> Result:
    return Result(number, ("+recipe=grpo_qwen", *words), status, root / str(number), steps=2, **fields)


def test_only_what_differs_is_shown() -> None:
    assert varying([("+recipe=a", "lr=1", "x=0"), ("+recipe=a", "lr=2", "x=0")]) == [("lr=1",), ("lr=2",)]
    assert varying([("+recipe=a", "lr=1")]) == [("+recipe=a", "lr=1")]
    assert varying([]) == []
    assert (
        short(["trainer.lr=6.611623329594088e-05", "model.path=bundled\\:a", "++a.b=0.5"])
        == "lr=6.612e-05 path=bundled:a b=0.5"
    )


def test_the_table_has_every_job_and_names_what_failed(tmp_path: Path) -> None:
    run_folder(tmp_path, 0, [0.5, 0.6, 0.9])
    run_folder(tmp_path, 1, [0.5, 0.7])
    results = [
        result(tmp_path, 0, "trainer.lr=1", seconds=12.0, exit_code=0),
        result(tmp_path, 1, "trainer.lr=2", status="failed", exit_code=1, error="it | diverged\nat step 2"),
        result(tmp_path, 2, "trainer.lr=3", status="failed", exit_code=2, error="no such model"),
        result(tmp_path, 3, "trainer.lr=4", status="stopped", error="never started"),
    ]
    found = write_comparison(tmp_path, results, "Sweep of grpo_qwen")
    assert read_comparison(tmp_path) == json.loads(json.dumps(found))
    assert [row["final"] for row in found] == [0.9, 0.7, None, None]
    assert [objective(each) for each in results] == [0.9, None, None, None]
    page = (tmp_path / "sweep.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert [line.split(" | ")[0] for line in table] == ["| 0", "| 1", "| 2", "| 3"]
    assert "`trainer.lr=1` | finished | 50.0 → 90.0 ★ | 90.0 | 0.500 | 2/2 | 12.0 s |" in table[0]
    assert "failed (2)" in table[2]
    assert "- job 1 (`trainer.lr=2`), failed: it | diverged at step 2" in page
    assert "- job 2 (`trainer.lr=3`), failed: no such model" in page
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_why_a_run_failed(tmp_path: Path) -> None:
    shown = "\x1b[1;31merror: \x1b[0mthere is no model\n  where: model.path\n  fix:   give a folder\n"
    said = "there is no model; where: model.path; fix: give a folder"
    assert reason_of(f"Running entrypoint\n{shown}", tmp_path) == said
    trace = "Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n"
    assert reason_of(trace, tmp_path) == "torch.OutOfMemoryError: CUDA out of memory"
    assert reason_of("", tmp_path) == ""
    folder = run_folder(tmp_path, 0, [])
    write_jsonl(folder / "events.jsonl", [{"kind": "start", "text": "a"}, {"kind": "end", "text": "a rank died"}])
    assert reason_of(trace, tmp_path / "0") == "a rank died"


# --- the command line ---


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("trainer.lr=1e-4,1e-3", "trainer.lrr=1"), "there is no key 'trainer.lrr'"),
        (("algorithm.advantage=grpo,grppo",), "(job 1: +recipe=grpo_qwen algorithm.advantage=grppo)"),
        (("trainer.lr=1e-4,quick",), "(job 1: "),
        (("run_root=a,b",), "run_root"),
        (("seed=0,1", "resume=auto"), "a sweep's jobs are new runs"),
        (("seed=0,1", "hydra.sweeper.max_batch_size=1"), "hydra.launcher.parallel"),
        (("seed=0,1", "hydra.launcher.parallel=0"), "hydra.launcher.parallel"),
    ],
)
def test_bad_input_in_any_job_is_found_before_the_first_starts(
    overrides: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["-m", "+recipe=grpo_qwen", *overrides]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert said.count("error:") == 1
    assert not list(tmp_path.rglob("sweep.json"))
    assert not list(tmp_path.rglob("log.txt")), "no job was started"


QUICK = (
    "rollout=torch",
    "steps=1",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.problems=20",
    "checkpoint.export=false",
    "checkpoint.keep_best=false",
)


def sweep(root: Path, *overrides: str, seconds: int = 280) -> subprocess.CompletedProcess[str]:
    words = command(*QUICK, *overrides)
    words.remove("cluster.threads=1")
    env = environment()
    env.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [*words[:3], "-m", *words[3:]], cwd=root, capture_output=True, text=True, timeout=seconds, check=False, env=env
    )


def outcome(root: Path) -> list[dict[str, Any]]:
    (folder,) = (root / "runs").iterdir()
    return read_comparison(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_fails_ends_no_other(tmp_path: Path) -> None:
    with socket.socket() as taken:  # as by another cluster of this machine
        with suppress(OSError):
            taken.bind(("", DEFAULT_DASHBOARD_AGENT_LISTEN_PORT))
            taken.listen()
        done = sweep(tmp_path, "model.path=/nowhere,bundled:arithmetic")
    assert "sweep.md" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1, done.stdout + done.stderr
    bad, good = outcome(tmp_path)
    assert (bad["status"], bad["exit_code"]) == ("failed", 2)
    assert "there is no model folder '/nowhere'" in bad["error"]
    assert good["status"] == "finished", done.stdout
    assert good["steps"] == 1
    assert 0 <= good["final"] <= 1
    assert "Traceback" not in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert "step 1/1" in (folder / "1" / "log.txt").read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_six_jobs_of_which_one_fails_by_design(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def graded(response, task, *, run):\n"
        "    if run == '1-rloo':\n        raise RuntimeError('broken by design')\n"
        "    return float(task['answer'] == response)\n"
    )
    done = sweep(
        tmp_path,
        "steps=2",
        "eval.every=1",
        "reward.parts.correct.use=mine.graded",
        "reward.parts.correct.args.run='${seed}-${algorithm.advantage}'",
        "seed=0,1,2",
        "algorithm.advantage=grpo,rloo",
        seconds=800,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = outcome(tmp_path)
    assert [row["differs"] for row in rows] == [
        [f"seed={seed}", f"algorithm.advantage={name}"] for seed in (0, 1, 2) for name in ("grpo", "rloo")
    ]
    failed = [row for row in rows if row["status"] != "finished"]
    assert [row["differs"] for row in failed] == [["seed=1", "algorithm.advantage=rloo"]]
    assert "broken by design" in failed[0]["error"]
    assert all(row["steps"] == 2 and row["final"] is not None for row in rows if row["status"] == "finished")
    (folder,) = (tmp_path / "runs").iterdir()
    page = (folder / "sweep.md").read_text()
    assert page.count("| `seed=") == 6
    assert "- job 3 (`seed=1 algorithm.advantage=rloo`), failed: " in page
    assert (folder / "sweep.png").is_file()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_goes_by_held_out_accuracy(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    search = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=2")
    done = sweep(tmp_path, *search, "eval.every=1", "trainer.lr=tag(log,interval(1e-5,1e-3))")
    assert done.returncode == 2
    assert "hydra.sweeper.direction=maximize" in done.stderr
    assert not (tmp_path / "runs").exists() or not list(tmp_path.rglob("log.txt"))
    done = sweep(
        tmp_path,
        *search,
        "hydra.sweeper.direction=maximize",
        "eval.every=1",
        "trainer.lr=tag(log,interval(1e-5,1e-3))",
        seconds=800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = [path.parent for path in tmp_path.rglob("sweep.json")]
    rows = read_comparison(folder)
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert len({row["overrides"][-1] for row in rows}) == 1, "as many threads each"
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(row["final"] for row in rows)
