"""``python -m rlsys.launch -m …``: a sweep's jobs as Ray jobs, side by side as far as the cluster has room.

Hydra imports this module at every start, so torch and Ray are imported where they are used. Hydra's sweepers say which
jobs there are; everything about running them is in ``rlsys/cluster/sweep.py``, about comparing them in
``rlsys/tracking/compare.py``.
"""

from __future__ import annotations

import atexit
import copy
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict, read_write

if TYPE_CHECKING:
    from rlsys.cluster.sweep import Sweep, SweepJob
    from rlsys.config.schema import RunConfig
    from rlsys.tracking.compare import Result, SweepDisplay

_OWN = ("run_root", "submit")  # a sweep has one of each, for all its jobs


class RayJobLauncher(Launcher):
    """Runs jobs on the cluster that the configuration names, or on one of this machine that it starts.

    Args:
        parallel: at most so many at once; None: as many as the cluster has room for.
    """

    def __init__(self, parallel: int | None = None) -> None:
        self.parallel = parallel
        self._sweep: Sweep | None = None
        self._display: SweepDisplay | None = None
        self._count = 0  # of the first batch: a search's later, smaller ones compute with as many threads

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Raises UserError for settings of the sweeper that do not go with it."""
        from rlsys.config.errors import UserError

        self.hydra_context, self.config = hydra_context, config
        if self.parallel is not None and (not isinstance(self.parallel, int) or self.parallel < 1):
            raise UserError(
                f"{self.parallel} jobs at once", where="hydra.launcher.parallel", fix="give a positive number"
            )
        sweeper = config.hydra.sweeper
        if sweeper.get("max_batch_size") is not None:
            raise UserError(
                "batches would wait for their slowest job, and a failed job would end the sweep",
                where="hydra.sweeper.max_batch_size",
                fix="set hydra.launcher.parallel: at most so many jobs at once",
            )
        self._searches = sweeper.get("direction") is not None
        if self._searches and "maximize" not in str(sweeper.direction):
            raise UserError(
                "a job's result is its held-out accuracy, and the search would look for the lowest",
                where="hydra.sweeper.direction",
                fix="add hydra.sweeper.direction=maximize",
            )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Checks every job, runs them all, and writes and prints how they compare.

        Raises:
            UserError: bad input in one of the jobs; none was started.
        """
        from rlsys.config.errors import UserError
        from rlsys.tracking.compare import write_comparison

        setup_globals()
        folder = Path(str(self.config.hydra.sweep.dir)).expanduser().absolute()
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        try:
            composed = [self._compose(list(overrides), n) for n, overrides in zip(numbers, job_overrides, strict=True)]
            configs = [self._checked(*each) for each in zip(numbers, composed, job_overrides, strict=True)]
            if self._sweep is None:
                self._begin(configs, folder)
            self._count = self._count or min(len(configs), self.parallel or len(configs))
            assert self._sweep is not None
            assert self._display is not None
            jobs = [
                self._job(n, overrides, config, folder)
                for n, overrides, config in zip(numbers, job_overrides, configs, strict=True)
            ]
        except UserError:
            if initial_job_idx == 0 and not any(folder.glob("*/")):
                shutil.rmtree(folder, ignore_errors=True)  # nothing began, nothing is left behind
            raise
        title = f"Sweep of {configs[0].name}"
        try:
            with self._display:
                results = self._sweep.run(jobs)
        finally:
            self._display.finish(write_comparison(folder, self._sweep.results, title), folder)
        return [_returned(*each) for each in zip(composed, jobs, results, strict=True)]

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(composed):
            composed.hydra.job.id = str(number)
            composed.hydra.job.num = number
        return composed

    def _checked(self, number: int, composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
        """What a run would refuse before it starts anything, said of the job that it is in."""
        from rlsys.config.build import build
        from rlsys.config.compose import overridden_keys, to_plain
        from rlsys.config.errors import UserError
        from rlsys.config.ignored import refuse_ignored
        from rlsys.controller.trial import try_out

        try:
            config = build(to_plain(_without_hydra(composed)))
            refuse_ignored(config, overridden_keys(overrides))
            try_out(config)
        except UserError as error:
            where = f"{error.where or ''} (job {number}: {' '.join(filter_overrides(overrides))})".strip()
            raise UserError(error.what, where=where, fix=error.fix) from None
        if config.resume is not None:
            raise UserError("a sweep's jobs are new runs", where="resume", fix="leave it out")
        if self._searches and not config.eval.every:
            raise UserError(
                "a search goes by held-out accuracy, and there is none", where="eval.every", fix="set it to 1 or more"
            )
        return config

    def _begin(self, configs: Sequence[RunConfig], folder: Path) -> None:
        """Finds or starts the cluster."""
        from rlsys.cluster.sweep import open_sweep
        from rlsys.config.errors import UserError
        from rlsys.tracking.compare import SweepDisplay

        for name in _OWN:
            if any(getattr(config, name) != getattr(configs[0], name) for config in configs):
                raise UserError("all jobs of a sweep have the same", where=name, fix="give one value")
        self._display = SweepDisplay()
        stack = ExitStack()
        atexit.register(stack.close)  # a sweeper may ask for more jobs later, and does not say when it is done
        self._sweep, self._topology = open_sweep(
            stack, configs, folder, limit=self.parallel, changed=self._display.update
        )

    def _job(self, number: int, overrides: Sequence[str], config: RunConfig, folder: Path) -> SweepJob:
        from rlsys.cluster.sweep import prepared

        words = tuple(filter_overrides(overrides))
        return prepared(number, words, config, folder / str(number), self._topology, self._count)


class _Return(JobReturn):
    """Raises what a failed job is reported by, without a line of Hydra's about it: the table has said it."""

    @property
    def return_value(self) -> Any:
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _returned(composed: DictConfig, job: SweepJob, result: Result) -> JobReturn:
    """What Hydra's sweepers are told: the held-out accuracy, or why there is none."""
    from rlsys.config.errors import JobFailed
    from rlsys.tracking.compare import objective

    value: Any = objective(result)
    failed = result.status != "finished"
    returned = _Return(
        overrides=list(job.overrides),
        cfg=_without_hydra(composed),
        working_dir=str(job.folder),
        task_name="rlsys",
        status=JobStatus.FAILED if failed else JobStatus.COMPLETED,
    )
    returned.return_value = JobFailed(f"job {job.number} {result.status}: {result.error}") if failed else value
    return returned


def _without_hydra(composed: DictConfig) -> DictConfig:
    plain = copy.deepcopy(composed)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    return plain
