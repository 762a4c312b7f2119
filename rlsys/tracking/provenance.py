"""What a run was made with: interpreter, packages, machine, code version. Values of environment variables are not
recorded: they hold secrets."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

import rlsys
from rlsys.tracking.secrets import mask_arguments

_COMMAND_SECONDS = 10.0


def record(folder: Path | None = None) -> dict[str, Any]:
    """JSON content for ``environment.json``.

    Args:
        folder: the working folder whose git state is recorded; None: the process's own.
    """
    folder = folder or Path.cwd()
    return {
        "rlsys": rlsys.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "command": mask_arguments(sys.argv),
        "working_folder": str(folder),
        "git": git_state(folder),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Version of every installed distribution, by name."""
    found = {
        dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions() if dist.metadata["Name"]
    }
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, branch and uncommitted changes (names of files, at most 100) of the repository that ``folder`` lies in;
    None where there is no repository or no git."""
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    status = _output("git", "-C", str(folder), "status", "--porcelain") or ""
    changed = [line[3:] for line in status.splitlines()]
    return {
        "commit": commit.strip(),
        "branch": (_output("git", "-C", str(folder), "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(changed),
        "changed": changed[:100],
    }


def _gpus() -> list[str]:
    """Name, memory and driver of each NVIDIA GPU; asked outside this process, where CUDA may not be initialised yet."""
    rows = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return rows.splitlines() if rows else []


def _output(*command: str) -> str | None:
    """What a command prints; None where it is not installed, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
