"""Real runs for tests: the command line as a user types it, or many jobs after one another in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
from composing import run_config

from rlsys.tracking.metrics import Line, read_metrics

RUN_S = 280  # longest that a run of a test may take: the machine may be busy
SMALL = ("tracker.display=plain", "cluster.threads=1")


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "rlsys.launch", "+recipe=grpo_qwen", *SMALL, *overrides]


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"COLUMNS": "200"} | variables


def launch(*overrides: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in ``cwd``, to its end."""
    return subprocess.run(
        command(*overrides),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
        env=environment(**variables),
    )


def run_folders(root: Path) -> list[Path]:
    """Run folders below ``root``, oldest first."""
    return sorted(path for path in (root / "runs").glob("*") if path.is_dir())


def only_run(root: Path) -> Path:
    (folder,) = run_folders(root)
    return folder


def steps_of(folder: Path) -> list[Line]:
    """Metrics of the steps that were trained, in order."""
    return [line for line in read_metrics(folder / "metrics.jsonl") if "reward/mean" in line]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def comparable(folder: Path) -> list[Line]:
    """The run's metrics without those that measure the machine, and what it lost."""
    lines = read_metrics(folder / "metrics.jsonl")
    measured = ("time/", "throughput/", "memory/", "share/", "idle/", "fleet/")
    return [
        {
            name: value
            for name, value in line.items()
            if not name.startswith(measured) and not (name.startswith("sync/") and name.endswith("_s"))
        }
        for line in lines
    ]


def tensors_below(folder: Path) -> dict[str, bytes]:
    """Content of every file of tensors below ``folder``."""
    return {name: content for name, content in files_below(folder).items() if name.endswith(".safetensors")}


def died_after(step: int, folder: Path, root: Path) -> Path:
    """A copy, below ``root/runs``, of a run that wrote checkpoints every step, as it would be had it been killed right
    after the checkpoint of ``step``."""
    copy = Path(shutil.copytree(folder, root / "runs" / folder.name))
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for path in (copy / "rollouts").iterdir():
        if int(path.stem.removeprefix("step-")) > step:
            path.unlink()
    write_jsonl(copy / "metrics.jsonl", [line for line in read_jsonl(copy / "metrics.jsonl") if line["step"] <= step])
    shutil.rmtree(copy / "model", ignore_errors=True)
    (copy / "summary.json").unlink()
    return copy


def said_at_the_end(folder: Path) -> str:
    """Why the run says that it ended."""
    return next(event["text"] for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "end")


def files_below(folder: Path) -> dict[str, bytes]:
    """Content of every file below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RunJob = Callable[..., int]


@contextmanager
def job_process() -> Iterator[RunJob]:
    """Runs jobs in one process of their own on one Ray cluster, which joins and leaves between jobs as users' would.

    Yields:
        ``run(root, *overrides, recipe=…)``: the exit code of that job; its run folder is below ``root/runs``.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        address = pool.submit(_start_cluster).result(RUN_S)

        def run(root: Path, *overrides: str, recipe: str = "grpo_qwen") -> int:
            cluster = (f"run_root={root / 'runs'}", "cluster=ray", f"cluster.address='{address}'")
            config = run_config(*SMALL, *cluster, *overrides, recipe=recipe)
            return pool.submit(_run_job, config).result(RUN_S)

        try:
            yield run
        finally:
            pool.submit(_stop_cluster).result(RUN_S)


_CLUSTERS: list[Any] = []


def _start_cluster() -> str:
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # actors find the plug-ins that tests bring
    resources = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False}
    _CLUSTERS.append(Cluster(initialize_head=True, head_node_args=resources))
    return str(_CLUSTERS[0].address)


def _stop_cluster() -> None:
    _CLUSTERS.pop().shutdown()


def _run_job(config: Any) -> int:
    from rlsys.controller.run import run_job

    return run_job(config)


def processes_marked(mark: str, *, within_s: float = 30.0) -> list[str]:
    """Command lines of processes with the environment variable RUN_OF_A_TEST=``mark``, once those that are ending had
    time to: Ray's own stop a moment after the run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RUN_OF_A_TEST") == mark:
                found.append(process)
    _, alive = psutil.wait_procs(found, timeout=within_s)
    return [" ".join(process.cmdline()) for process in alive]
