"""Runs handed to a cluster: what is sent, what is refused before anything is, logs, exit codes, ``rlsys jobs``."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from running import RUN_S, SMALL, command, environment

from rlsys import cli
from rlsys import launch as command_line
from rlsys.cluster import jobs, submission
from rlsys.cluster.submission import (
    Request,
    check_upload,
    inner_address,
    is_here,
    job_overrides,
    runtime_env,
    upload_sizes,
)
from rlsys.config.errors import UserError

# --- what is sent ---


def test_the_job_runs_the_same_command_on_the_cluster_that_it_is_in() -> None:
    given = ["+recipe=grpo_qwen", "trainer.lr=1e-4", "submit=env.yaml", "++cluster.address=head:6379", "run_root=runs"]
    kept = ["+recipe=grpo_qwen", "trainer.lr=1e-4"]
    assert job_overrides(given, kind="gpu_pool", address="head:6379") == [
        *kept,
        "cluster.address='head:6379'",
        "submit=false",
    ]
    assert job_overrides([*given, "cluster=local"], kind="local", address=None) == [
        *kept,
        "cluster=ray",
        "cluster.address='auto'",
        "submit=false",
    ]
    assert "cluster=gpu_pool" in job_overrides(["cluster=gpu_pool"], kind="gpu_pool", address=None)


@pytest.mark.parametrize(
    ("reached_by", "called"),
    [
        ("10.0.0.1:6379", "10.0.0.1:6379"),
        ("http://head:8265", "auto"),
        ("127.0.0.1:6379", "auto"),
        ("auto", "auto"),
        (None, "auto"),
    ],
)
def test_what_a_job_calls_its_cluster(reached_by: str | None, called: str) -> None:
    assert inner_address(reached_by) == called


def test_variables_go_along_only_where_the_file_names_them(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text("env_vars: {HF_TOKEN: , URL: 'https://${HOST}/', N: 3}\nworking_dir: code\n")
    (tmp_path / "code").mkdir()
    here = {"HF_TOKEN": "hf_secret", "HOST": "head", "WANDB_API_KEY": "other"}
    sent = runtime_env(str(tmp_path / "env.yaml"), tmp_path, here)
    assert sent["env_vars"] == {
        "HF_TOKEN": "hf_secret",
        "URL": "https://head/",
        "N": "3",
        "RAY_JOB_STOP_WAIT_TIME_S": str(submission.STOP_GRACE_S),
    }
    assert sent["working_dir"] == str(tmp_path / "code")
    assert "hf_secret" not in repr(Request("true", sent))
    assert set(runtime_env(True, tmp_path, here)["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}
    with pytest.raises(UserError, match="HF_TOKEN is not set") as refused:
        runtime_env(str(tmp_path / "env.yaml"), tmp_path, {"HOST": "head"})
    assert refused.value.where == "env_vars.HF_TOKEN"


def test_an_image_takes_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "env.yaml").write_text("image_uri: registry.example/rlsys:1\n")
    sent = runtime_env(str(tmp_path / "env.yaml"), tmp_path, {})
    assert sent["image_uri"] == "registry.example/rlsys:1"
    assert "working_dir" not in sent


@pytest.mark.parametrize("text", ["image: a\n", "- a\n", "env_vars: [A]\n", "excludes: a\n", "{", "\x80", None])
def test_a_file_that_is_no_runtime_environment_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "env.yaml"
    if text is not None:
        path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"runtime environment|mapping|excludes") as refused:
        runtime_env(str(path), tmp_path, {})
    assert "env.yaml" in str(refused.value.where)


def test_what_is_ignored_is_not_sent_and_what_is_too_large_is_named(tmp_path: Path) -> None:
    for name in ("train.py", "runs/a/metrics.jsonl", "cache/big.bin", "models/m/model.safetensors", ".git/objects/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    (tmp_path / ".gitignore").write_text("cache/\n")
    excluded = submission.leftovers("runs", tmp_path)
    names = {str(path) for path in upload_sizes(tmp_path, excluded)}
    assert names == {"train.py", "models/m/model.safetensors", ".gitignore"}

    sent = {"working_dir": str(tmp_path), "excludes": excluded}
    check_upload(sent, tmp_path)
    with (tmp_path / "models" / "m" / "model.safetensors").open("r+b") as file:
        file.truncate(submission.UPLOAD_BYTES + 1)
    with pytest.raises(UserError, match="models/m 100") as refused:
        check_upload(sent, tmp_path)
    assert ".gitignore" in str(refused.value.fix)
    (tmp_path / ".rayignore").write_text("models\n")
    check_upload(sent, tmp_path)


def test_a_home_folder_stays_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    (tmp_path / "me" / "work").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "me"):
        with pytest.raises(UserError, match="home folder would go along"):
            check_upload(runtime_env(True, folder, {}), folder)
    check_upload(runtime_env(True, tmp_path / "me" / "work", {}), tmp_path)


def test_what_this_machine_is_called() -> None:
    assert is_here(["127.0.0.1"])
    assert not is_here(["127.0.0.1", "203.0.113.7"])


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    ended: Any = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code)
    assert jobs.exit_code(ended) == expected


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("submit=true",), "no cluster was named"),
        (("submit=true", "cluster=ray", "cluster.address=127.0.0.1:1"), "no job API answers at '127.0.0.1:1'"),
        (("submit=true", "cluster=ray", "algorithm.advantage=grppo"), "did you mean 'grpo'"),
        (("submit=env.yaml", "cluster=ray"), "cannot read the runtime environment"),
        (("submit=true", "cluster=ray", "name=hf_abcdefghijklmnopqrstuvwxyz"), "looks like a secret"),
    ],
)
def test_bad_input_is_found_before_anything_is_sent(
    overrides: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert command_line.main(["+recipe=grpo_qwen", *overrides]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said
    assert said.count("error:") == 1
    assert not any(tmp_path.iterdir())


# --- a real cluster ---

_HEAD = """
import sys, ray
from rlsys.cluster.session import free_agent_port
with free_agent_port():
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=True, object_store_memory=200 << 20, log_to_driver=False,
        _temp_dir=sys.argv[1],
    )
print("at", context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a cluster of its own, which finds this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    short = tmp_path_factory.getbasetemp() / "r"  # sockets have short names
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD, str(short)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(PATH=path),
    )
    try:
        assert head.stdout is not None
        address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
        yield address
    finally:
        head.communicate(timeout=60)


@pytest.fixture(scope="module")
def client(cluster: str) -> Any:
    return jobs.client_of(cluster)


@pytest.mark.ray
@pytest.mark.slow
def test_a_log_is_followed_to_the_end_and_the_exit_code_is_the_jobs(client: Any, cluster: str, capsys: Any) -> None:
    heard: list[str] = []
    job = Request("for i in 1 2 3; do echo line $i; sleep 0.4; done; exit 3", {}, what="three lines").send(client)
    details = jobs.follow(client, job, heard.append)
    text = "".join(heard)
    assert [line for line in text.splitlines() if line.startswith("line ")] == ["line 1", "line 2", "line 3"]
    assert len(heard) > 1, "it came while the job ran"
    assert jobs.exit_code(details) == 3
    assert cli.main(["jobs", "logs", job, "--address", cluster]) == 0
    assert "line 3" in capsys.readouterr().out
    assert cli.main(["jobs", "logs", job, "--follow", "--address", cluster]) == 3
    printed = Console(file=io.StringIO(), width=200)
    printed.print(jobs.table_of(client.list_jobs()))
    row = next(line for line in printed.file.getvalue().splitlines() if job in line)  # type: ignore[attr-defined]
    assert "three lines" in row
    assert "failed (3)" in row


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_that_is_stopped_has_time_to_end(client: Any, cluster: str, capsys: Any) -> None:
    grace = runtime_env(True, Path("/"), {})["env_vars"]
    job = Request("trap 'sleep 4; echo saved; exit' TERM; echo began; sleep 60 & wait", {"env_vars": grace}).send(
        client
    )
    heard: list[str] = []

    def write(text: str) -> None:
        heard.append(text)
        if "began" in "".join(heard) and not any("asked" in each for each in heard):
            heard.append("asked")
            assert cli.main(["jobs", "stop", job, "--address", cluster]) == 0

    assert jobs.exit_code(jobs.follow(client, job, write)) == 130
    assert "saved" in "".join(heard), "longer than the three seconds that Ray gives by itself"
    assert cli.main(["jobs", "stop", job, "--address", cluster]) == 2
    assert "ended already" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_an_unknown_job_is_bad_input(cluster: str, capsys: Any) -> None:
    assert cli.main(["jobs", "logs", "nobody", "--address", cluster]) == 2
    assert "there is no job 'nobody'" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_run_ends_well_and_a_failing_one_with_its_code(cluster: str, client: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def ones(response, task):\n    return float(task['prompt'][0] == '1')\n")
    quick = ("rollout=torch", "steps=1", "data.prompts_per_step=4", "eval.every=0", "checkpoint.export=false")
    own = ("submit=true", "cluster=ray", f"cluster.address={cluster}", "reward.parts.correct.use=mine.ones")

    def submit(*overrides: str) -> subprocess.CompletedProcess[str]:
        words = command(*quick, *own, *overrides)
        env = environment()
        env.pop("RAY_ADDRESS", None)
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_S, check=False, env=env)

    done = submit()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 1/1" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "summary.json").is_file(), "in the folder that the command was given in"
    failed = submit("model.path=/nowhere")
    assert failed.returncode == 2
    assert "model.path" in failed.stdout
    assert SMALL[0] in failed.stdout, "the command line of the job is in its log"
