"""The scripts for Slurm and for a pair of Sparks on two hosts of their own: namespaces with a network each.

Slurm's part is played by the test: it starts ``node.sh`` on every node with Slurm's variables. ssh and sshd are real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from hosts import REPOSITORY, Host, hosts, wait_until, why_not
from running import SMALL, only_run, said_at_the_end, steps_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}"),
    pytest.mark.skipif(not (REPOSITORY / ".venv").exists(), reason="the scripts take the checkout's .venv"),
]
RUN_S = 400
RECIPE = ("+recipe=grpo_qwen", *SMALL, "rollout=torch", "data.prompts_per_step=4", "eval.every=0")
RAYS = ("raylet", "gcs_server", "site-packages/ray/", "ray::", "ray start")


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Sequence[Host]]:
    with hosts(2, tmp_path) as made:
        yield made


def ray_processes(host: Host) -> list[str]:
    """What of Ray runs on a host."""
    inside = os.readlink(f"/proc/{host.init}/ns/pid")
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if os.readlink(f"/proc/{process.pid}/ns/pid") == inside and any(each in line for each in RAYS):
                found.append(line)
        except (OSError, psutil.Error):
            continue
    return found


def start_nodes(made: Sequence[Host], root: Path, *overrides: str) -> list[subprocess.Popen[str]]:
    """As srun does on every node of an allocation."""
    shared = root / "shared"
    shared.mkdir()
    (shared / "token").touch(mode=0o600)
    (shared / "token").write_text(os.urandom(32).hex())
    run = (*RECIPE, "trainer.ranks=2", f"run_root={root / 'runs'}", *overrides)
    return [
        host.popen(
            str(REPOSITORY / "launch" / "slurm" / "node.sh"),
            *run,
            log=root / f"node-{rank}",
            SLURM_PROCID=str(rank),
            SLURM_NNODES=str(len(made)),
            SLURM_JOB_ID="4711",
            RLSYS_SHARED=str(shared),
            RLSYS_HOME=str(REPOSITORY),
            RLSYS_INTERFACE="fast0",
            RLSYS_START_S="200",
            RLSYS_TEMP="/tmp/ray",
        )
        for rank, host in enumerate(made)
    ]


def test_the_nodes_of_an_allocation_train_together_and_leave_nothing_behind(
    two: Sequence[Host], tmp_path: Path
) -> None:
    nodes = start_nodes(two, tmp_path, "steps=2")
    codes = [node.wait(RUN_S) for node in nodes]
    assert codes == [0, 0], [(tmp_path / f"node-{rank}").read_text() for rank in range(2)]
    assert len(steps_of(only_run(tmp_path))) == 2
    assert (tmp_path / "shared" / "status").read_text().strip() == "0"
    assert all(host.received("fast0") > 1_000_000 for host in two)
    for host in two:
        wait_until(lambda host=host: not ray_processes(host), f"Ray ends on {host.name}")


def test_a_job_that_is_asked_to_stop_writes_its_last_checkpoint(two: Sequence[Host], tmp_path: Path) -> None:
    nodes = start_nodes(two, tmp_path, "steps=2000", "checkpoint.every=1000")
    wait_until(
        lambda: any(tmp_path.glob("runs/*/metrics.jsonl")) or nodes[0].poll() is not None, "the first step", RUN_S
    )
    (tmp_path / "shared" / "stop").touch()
    assert nodes[0].wait(RUN_S) == 130, (tmp_path / "node-0").read_text()
    assert nodes[1].wait(60) == 0
    folder = only_run(tmp_path)
    assert said_at_the_end(folder) == "stopped on request"
    assert list((folder / "checkpoints").glob("step-*"))


def accept_ssh(host: Host, root: Path) -> Path:
    """Starts an sshd there; returns a folder with an ``ssh`` that it lets in."""
    programs = root / "programs"
    programs.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    options = [f"HostKey={root / 'host'}", f"AuthorizedKeysFile={root / 'user.pub'}", "PermitRootLogin=yes"]
    options += ["StrictModes=no", "UsePAM=no", f"ListenAddress={host.address}", "PidFile=none"]
    given = [word for option in options for word in ("-o", option)]
    host.popen(str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null", *given, log=root / "sshd")
    (root / "known").write_text(f"{host.address} {(root / 'host.pub').read_text()}")
    wait_until(lambda: "listening" in (root / "sshd").read_text(), "sshd listens")
    (programs / "ssh").write_text(
        f'#!/bin/bash\nexec {shutil.which("ssh")} -i {root / "user"} -o UserKnownHostsFile={root / "known"} "$@"\n'
    )
    (programs / "ssh").chmod(0o755)
    return programs


@pytest.mark.skipif(shutil.which("sshd") is None, reason="no sshd on the path")
def test_a_pair_of_sparks_trains_on_one_and_samples_on_the_other(two: Sequence[Host], tmp_path: Path) -> None:
    here, other = two
    variables = {
        "PATH": f"{accept_ssh(other, tmp_path)}:{os.environ['PATH']}",
        "RLSYS_START_S": "200",
        "RLSYS_TEMP": "/tmp/ray",
    }
    placed = ("cluster.placement=disaggregated", f"run_root={tmp_path / 'runs'}", "steps=2")
    command = (str(REPOSITORY / "launch" / "spark_pair" / "run.sh"), f"root@{other.address}", *RECIPE, *placed)
    refused = here.popen(*command, log=tmp_path / "refused", **variables)
    assert refused.wait(60) == 2
    assert "RLSYS_ANY_LINK=1" in (tmp_path / "refused").read_text()  # it is no link of 200 Gb/s

    # Two hosts without GPUs are no cluster=gb10_pair; the same placement on them.
    run = here.popen(*command, log=tmp_path / "said", RLSYS_ANY_LINK="1", RLSYS_CLUSTER="cluster=ray", **variables)
    assert run.wait(RUN_S) == 0, (tmp_path / "said").read_text()
    assert len(steps_of(only_run(tmp_path))) == 2
    assert other.received("fast0") > 3_000_000  # weights, twice
    for host in two:
        wait_until(lambda host=host: not ray_processes(host), f"Ray ends on {host.name}")
    left = [Path(f"/proc/{host.init}/root/tmp/ray").glob("rlsys-pair.*") for host in two]
    assert [list(found) for found in left] == [[], []]
