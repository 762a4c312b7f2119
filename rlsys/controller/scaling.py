"""More or fewer samplers while a run goes on: ``rlsys scale RUN N`` leaves a wish in the run's folder, and the run
looks for one between two steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlsys.config.errors import UserError

if TYPE_CHECKING:
    from rlsys.cluster.placement import ActorSpec

FILE = "scale.json"


def add_parser(subparsers: Any) -> None:
    """Adds the sub-command ``scale``."""
    parser = subparsers.add_parser(
        "scale",
        help="more or fewer samplers for a run that goes on",
        description="Asks a run to go on with N rollout workers. New ones start beside the others and sample when they "
        "have the present weights; those that leave end what they are at first. The run looks for this after a step.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="its run folder")
    parser.add_argument("workers", type=int, metavar="N", help="rollout workers that it shall have, 1 or more")
    parser.set_defaults(handler=handle)


def handle(arguments: argparse.Namespace) -> int:
    """``rlsys scale``.

    Raises:
        UserError: no such run, it has ended, or N is less than 1.
    """
    from rlsys.checkpoint.atomic import write_json

    run, workers = arguments.run, arguments.workers
    if not (run / "config.yaml").is_file():
        raise UserError("this is no run", where=str(run), fix="give the path of runs/<time>-<name>")
    if (run / "summary.json").is_file():
        raise UserError("the run has ended", where=str(run), fix="resume it with rollout.workers=N instead")
    if workers < 1:
        raise UserError(f"a run cannot sample with {workers} workers", where="N", fix="give 1 or more")
    write_json(run / FILE, {"rollout_workers": workers})
    sys.stdout.write(f"{run.name} will go on with {workers} rollout workers after its present step\n")
    return 0


class Pool(Protocol):
    """The samplers' fleet."""

    def join(self, spec: ActorSpec) -> None: ...

    def leave(self, index: int) -> None: ...

    def leaving(self) -> list[int]: ...

    def next_index(self) -> int: ...


@dataclass(frozen=True)
class Scaling:
    """Follows the wish in a run's folder.

    specs: of the samplers that there are, by index. free_gpus: that nobody has booked. report: told what cannot be
    done. fixed: why their number cannot change; None: it can.
    """

    folder: Path
    fleet: Pool
    specs: Callable[[], dict[int, ActorSpec]]
    free_gpus: Callable[[], float]
    report: Callable[[str], None]
    fixed: str | None = None

    def look(self) -> None:
        """Does what the file asks for, once, and takes it away."""
        path = self.folder / FILE
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        path.unlink()
        try:
            wanted = max(int(json.loads(text)["rollout_workers"]), 1)
        except (ValueError, KeyError, TypeError) as error:
            self.report(f"{FILE} is not understood and was taken away ({error}): write it with `rlsys scale`")
            return
        if self.fixed is not None:
            self.report(f"the number of samplers stays: {self.fixed}")
            return
        leaving = set(self.fleet.leaving())
        specs = self.specs()
        staying = [index for index in sorted(specs) if index not in leaving]
        for index in staying[wanted:]:
            self.fleet.leave(index)
        if (more := wanted - len(staying)) > 0:
            self._join(specs[max(specs)], more)

    def _join(self, model: ActorSpec, more: int) -> None:
        free = self.free_gpus()
        room = more if not model.gpus else min(more, int(free // model.gpus))
        first = self.fleet.next_index()
        for index in range(first, first + room):
            # Anywhere in the cluster: the bundles that the run booked at its start are taken.
            self.fleet.join(replace(model, index=index, bundle=None, node=None))
        if room < more:
            self.report(
                f"{more - room} of {more} samplers cannot join: {free:g} GPUs are free, each takes {model.gpus:g}"
            )


def free_gpus() -> float:
    """Of the cluster, that nobody has booked."""
    import ray

    return float(ray.available_resources().get("GPU", 0.0))
