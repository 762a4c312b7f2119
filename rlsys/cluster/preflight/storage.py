"""Probes of what lies on disks and in memory: data, model folder, run folder, room for checkpoints, shared
memory, main memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlsys.algorithms.requirements import needs_critic, needs_teacher
from rlsys.cluster.preflight.machine import Machine
from rlsys.cluster.preflight.report import Finding, Issue
from rlsys.config.schema import FileData, GSM8KData, RunConfig
from rlsys.data.manifest import NAME as DATA_MANIFEST
from rlsys.data.manifest import data_path, differences, read_manifest

_GIB = 2**30
_HASHED = 64 << 20  # bytes of a file that are hashed in a tenth of a second; more only where it was asked for
_FREE_MEMORY = 0.1
_TIGHT = 0.8  # of the free room
_SOCKET_PATH = 107  # bytes of a Unix socket's path (sockaddr_un)
_RAY_BELOW_TMP = len("/ray/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
_OPEN_FILES = 4096  # a Ray process holds sockets to every other, and files of the object store
_NCCL_SHM = 512 << 20
_BLOB = re.compile(r"[0-9a-f]{64}")  # the hub's cache calls large files by their SHA-256


def data_files(config: RunConfig) -> dict[str, Path]:
    """Files that the data is read from, by config key; generated data and a hub's have none.

    Raises:
        UserError: one is a fixture, and nobody said that it is meant.
    """
    found: dict[str, Path] = {}
    data, replay = config.data, config.replay
    if isinstance(data, FileData):
        named = {"data.path": data.path, "data.eval_path": data.eval_path}
    elif isinstance(data, GSM8KData):
        named = {"data.path": data.path}
    else:
        named = {}
    if config.algorithm.preference.weight:
        named |= {"replay.path": replay.path, "replay.eval_path": replay.eval_path}
    for key, path in named.items():
        if path is None:
            continue
        file = data_path(path, where=key)
        if file.is_dir():
            found |= {f"{key}/{inner.name}": inner for inner in sorted(file.glob("*.jsonl"))}
        elif file.is_file():
            found[key] = file
    return found


def data_set(
    files: Mapping[str, Path], *, rows: int | None, full: bool, before: Mapping[str, Any] | None = None
) -> Finding:
    """Whether the data is what its manifest says, and what the run that goes on was started with.

    Args:
        files: by config key. rows: to train on; None: not known.
        full: large files are hashed too.
        before: facts of this probe when the run that goes on was started.
    """
    issues: list[Issue] = []
    seen: dict[str, dict[str, Any]] = {}
    for key, path in files.items():
        size = path.stat().st_size
        digest = _sha256(path) if full or size <= _HASHED else None
        seen[key] = {"path": str(path), "bytes": size, "sha256": digest}
    for folder in sorted({path.parent for path in files.values()}):
        names = [path.name for path in files.values() if path.parent == folder]
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        small = [n for n in names if full or n not in manifest.files or (folder / n).stat().st_size <= _HASHED]
        for difference in differences(folder, manifest, small):
            fix = f"restore the file, or write {DATA_MANIFEST} anew if the change is meant"
            issues.append(Issue("data_changed", "error", difference, str(folder / DATA_MANIFEST), fix))
    for key, entry in (before or {}).get("files", {}).items():
        now = seen.get(key)
        if now is not None and None not in (now["sha256"], entry["sha256"]) and now["sha256"] != entry["sha256"]:
            what = f"the run was started with another content of {entry['path']} (SHA-256 {entry['sha256'][:12]}…)"
            fix = "go on with the data that the run was started with, or leave resume out for a new run"
            issues.append(Issue("data_not_the_runs", "error", what, f"{key}={now['path']}", fix))
    return Finding({"rows": rows, "files": seen}, tuple(issues))


def model_folder(folder: Path, *, parameters: int | None = None, full: bool = False) -> Finding:
    """Whether the weights' files are whole: as long as their headers say, and all that the index names.

    Args:
        folder: with ``config.json``. parameters: of the model, as a fact.
        full: also hash what the hub's cache calls by its checksum.
    """
    weights = sorted(folder.glob("*.safetensors"))
    where, issues = f"model.path={folder}", []
    again = "copy or download the model again"
    for path in weights:
        if fault := truncated(path):
            issues.append(Issue("model_truncated", "error", f"{path.name} {fault}", where, again))
        blob = path.resolve().name
        if full and _BLOB.fullmatch(blob) and not path.name.startswith(blob) and _sha256(path) != blob:
            what = f"{path.name} does not have the checksum that the hub gives it ({blob[:12]}…)"
            issues.append(
                Issue("model_checksum", "error", what, where, f"remove {path.resolve()} and download it again")
            )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            listed = set()
            issues.append(Issue("model_index", "error", f"{index.name} cannot be read: {error}", where, again))
        lacking = sorted(listed - {path.name for path in weights})
        if lacking:
            what = f"{len(lacking)} of {len(listed)} files of weights are missing: {', '.join(lacking[:3])}"
            issues.append(Issue("model_incomplete", "error", what, where, again))
    facts = {
        "path": str(folder),
        "files": len(weights),
        "bytes": sum(path.stat().st_size for path in weights),
        "parameters": parameters,
        "sha256": fingerprint(folder, weights),
    }
    return Finding(facts, tuple(issues))


def truncated(path: Path) -> str | None:
    """What is wrong with a safetensors file's length, in words: eight bytes say how long its header is, and that how
    long the tensors are."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            return f"is truncated: {size:,} bytes, and its header alone has {length:,}"
        try:
            header = json.loads(file.read(length))
            end = max((e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            return "has a header that is no JSON"
    stated = 8 + length + end
    return None if size == stated else f"has {size:,} bytes, and its header says {stated:,}"


def fingerprint(folder: Path, weights: Iterable[Path]) -> str:
    """SHA-256 of config, tokenizer and of the weights' headers and sizes: tells models apart without reading them."""
    digest = hashlib.sha256()
    for path in sorted(weights):
        with path.open("rb") as file:
            head = file.read(8)
            digest.update(f"{path.name} {path.stat().st_size}".encode() + head)
            digest.update(file.read(min(int.from_bytes(head, "little"), _HASHED)))
    for path in (folder / "config.json", folder / "tokenizer.json"):
        if path.is_file() and path.stat().st_size <= _HASHED:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def run_folder(run_root: Path, *, resumed: Path | None = None) -> Finding:
    """Whether runs can be written there.

    Args:
        resumed: the folder of the run that goes on.
    """
    nearest = existing(run_root)
    facts = {"run_root": str(run_root.absolute()), "writable": False, "resumed": str(resumed) if resumed else None}
    inside = next((at for at in (run_root.absolute(), *run_root.absolute().parents) if _is_run(at)), None)
    if inside is not None:
        what = f"run_root lies inside the folder of another run: {inside}"
        return Finding(
            facts, (Issue("run_folder_foreign", "error", what, f"run_root={run_root}", f"run_root={inside.parent}"),)
        )
    if not nearest.is_dir():
        what = f"a part of the path is a file, not a folder: {nearest}"
        return Finding(
            facts, (Issue("run_folder_blocked", "error", what, f"run_root={run_root}", "choose another folder"),)
        )
    target = resumed or nearest
    try:
        with tempfile.TemporaryFile(dir=target) as file:
            file.write(b"0")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        what = f"no file can be written in {target}: {error.strerror}"
        return Finding(
            facts,
            (
                Issue(
                    "run_folder_unwritable",
                    "error",
                    what,
                    f"run_root={run_root}",
                    "choose a folder that you may write to, with room",
                ),
            ),
        )
    facts["writable"] = True
    if resumed is not None and _locked(resumed / ".lock"):
        what, fix = "another process is writing into this run folder", "wait until that run has ended, or stop it"
        return Finding(facts, (Issue("run_folder_locked", "error", what, str(resumed), fix),))
    return Finding(facts)


def adapter_elements(folder: Path, rank: int) -> int:
    """Of an adapter on every matrix but embedding and head: rank · (in + out) each."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
        inner = [s for name, s in shapes.items() if len(s) == 2 and "embed" not in name and "lm_head" not in name]
        count += rank * sum(sum(shape) for shape in inner)
    return count


def checkpoint_bytes(config: RunConfig, folder: Path, parameters: int) -> dict[str, int]:
    """What a run's folder takes at most, by part: float32 weights and both moments of AdamW in each checkpoint that
    stays, in the best one and in the one that is written beside them; the export at the end."""
    lora = config.model.lora
    trained = parameters if lora is None else adapter_elements(folder, lora.rank)
    one = 12 * trained
    if needs_critic(config):
        one += 12 * parameters
    if needs_teacher(config) and config.algorithm.distillation.teacher == "ema":
        one += 4 * trained
    kept = config.checkpoint.keep_last + int(config.checkpoint.keep_best and bool(config.eval.every)) + 1
    parts = {"checkpoints": one * min(kept, max(1, -(-config.steps // config.checkpoint.every)) + 1)}
    if config.checkpoint.export:
        parts["export"] = parameters * 4
    return parts


def disk(folder: Path, needed: Mapping[str, int], *, free: int | None = None) -> Finding:
    """Whether the run's files find room.

    Args:
        folder: that they go into. needed: bytes by part. free: bytes; None: as the disk says.
    """
    usage = shutil.disk_usage(existing(folder))
    free, total = usage.free if free is None else free, sum(needed.values())
    facts = {"folder": str(folder), "free_gib": round(free / _GIB, 2), "needed_gib": round(total / _GIB, 3)}
    made = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in needed.items())
    fix = "choose a larger disk for run_root, or lower checkpoint.keep_last"
    if total > free:
        what = f"the run will write up to {total / _GIB:.2f} GiB ({made}), and {free / _GIB:.2f} GiB are free"
        return Finding(facts, (Issue("disk_small", "error", what, f"run_root={folder}", fix),))
    if total > _TIGHT * free:
        what = f"the run will fill {total / free:.0%} of the free {free / _GIB:.2f} GiB ({made})"
        return Finding(facts, (Issue("disk_tight", "warning", what, f"run_root={folder}", fix),))
    return Finding(facts)


def shared_memory(machine: Machine, *, object_store: int, ranks: int = 1) -> Finding:
    """Whether /dev/shm has room for Ray's object store, and for NCCL between GPUs of a host.

    Args:
        object_store: bytes of the store that the run starts; 0: the cluster has its own. ranks: GPUs that meet.
    """
    facts = {"free_gib": round(machine.shm_free / _GIB, 2), "object_store_gib": round(object_store / _GIB, 2)}
    fix = "mount a larger one (docker run --shm-size=16g; Kubernetes: an emptyDir with medium Memory)"
    if not machine.shm_total:
        return Finding(facts, (Issue("shared_memory_missing", "error", "there is no /dev/shm", "/dev/shm", fix),))
    if ranks > 1 and machine.gpus and machine.shm_free < _NCCL_SHM:
        what = f"{ranks} ranks meet over /dev/shm, which has {machine.shm_free >> 20} MiB free: NCCL will fail"
        return Finding(facts, (Issue("shared_memory_small", "error", what, "/dev/shm", fix),))
    if object_store > machine.shm_free:
        what = f"Ray's object store takes {object_store / _GIB:.2f} GiB, and /dev/shm has "
        what += f"{machine.shm_free / _GIB:.2f} GiB free: Ray would put it on a disk"
        return Finding(facts, (Issue("shared_memory_small", "warning", what, "/dev/shm", fix),))
    return Finding(facts)


def memory(machine: Machine) -> Finding:
    """Whether main memory is free, so that Ray's own memory monitor leaves processes alone."""
    available, total = machine.memory_available, machine.memory_total
    facts = {"total_gib": round(total / _GIB, 1), "available_gib": round(available / _GIB, 1)}
    if available < _FREE_MEMORY * total:
        what = f"only {available / _GIB:.1f} of {total / _GIB:.1f} GiB of main memory are available"
        fix = "end other processes: Ray's memory monitor kills workers above 95 %"
        return Finding(facts, (Issue("memory_tight", "warning", what, "memory", fix),))
    return Finding(facts)


def limits(temporary: Path, *, open_files: int | None = None) -> Finding:
    """Limits of this process that Ray runs into: open files, and the length of its sockets' paths.

    Args:
        temporary: folder that Ray makes its session in (``RAY_TMPDIR``, ``TMPDIR`` or /tmp).
        open_files: the limit; None: as it is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = soft if open_files is None else open_files
    issues = []
    if open_files != resource.RLIM_INFINITY and open_files < _OPEN_FILES:
        what = f"a process may have {open_files} files open, and Ray needs more"
        issues.append(Issue("open_files_few", "warning", what, "ulimit -n", f"ulimit -n {min(65536, max(hard, 4096))}"))
    length = len(os.fsencode(temporary)) + _RAY_BELOW_TMP
    if length > _SOCKET_PATH:
        what = f"Ray's sockets below {temporary} would have paths of {length} bytes, and {_SOCKET_PATH} are allowed"
        issues.append(Issue("temporary_path_long", "error", what, "RAY_TMPDIR", "export RAY_TMPDIR=/tmp"))
    return Finding({"open_files": open_files, "temporary": str(temporary)}, tuple(issues))


def temporary_folder() -> Path:
    """Where Ray makes its sessions."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    path = path.expanduser().absolute()
    return next(at for at in (path, *path.parents) if at.exists())


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()


def _locked(path: Path) -> bool:
    """Whether another open file holds the run's lock; the lock is not kept."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
