"""The batch script under a real Slurm: controller, node daemon and munge of the test's own, on this machine."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hosts import REPOSITORY, wait_until
from running import SMALL, only_run, steps_of
from training_batches import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "sacct")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(MISSING), reason=f"wants Slurm and munge: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="wants root, as whom the daemons run"),
    pytest.mark.skipif(not (REPOSITORY / ".venv").exists(), reason="the script takes the checkout's .venv"),
]
SCRIPT = "launch/slurm/rlsys.sbatch"
RUN_S = 300.0
CONF = """
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MpiDefault=none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class Slurm:
    """A cluster of one node."""

    def __init__(self, folder: Path):
        self.folder, self.environment = folder, os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += ":/usr/sbin"
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(1024))
        (folder / "munge" / "key").chmod(0o400)
        ports = {"controller": free_port(), "node": free_port()}
        host = socket.gethostname().partition(".")[0]
        text = CONF.format(host=host, folder=folder, cores=os.cpu_count(), **ports)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        munge = folder / "munge"
        options = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self.run("munged", "--force", f"--socket={munge / 'socket'}", *options)
        self.run("slurmctld")
        self.run("slurmd")
        wait_until(lambda: "idle" in self.run("sinfo", "--noheader"), "the node is idle", 60.0)

    def run(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        return re.search(r"JobState=(\w+)", self.run("scontrol", "show", "job", job))[1]  # type: ignore[index]

    def close(self) -> None:
        for path in (self.folder / "slurmd.pid", self.folder / "slurmctld.pid", self.folder / "munge" / "pid"):
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("slurm"))
    yield made
    made.close()


def test_the_controller_would_take_the_job(slurm: Slurm) -> None:
    said = slurm.run("sbatch", "--test-only", "--nodes=1", SCRIPT, "+recipe=grpo_qwen", "steps=200", "resume=auto")
    assert re.search(r"Job \d+ to start at", said)


def test_more_than_there_is_is_refused(slurm: Slurm) -> None:
    assert "not available" in slurm.run("sbatch", "--test-only", "--nodes=4", SCRIPT, "+recipe=grpo_qwen", check=False)


def test_a_job_trains_and_leaves_nothing(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    recipe = ("+recipe=grpo_qwen", *SMALL, "rollout=torch", "data.prompts_per_step=4", "eval.every=0", "steps=2")
    said = slurm.run("sbatch", "--nodes=1", f"--output={log}", SCRIPT, *recipe, f"run_root={tmp_path / 'runs'}")
    job = re.search(r"Submitted batch job (\d+)", said)[1]  # type: ignore[index]
    wait_until(lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the job ends", RUN_S)
    assert slurm.state(job) == "COMPLETED", log.read_text(encoding="utf-8")
    assert len(steps_of(only_run(tmp_path))) == 2
    assert not list(REPOSITORY.glob(f".rlsys-{job}.*")), "the folder that the nodes shared is gone"
    assert not Path(f"/tmp/rlsys-{job}").exists()
