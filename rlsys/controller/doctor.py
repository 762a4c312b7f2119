"""Preflight of a run, and ``rlsys doctor``: the probes that a configuration asks for, the checks of its inputs among
them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

from rlsys.cluster.hardware import NODES
from rlsys.cluster.memory import Device, Sizes, check_phases, phases
from rlsys.cluster.placement import place
from rlsys.cluster.preflight import devices, network, nodes, software, storage
from rlsys.cluster.preflight.machine import Machine, look, torch_architectures
from rlsys.cluster.preflight.report import NAME, Finding, Issue, PreflightFailed, Probe, Report, run_probes
from rlsys.cluster.session import HostsFailed, Session, connect, object_store_bytes
from rlsys.cluster.topology import Topology, expected
from rlsys.cluster.unified import check_unified
from rlsys.config.clusters import Gb10Pair, LocalCluster, address_of
from rlsys.config.compose import compose_run
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.controller.inputs import Inputs, check_inputs, find_model
from rlsys.controller.trial import try_out
from rlsys.data.base import load_dataset
from rlsys.engines.footprint import gib
from rlsys.engines.train import check_backend
from rlsys.environments.base import ENVIRONMENTS
from rlsys.rewards.compose import build_parts
from rlsys.tracking.collapse import CollapseMonitor
from rlsys.tracking.run import resolve_resume
from rlsys.workers.waits import StopFlag

_BAD_INPUT = 2


@dataclass(frozen=True)
class Checked:
    """What a run begins with: its inputs, and what was looked at on the way."""

    inputs: Inputs
    report: Report


def preflight(config: RunConfig, machine: Machine | None = None) -> Checked:
    """What a run does before it makes a folder or starts a process.

    Args:
        machine: to look at; None: this one.

    Raises:
        UserError: what is wrong, every error of it.
    """
    kept: list[Inputs] = []

    def inputs() -> Finding:
        kept.append(check_inputs(config))
        return Finding({"parameters": kept[0].parameters, "training_rows": kept[0].train_rows})

    report = run_probes([Probe("inputs", inputs, "inputs_unusable")])
    found = kept[0] if kept else None
    report = report.joined(run_probes(surroundings(config, machine or look(), found), topology_of(config)))
    if not report.ok:
        raise PreflightFailed(report.errors)
    assert found is not None
    return Checked(found, report)


def check_cluster(config: RunConfig, session: Session, folder: Path, stop: StopFlag | None = None) -> None:
    """Looks at every node of the cluster, and adds it to the report in the run's folder.

    Raises:
        UserError: what is wrong with nodes, every error of it.
        StopRequested: ``stop`` was requested.
    """
    report = Report.read(folder / NAME).joined(nodes.check_nodes(look(), _link(config, session), stop=stop))
    report.write(folder)
    if not report.ok:
        raise PreflightFailed(report.errors)


def _link(config: RunConfig, session: Session) -> nodes.Link:
    """Between the hosts: on a pair of GB10 everything goes through one cable, which NCCL does not take by itself;
    elsewhere the topology does not say what a single interface has."""
    pair = isinstance(config.cluster, Gb10Pair)
    rate = NODES["gb10"].network_gbs * 8 if pair else 0.0
    return nodes.Link(session.env, rate, pair)


def topology_of(config: RunConfig) -> dict[str, Any]:
    """JSON content for the report."""
    topology = expected(config.cluster)
    kinds = sorted({node.type.name for node in topology.nodes if node.type is not None})
    address = address_of(config.cluster)
    known = {"nodes": len(topology.nodes), "gpus": topology.gpus, "cores": topology.cores} if topology.nodes else {}
    return {"cluster": config.cluster.kind, "address": address, "types": kinds, **known}


def surroundings(config: RunConfig, machine: Machine, inputs: Inputs | None, *, full: bool = False) -> list[Probe]:
    """All but the inputs: quick, and nothing is started.

    Args:
        inputs: None where they cannot be used; what depends on them is left out.
        full: large files are hashed.
    """
    topology = expected(config.cluster)
    local = address_of(config.cluster) is None
    vllm, root = config.rollout.engine == "vllm", Path(config.run_root)
    resumed = cache(partial(_resumed, config))  # asked within the probes: it may be refused
    probes = [
        Probe("accelerator", lambda: _accelerator(config, machine, topology)),
        Probe("driver", lambda: devices.driver(machine, architectures=torch_architectures(), vllm=vllm, local=local)),
        Probe("dependencies", lambda: software.dependencies_here(config)),
        Probe("run folder", lambda: storage.run_folder(root, resumed=resumed()), "run_unusable"),
        Probe("data set", lambda: _data_set(config, inputs, resumed(), full=full), "data_unusable"),
        Probe("ports", lambda: network.ports(own_address=machine.own_address)),
        Probe("clock", lambda: network.clock_here(storage.existing(root))),
        Probe("Ray", lambda: network.ray_cluster(address_of(config.cluster))),
    ]
    if local:
        probes += [
            Probe("interface", lambda: network.interface(machine, several_hosts=False)),
            Probe("limits", lambda: storage.limits(storage.temporary_folder())),
        ]
    if inputs is not None:
        probes += _of_size(config, machine, inputs, local=local, full=full)
    return probes


def _of_size(config: RunConfig, machine: Machine, inputs: Inputs, *, local: bool, full: bool) -> list[Probe]:
    """Probes that need to know how large the model is."""
    folder, parameters = inputs.model_folder, inputs.parameters
    needed = partial(storage.checkpoint_bytes, config, folder, parameters)
    store = object_store_bytes(parameters * (2 if config.rollout.dtype == "bfloat16" else 4)) if local else 0
    probes = [
        Probe("model folder", lambda: storage.model_folder(folder, parameters=parameters, full=full)),
        Probe("disk", lambda: storage.disk(Path(config.run_root), needed())),
    ]
    if local:
        probes += [
            Probe(
                "shared memory",
                lambda: storage.shared_memory(machine, object_store=store, ranks=len(machine.gpus)),
            ),
            Probe("memory", lambda: storage.memory(machine)),
            Probe("placement", lambda: _placed(config, expected(config.cluster)), "placement_impossible"),
            Probe("phases", lambda: _phases(config, machine, inputs), "memory_small"),
        ]
    return probes


def _accelerator(config: RunConfig, machine: Machine, topology: Topology) -> Finding:
    """GPUs of this host count only where the run takes place on it."""
    if address_of(config.cluster) is not None:
        return replace(devices.accelerator(machine), issues=())
    if isinstance(config.cluster, LocalCluster):
        return devices.accelerator(machine)
    node = topology.nodes[0]
    return devices.accelerator(machine, kind=node.gpu, required=node.gpus)


def _data_set(config: RunConfig, inputs: Inputs | None, resumed: Path | None, *, full: bool) -> Finding:
    files = storage.data_files(config)
    rows = inputs.train_rows if inputs is not None else None
    return storage.data_set(files, rows=rows, full=full, before=_facts_before(resumed, "data set"))


def _placed(config: RunConfig, topology: Topology, session: Session | None = None) -> Finding:
    """Raises UserError where the run's actors do not fit."""
    layout = place(config, topology, free=session.free() if session is not None else None)
    return Finding({"actors": len(layout.actors), "bundles": len(layout.bundles)})


def _phases(config: RunConfig, machine: Machine, inputs: Inputs) -> Finding:
    """Whether every phase fits at its least into this host's memory, or into that of its smallest GPU.

    Raises:
        UserError: one does not.
    """
    topology = expected(config.cluster)
    if bool(topology.gpus) != bool(machine.gpus):
        return Finding()  # the GPUs that the configuration is for are not here, which has been said
    device = Device(machine.memory_available, machine.memory_total)
    known = [Device(gpu.free, gpu.total) for gpu in machine.gpus if gpu.free is not None and gpu.total is not None]
    if known and not topology.unified:
        device = min(known, key=lambda gpu: gpu.free)
    sizes = Sizes.of(inputs.model_folder, inputs.parameters)
    found = phases(config, sizes, place(config, topology), device)
    if topology.unified:
        check_unified(config, found, device.total)
    check_phases(found, device, gpus=bool(topology.gpus), placement=config.cluster.placement, unified=topology.unified)
    return Finding({name: f"{gib(sum(parts.values()))} GiB" for name, parts in found.items()})


def _resumed(config: RunConfig) -> Path | None:
    """The folder of the run that goes on, by its path; what cannot be resumed is refused where it is opened."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        path = Path(config.resume).expanduser().absolute()
        path = path.parent.parent if path.parent.name == "checkpoints" else path
        return path if path.is_dir() else None
    point = resolve_resume("auto", Path(config.run_root), config.name)
    if point is None:
        return None
    point.run.close()
    return point.run.path


def _facts_before(folder: Path | None, probe: str) -> Mapping[str, Any] | None:
    """What a probe saw when the run in ``folder`` was started; None: nothing is known of it."""
    if folder is None or not (folder / NAME).is_file():
        return None
    return Report.read(folder / NAME).facts(probe)


# --- rlsys doctor ---


def input_probes(config: RunConfig) -> list[Probe]:
    """The checks of a run's inputs one by one, so that the first error does not hide the next."""

    def check(run: Callable[[], object]) -> Callable[[], Finding]:
        def look_at_it() -> Finding:
            run()
            return Finding()

        return look_at_it

    def data() -> Finding:
        found = load_dataset(config.data)
        return Finding({"train": len(found.train), "held_out": len(found.held_out)})

    def environment() -> object:
        return ENVIRONMENTS.get(config.rollout.environment, where="rollout.environment")

    return [
        Probe("algorithm", check(lambda: try_out(config)), "algorithm_unusable"),
        Probe("trainer", check(lambda: check_backend(config.trainer)), "trainer_unusable"),
        Probe("environment", check(environment), "environment_unusable"),
        Probe("reward", check(lambda: build_parts(config.reward.parts)), "reward_unusable"),
        Probe("guards", check(lambda: CollapseMonitor(config.guards.limits, config.guards.every)), "guards_unusable"),
        Probe("model", lambda: Finding({"folder": str(find_model(config.model.path))}), "model_unusable"),
        Probe("data", data, "data_unusable"),
    ]


def bare_probes(machine: Machine) -> list[Probe]:
    """Of a machine without a run in mind."""
    here = Path.cwd()
    return [
        Probe("accelerator", lambda: devices.accelerator(machine)),
        Probe("driver", lambda: devices.driver(machine, architectures=torch_architectures())),
        Probe("dependencies", lambda: software.dependencies_here(None)),
        Probe("run folder", lambda: storage.run_folder(here / "runs")),
        Probe("disk", lambda: storage.disk(here, {})),
        Probe("shared memory", lambda: storage.shared_memory(machine, object_store=object_store_bytes(0))),
        Probe("memory", lambda: storage.memory(machine)),
        Probe("ports", lambda: network.ports(own_address=machine.own_address)),
        Probe("interface", lambda: network.interface(machine, several_hosts=False)),
        Probe("clock", lambda: network.clock_here(here)),
        Probe("limits", lambda: storage.limits(storage.temporary_folder())),
        Probe("Ray", lambda: network.ray_cluster(None)),
    ]


def examine(config: RunConfig | None, *, bandwidth: bool = False, checksums: bool = False) -> Report:
    """Everything that can be looked at, whatever is wrong with the rest.

    Args:
        config: None: the machine alone.
        bandwidth: rates are measured too. checksums: large files are hashed.
    """
    machine = look()
    if config is None:
        return run_probes([*bare_probes(machine), *(_rates(None) if bandwidth else [])])
    kept: list[Inputs] = []

    def inputs() -> Finding:
        kept.append(check_inputs(config))
        return Finding({"parameters": kept[0].parameters, "training_rows": kept[0].train_rows})

    report = run_probes([*input_probes(config), Probe("inputs", inputs, "inputs_unusable")])
    around = surroundings(config, machine, kept[0] if kept else None, full=checksums)
    report = report.joined(run_probes(around, topology_of(config)))
    if bandwidth:
        report = report.joined(run_probes(_rates(config)))
    unreachable = any(issue.code.startswith("ray_") for issue in report.errors)
    if address_of(config.cluster) is not None and not unreachable:
        report = report.joined(_examine_cluster(config, machine, bandwidth=bandwidth))
    return report


def _examine_cluster(config: RunConfig, machine: Machine, *, bandwidth: bool) -> Report:
    """Of the nodes of the cluster that the configuration names, and whether the run fits there."""
    kinds = [node.type for node in expected(config.cluster).nodes if node.type is not None]
    gbs = kinds[0].network_gbs if kinds else 0.0
    try:
        with connect(config.cluster) as session:
            report = nodes.check_nodes(machine, _link(config, session))
            fits = Probe("placement", lambda: _placed(config, session.topology, session), "placement_impossible")
            more = [fits]
            if bandwidth:
                from rlsys.cluster.preflight import bandwidth as rates

                more.append(Probe("network rates", lambda: rates.network_rates(ray.nodes(), expected_gbs=gbs)))
            return report.joined(run_probes(more))
    except HostsFailed as error:
        return run_probes([Probe("nodes", partial(nodes.answered, nodes.Looked({}, {}, error.failed)))])
    except UserError as error:  # it is not there, or not what the configuration says
        code = "ray_unreachable" if error.where == "cluster.address" else "placement_impossible"
        return run_probes([Probe("cluster", partial(_raised, error), code)])


def _raised(error: UserError) -> Finding:
    raise error


def _rates(config: RunConfig | None) -> Sequence[Probe]:
    from rlsys.cluster.preflight import bandwidth as rates

    root = storage.existing(Path(config.run_root) if config is not None else Path.cwd())
    here = config is not None and address_of(config.cluster) is None  # else the kind is that of other hosts
    kinds = [node.type for node in expected(config.cluster).nodes if node.type is not None] if config and here else []
    kind = kinds[0] if kinds else None
    return [
        Probe("memory rates", rates.memory_rates),
        Probe("disk rates", lambda: rates.disk_rates(root)),
        Probe("GPU rates", lambda: rates.against_sheet(rates.gpu_rates(), kind)),
    ]


def handle(arguments: argparse.Namespace) -> int:
    """``rlsys doctor``: 0: nothing stands against a run; 2: errors were found."""
    config, refused = None, None
    if arguments.overrides:
        try:
            config = compose_run(arguments.overrides)
        except UserError as error:
            refused = error
    report = examine(config, bandwidth=arguments.bandwidth, checksums=arguments.checksums)
    if refused is not None:
        issue = Issue.of(refused, "configuration_unusable")
        first = run_probes([Probe("configuration", lambda: Finding(issues=(issue,)))])
        report = first.joined(report)
    if arguments.json is not None:
        report.write_json(arguments.json)
    console = Console(highlight=False, soft_wrap=True)
    console.print(report.rendered())
    errors = len(report.errors)
    console.print("\nnothing stands against a run" if not errors else f"\n{errors} error{'s' * (errors > 1)}")
    return 0 if report.ok else _BAD_INPUT
