"""A sweep's jobs on a cluster: what each needs, which may start, and how each ended. One that fails ends no other."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlsys.cluster import jobs
from rlsys.cluster.memory import Device, Sizes, phases
from rlsys.cluster.placement import Plan, place, plan
from rlsys.cluster.session import INLINE_BYTES, free_agent_port, object_store_bytes
from rlsys.cluster.shape import take_part
from rlsys.cluster.submission import (
    STOPS_IN_TIME,
    Request,
    check_upload,
    is_here,
    job_overrides,
    leftovers,
    quoted,
    refuse_secrets,
    runtime_env,
    shared_run_root,
)
from rlsys.cluster.topology import Topology
from rlsys.config.assets import bundled_model
from rlsys.config.clusters import address_of
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.tracking.compare import Result, run_folder_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_POLL_S = 0.5
_LOST_S = 120.0
_STOP_S = 150.0  # for checkpoints of jobs that were asked to stop
_PROCESS_BYTES = 600 << 20  # of one Python process with torch loaded: measured on a CPU


@dataclass(frozen=True)
class Need:
    """What a job takes from the pool while it runs."""

    gpus: float
    cores: int
    memory: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(self.gpus + other.gpus, self.cores + other.cores, self.memory + other.memory)

    def fits(self, pool: Need) -> bool:
        return self.gpus <= pool.gpus and self.cores <= pool.cores and self.memory <= pool.memory


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep. overrides: of its command line; folder: its own, in which it makes its run folder."""

    number: int
    overrides: tuple[str, ...]
    config: RunConfig
    folder: Path
    need: Need = Need(0, 1)


def pool_of(topology: Topology) -> Need:
    """All of a cluster; memory 0 where Ray does not say how much there is."""
    memory = sum(node.memory_gib for node in topology.nodes)
    return Need(topology.gpus, topology.cores, int(memory * 2**30))


def cores_each(topology: Topology, count: int) -> int:
    """CPU cores of each of ``count`` jobs on a pool without GPUs: so many that all run at once, at least one; none
    spans two hosts."""
    hosts = sorted(node.cores for node in topology.nodes if node.cores) or [1]
    for cores in range(hosts[-1], 1, -1):
        if sum(host // cores for host in hosts) >= count:
            return cores
    return 1


def thread_counts(workers: Mapping[str, int], *, apart: bool) -> int:
    """How many of a run's actors compute at the same time, without GPUs: those of one role take turns with the others',
    unless samplers have cores of their own.

    Args:
        workers: actors by role.
    """
    sampling = workers.get("rollout", 0)
    training = max((count for role, count in workers.items() if role not in ("rollout", "reward")), default=0)
    return max(1, sampling + training if apart else max(sampling, training))


def admitted(waiting: Sequence[SweepJob], running: Iterable[SweepJob], pool: Need, limit: int | None) -> list[SweepJob]:
    """Those that may start now, in their order; a smaller one may pass a larger one that has to wait.

    Args:
        limit: of jobs at once; None: as many as fit.
    """
    busy = list(running)
    taken = sum((job.need for job in busy), Need(0, 0))
    started: list[SweepJob] = []
    for job in waiting:
        if limit is not None and len(busy) + len(started) >= limit:
            break
        if (taken + job.need).fits(pool):
            started.append(job)
            taken = taken + job.need
    return started


def refuse_too_large(sweep: Iterable[SweepJob], pool: Need) -> None:
    """Raises UserError for a job that does not fit into the empty pool: it would wait for ever."""
    for job in sweep:
        if not job.need.fits(pool):
            lacking = [
                f"{wanted:g} {what} of {there:g}"
                for what, wanted, there in (
                    ("GPUs", job.need.gpus, pool.gpus),
                    ("CPU cores", job.need.cores, pool.cores),
                    ("GiB of memory", round(job.need.memory / 2**30, 1), round(pool.memory / 2**30, 1)),
                )
                if wanted > there
            ]
            raise UserError(
                f"job {job.number} needs {', '.join(lacking)} that the cluster has",
                where=shlex.join(job.overrides),
                fix="lower trainer.ranks, rollout.workers or cluster.threads, or choose a smaller model",
            )


class Sweep:
    """Runs batches of jobs (a sweeper may ask for several, one after the other) and keeps what came of all of them.

    Args:
        address: of the cluster, as jobs reach it.
        environment: Ray's runtime environment of the jobs; None: they run in this folder, on this machine.
        limit: of jobs at once; None: as many as the pool has room for.
        changed: told of all results so far, a few times a second.
    """

    def __init__(
        self,
        client: JobSubmissionClient,
        pool: Need,
        *,
        address: str | None,
        environment: Mapping[str, Any] | None,
        limit: int | None = None,
        changed: Callable[[Sequence[Result]], object] = lambda _: None,
    ):
        self._client, self._pool, self._environment, self._limit = client, pool, environment, limit
        self._address, self._changed = address, changed
        self.results: list[Result] = []

    def run(self, sweep: Sequence[SweepJob]) -> list[Result]:
        """Runs these to their ends.

        Returns:
            What came of each, in the order given. After Ctrl-C those that had begun were asked to stop, and the rest
            never starts; then KeyboardInterrupt goes on.

        Raises:
            UserError: one is larger than the pool, or the cluster has not answered for two minutes.
        """
        refuse_too_large(sweep, self._pool)
        first = len(self.results)
        self.results += [
            Result(job.number, job.overrides, "waiting", job.folder, steps=job.config.steps) for job in sweep
        ]
        waiting, running = list(sweep), dict[str, SweepJob]()
        try:
            while waiting or running:
                for job in admitted(waiting, running.values(), self._pool, self._limit):
                    waiting.remove(job)
                    running[self._start(job)] = job
                self._look(running)
                self._changed(self.results)
                if running:
                    time.sleep(_POLL_S)
        except KeyboardInterrupt:
            self._stop(running)
            for job in waiting:
                self._set(job.number, status="stopped", error="never started")
            self._changed(self.results)
            raise
        return self.results[first:]

    def _start(self, job: SweepJob) -> str:
        job.folder.mkdir(parents=True, exist_ok=True)
        where = job_overrides(job.overrides, kind=job.config.cluster.kind, address=self._address)
        words = [*where, f"run_root={quoted(str(job.folder))}"]
        here = self._environment is None
        python = sys.executable if here else "python"
        command = shlex.join(["exec", python, "-m", "rlsys.launch", *words])
        request = Request(
            f"cd {shlex.quote(os.getcwd())} && {command}" if here else command,
            dict(self._environment or STOPS_IN_TIME),
            cpus=job.need.cores,
            what=f"sweep job {job.number}: {job.config.name}",
        )
        name = request.send(self._client)
        self._set(job.number, status="running", job=name)
        return name

    def _look(self, running: dict[str, SweepJob]) -> None:
        """Finds out which have ended, and what came of them."""
        deadline = time.monotonic() + _LOST_S
        for name, job in list(running.items()):
            while True:
                try:
                    details = self._client.get_job_info(name)
                    log = self._client.get_job_logs(name) if jobs.ended(details) else ""
                    break
                except (OSError, RuntimeError) as error:
                    if time.monotonic() > deadline:
                        raise UserError(
                            f"the cluster has not answered for {_LOST_S:g} s: {error}", where=name, fix="is it there?"
                        ) from error
                    time.sleep(_POLL_S)
            if jobs.ended(details):
                del running[name]
                (job.folder / "log.txt").write_text(log, encoding="utf-8")
                self._set(job.number, **_outcome(details, log, job.folder))
            else:
                self._set(job.number, seconds=_seconds(details))

    def _stop(self, running: dict[str, SweepJob]) -> None:
        for name in running:
            self._client.stop_job(name)
        deadline = time.monotonic() + _STOP_S
        while running and time.monotonic() < deadline:
            self._look(running)
            self._changed(self.results)
            time.sleep(_POLL_S)

    def _set(self, number: int, **fields: Any) -> None:
        (place,) = (i for i, result in enumerate(self.results) if result.number == number)
        self.results[place] = replace(self.results[place], **fields)


def _outcome(details: JobDetails, log: str, folder: Path) -> dict[str, Any]:
    code = jobs.exit_code(details)
    status = {"SUCCEEDED": "finished", "STOPPED": "stopped"}.get(details.status.value, "failed")
    error = "" if code == 0 else reason_of(log, folder) or str(details.message or "").strip()
    return {"status": status, "exit_code": code, "error": error, "seconds": _seconds(details)}


def _seconds(details: JobDetails) -> float:
    began = (details.start_time or 0) / 1000
    return round((details.end_time / 1000 if details.end_time else time.time()) - began, 1) if began else 0.0


_LAST_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit|Failed|Stop)\b.*", re.MULTILINE)
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


def reason_of(log: str, folder: Path) -> str:
    """Why a run failed: what it says itself, in its folder or its log; else the last line of a traceback.

    Args:
        folder: in which it made its run folder, if it came to that.
    """
    made = run_folder_of(folder)
    if made is not None and (made / "events.jsonl").is_file():
        events = [json.loads(line) for line in (made / "events.jsonl").read_text(encoding="utf-8").splitlines() if line]
        said = [str(event["text"]) for event in events if event.get("kind") == "end"]
        if said and said[-1] not in ("finished", "failed"):
            return said[-1]
    plain = _STYLE.sub("", log)
    if "error: " in plain:
        return "; ".join(" ".join(line.split()) for line in plain.rpartition("error: ")[2].strip().splitlines()[:3])
    lines = _LAST_LINE.findall(plain) or [line for line in plain.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# --- the cluster that it runs on ---


def open_sweep(
    stack: ExitStack,
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    limit: int | None = None,
    changed: Callable[[Sequence[Result]], object] = lambda _: None,
) -> tuple[Sweep, Topology]:
    """A sweep on the cluster that the configurations name, or on one of this machine that ends with ``stack``.

    Args:
        folder: of the sweep.
        limit, changed: as :class:`Sweep` has them.

    Raises:
        UserError: the jobs name different clusters, nobody is there, or the cluster does not see ``folder``.
    """
    first = configs[0]
    addresses = {address_of(config.cluster) for config in configs}
    if len(addresses) > 1:
        raise UserError("all jobs of a sweep run on one cluster", where="cluster.address", fix="give one address")
    (address,) = addresses
    environment = None
    if address is None and not (first.submit and os.environ.get("RAY_ADDRESS")):
        largest = max(object_store_bytes(_weights_bytes(config)) for config in configs)
        at_once = min(len(configs), limit or len(configs), os.cpu_count() or 1)
        dashboard, address = stack.enter_context(local_cluster(largest * at_once))
        client = jobs.client_of(dashboard)
    else:
        client = jobs.client_of(address)
        here = is_here(node["NodeManagerAddress"] for node in jobs.nodes_of(client) if node["Alive"])
        if first.submit or not here:
            shared_run_root(first.run_root, client)
            environment = runtime_env(first.submit, Path.cwd(), os.environ, exclude=leftovers(str(folder), Path.cwd()))
            check_upload(environment, Path.cwd())
    topology = jobs.topology_of(client)
    pool = pool_of(topology)
    return Sweep(client, pool, address=address, environment=environment, limit=limit, changed=changed), topology


def prepared(
    number: int, overrides: Sequence[str], config: RunConfig, folder: Path, topology: Topology, count: int
) -> SweepJob:
    """A job with what it needs. On a pool without GPUs its share of cores becomes ``cluster.threads``, unless that is
    given: so many that ``count`` jobs run side by side.

    Args:
        overrides: of its command line.
        folder: its own.

    Raises:
        UserError: the cluster is too small for it.
    """
    refuse_secrets(overrides)
    if topology.gpus:
        layout = place(config, take_part(config.cluster, topology))
        gpus = sum(bundle.get("GPU", 0.0) for bundle in layout.bundles)
        return SweepJob(number, tuple(overrides), config, folder, Need(gpus, 1))
    share = cores_each(topology, count)
    layout = plan(config, gpus=0, cores=share)
    workers = Counter(actor.role for actor in layout.actors)
    together = thread_counts(workers, apart=config.cluster.placement == "disaggregated")
    threads = config.cluster.threads or max(1, share // together)
    words = (*overrides, *(() if config.cluster.threads else (f"cluster.threads={threads}",)))
    processes = len(layout.actors) + 1
    memory = _PROCESS_BYTES * processes + _least_bytes(config, layout)
    return SweepJob(number, words, config, folder, Need(0, threads * together, memory))


def _model_folder(config: RunConfig) -> Path | None:
    """None: the model is not on this machine."""
    folder = Path(bundled_model(config.model.path)).expanduser()
    return folder if (folder / "config.json").is_file() else None


def _parameters(folder: Path) -> int:
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    element = 4 if str(said.get("dtype") or said.get("torch_dtype") or "float32") == "float32" else 2
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) // element


def _weights_bytes(config: RunConfig) -> int:
    """Of one copy in the sampler's dtype; 0 where the model is not here."""
    folder = _model_folder(config)
    return 0 if folder is None else _parameters(folder) * (2 if config.rollout.dtype == "bfloat16" else 4)


def _least_bytes(config: RunConfig, layout: Plan) -> int:
    """Of main memory, in the phase that needs most; 0 where the model is not here."""
    folder = _model_folder(config)
    if folder is None:
        return 0
    found = phases(config, Sizes.of(folder, _parameters(folder)), layout, Device(0, 0))
    return max(sum(parts.values()) for parts in found.values())


@contextmanager
def local_cluster(object_store_bytes: int) -> Iterator[tuple[str, str]]:
    """A Ray cluster of this machine with a job API, which ends with this process. Yields the addresses of its dashboard
    and of itself."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_max_direct_call_object_size", str(INLINE_BYTES))
    import ray

    with free_agent_port():
        context = ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            include_dashboard=True,
            object_store_memory=object_store_bytes,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
        )
    try:
        yield f"http://{context.address_info['webui_url']}", str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()
