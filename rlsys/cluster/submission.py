"""``submit=true``: the run goes to a cluster as a Ray job, and this process follows its log.

What the job gets is Ray's runtime environment: by default the folder that the command was given in, without what
``.gitignore`` and ``.rayignore`` leave out; with ``submit=FILE`` what that YAML file says (``working_dir``,
``image_uri``, ``env_vars``, …, Ray's own format). Nothing of this shell's environment goes along that the file does
not name.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from rich.console import Console

from rlsys.cluster import jobs
from rlsys.config.clusters import address_of
from rlsys.config.errors import UserError
from rlsys.config.schema import RunConfig
from rlsys.tracking.secrets import mask_arguments

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_GRACE_S = 120
"""Between asking a job to stop and killing it: an update ends, and a checkpoint is written."""
STOPS_IN_TIME = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}}
"""The runtime environment of a job that needs nothing else."""
UPLOAD_BYTES = 100 << 20
"""Largest folder that is sent along; it goes through the head's memory, and to every node."""
_DRIVER_CPUS = 1.0
_READY_S = 120.0
_NAMED = re.compile(r"\$\{(\w+)\}")
_LARGEST = 3


@dataclass(frozen=True)
class Request:
    """A job as it is sent. entrypoint: a shell command; runtime_env: Ray's; cpus: booked for the driver."""

    entrypoint: str
    runtime_env: dict[str, Any] = field(repr=False)  # may hold secrets
    cpus: float = _DRIVER_CPUS
    what: str = ""

    def send(self, client: JobSubmissionClient) -> str:
        """Returns Ray's name of the job. A cluster that has just started takes jobs a moment later."""
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                return str(
                    client.submit_job(
                        entrypoint=self.entrypoint,
                        runtime_env=self.runtime_env,
                        metadata={"rlsys": self.what},
                        entrypoint_num_cpus=self.cpus,
                    )
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)


def submit(config: RunConfig, overrides: Sequence[str], console: Console | None = None) -> int:
    """Sends the run and follows its log.

    Args:
        overrides: the command line that composed ``config``.

    Returns:
        The job's exit code; 130 after Ctrl-C, which leaves the job running and says how to come back.

    Raises:
        UserError: bad input; nothing was sent.
    """
    console = console or Console(highlight=False, stderr=True)
    refuse_secrets(overrides)
    folder = Path.cwd()
    environment = runtime_env(config.submit, folder, os.environ, exclude=leftovers(config.run_root, folder))
    check_upload(environment, folder)
    address = address_of(config.cluster)
    client = jobs.client_of(address)
    run_root = shared_run_root(config.run_root, client)
    words = job_overrides(overrides, kind=config.cluster.kind, address=address)
    request = Request(
        shlex.join(["exec", "python", "-m", "rlsys.launch", *words, f"run_root={quoted(run_root)}"]),
        environment,
        what=f"{config.name} {_recipe(overrides)}".strip(),
    )
    job = request.send(client)
    named = f" --address {address}" if address else ""
    console.print(f"sent as {job}; run folder below {run_root}; Ctrl-C leaves it running", markup=False)
    try:
        details = jobs.follow(client, job, jobs.write_out)
    except KeyboardInterrupt:
        console.print(
            f"\nthe job goes on. Its log:   rlsys jobs logs {job} --follow{named}\n"
            f"to stop it:                 rlsys jobs stop {job}{named}",
            markup=False,
            soft_wrap=True,
        )
        return jobs.INTERRUPTED
    code = jobs.exit_code(details)
    if details.driver_exit_code is None:  # it never ran, or was stopped: only Ray knows why
        console.print(f"{job}: {details.message}", markup=False, soft_wrap=True)
    return code


def job_overrides(overrides: Iterable[str], *, kind: str, address: str | None) -> list[str]:
    """The command line of the job: as it was given, but that it runs there, on the cluster that it finds itself in.

    Args:
        kind: of the cluster. ``local`` becomes ``ray``: a job starts no cluster of its own.
        address: that the cluster was reached by.
    """
    dropped = {"submit", "cluster.address", "run_root", *({"cluster"} if kind == "local" else ())}
    kept = [each for each in overrides if each.partition("=")[0].lstrip("+~") not in dropped]
    there = f"cluster.address={quoted(inner_address(address))}"
    return [*kept, *(["cluster=ray"] if kind == "local" else []), there, "submit=false"]


def inner_address(address: str | None) -> str:
    """What a job calls its cluster: HOST:PORT as it was given, because ``auto`` may be another cluster of its host;
    where that is not known, or was this end of a tunnel, ``auto``."""
    host, colon, port = (address or "").rpartition(":")
    known = colon and port.isdigit() and "/" not in host and host not in ("localhost", "127.0.0.1")
    return str(address) if known else "auto"


def quoted(text: str) -> str:
    """``text`` as Hydra reads it letter by letter."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def runtime_env(
    submit: bool | str, folder: Path, environ: Mapping[str, str], *, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    """Ray's runtime environment of a job.

    Args:
        submit: the config's: true, or the path of a YAML file in Ray's format. A value in its ``env_vars`` may name a
            variable of this shell, ``${HF_TOKEN}``, or be left out for the variable of the same name.
        folder: sent along unless the file names another, or an image.
        exclude: patterns (``.gitignore``'s) of what is not sent.

    Raises:
        UserError: the file cannot be read or is none in Ray's format, or a variable is not set.
    """
    given = _read(Path(submit)) if isinstance(submit, str) else {}
    env_vars = {
        str(name): _filled(str(name), value, environ) for name, value in dict(given.pop("env_vars", None) or {}).items()
    }
    defaults: dict[str, Any] = {} if "image_uri" in given else {"working_dir": str(folder)}
    result = defaults | given | {"env_vars": STOPS_IN_TIME["env_vars"] | env_vars}
    if "working_dir" in result:
        result["excludes"] = [*(given.get("excludes") or []), *exclude]
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(set(given) - set(RuntimeEnv.known_fields))  # which Ray itself passes over
    try:
        if unknown:
            raise ValueError(f"it has no key '{unknown[0]}'")
        RuntimeEnv(**result)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"this is no runtime environment of Ray's: {str(error).splitlines()[0]}",
            where=f"submit={submit}",
            fix=f"its keys are {', '.join(sorted(each for each in RuntimeEnv.known_fields if each[0] != '_'))}",
        ) from None
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the runtime environment: {error}",
            where=f"submit={path}",
            fix="give true, or the path of a YAML file in the format of Ray's runtime environments",
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("env_vars") or {}, dict):
        raise UserError("the file is no mapping", where=f"submit={path}", fix="write `working_dir: .`, `env_vars: {…}`")
    excludes = content.get("excludes") or []
    if not isinstance(excludes, list) or not all(isinstance(each, str) for each in excludes):
        raise UserError("excludes is no list of patterns", where=f"submit={path}", fix='write `excludes: ["/figures"]`')
    if isinstance(content.get("working_dir"), str) and "://" not in content["working_dir"]:
        content["working_dir"] = str((path.parent / content["working_dir"]).resolve())
    return content


def _filled(name: str, value: Any, environ: Mapping[str, str]) -> str:
    text = f"${{{name}}}" if value is None else str(value)
    missing = [each for each in _NAMED.findall(text) if each not in environ]
    if missing:
        raise UserError(
            f"{missing[0]} is not set here", where=f"env_vars.{name}", fix=f"export {missing[0]}, or leave it out"
        )
    return _NAMED.sub(lambda match: environ[match[1]], text)


def refuse_secrets(overrides: Sequence[str]) -> None:
    """Ray writes a job's command line into its log and shows it on its dashboard.

    Raises:
        UserError: an override looks like a secret.
    """
    for given, masked in zip(overrides, mask_arguments(list(overrides)), strict=True):
        if given != masked:
            key = given.partition("=")[0]
            raise UserError(
                "this looks like a secret, and a job's command line is shown in logs",
                where=key,
                fix="pass it as an environment variable: submit=FILE with env_vars",
            )


def check_upload(environment: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder that is too large to be sent, naming what is large in it, and a home folder, with its keys.

    Raises:
        UserError: it is.
    """
    source = environment.get("working_dir")
    if not isinstance(source, str) or not Path(source).is_dir():
        return  # an archive or an address
    home = Path(os.path.expanduser("~"))  # as it is where nobody knows
    if home.is_absolute() and home.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(
            "your home folder would go along, with the keys and tokens in it",
            where=source,
            fix="run the command in a folder of its own, or name one: submit=FILE with working_dir",
        )
    sizes = upload_sizes(Path(source), environment.get("excludes", []))
    total = sum(sizes.values())
    if total <= UPLOAD_BYTES:
        return
    parts: Counter[str] = Counter()
    for path, size in sizes.items():
        parts["/".join(path.parts[:2])] += size
    largest = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in parts.most_common(_LARGEST))
    raise UserError(
        f"the folder that goes along has {total / 2**20:.0f} MiB, and {UPLOAD_BYTES >> 20} may be sent "
        f"(largest, in MiB: {largest})",
        where=source,
        fix="name what is not needed in .gitignore or .rayignore, keep models and data where the cluster reads them, "
        "or run the command from another folder",
    )


def upload_sizes(folder: Path, excludes: Sequence[str]) -> dict[Path, int]:
    """Bytes of each file that Ray would send of ``folder``, by its path in there."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[Path, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    patterns = [*get_runtime_env_default_excludes(), *excludes]
    _dir_travel(folder, [_get_excludes(folder, patterns)], add, include_gitignore=True)
    return sizes


def shared_run_root(run_root: str, client: JobSubmissionClient) -> str:
    """Where the job makes its run folder. A relative path would lie in the job's copy of this folder, which Ray
    removes: it means this folder where the cluster is this machine.

    Raises:
        UserError: it is relative, and the cluster is elsewhere.
    """
    path = Path(run_root).expanduser()
    if path.is_absolute() or "://" in run_root:
        return str(path) if path.is_absolute() else run_root
    if not is_here(node["NodeManagerAddress"] for node in jobs.nodes_of(client) if node["Alive"]):
        raise UserError(
            f"run_root={run_root} would lie in the job's copy of this folder, which the cluster removes",
            where="run_root",
            fix="set run_root to a folder that every node of the cluster has, such as run_root=/shared/runs",
        )
    return str(path.absolute())


def is_here(addresses: Iterable[str]) -> bool:
    """Whether all of these are addresses of this machine."""
    own = {address.address for each in psutil.net_if_addrs().values() for address in each}
    own |= {"127.0.0.1", "localhost", socket.gethostname()}
    return all(address in own for address in addresses)


def leftovers(run_root: str, folder: Path) -> list[str]:
    """Patterns of what a run leaves in the folder: never part of what is sent."""
    path = (folder / Path(run_root).expanduser()).resolve()
    own = [f"/{path.relative_to(folder.resolve())}"] if path.is_relative_to(folder.resolve()) else []
    return [*(each for each in own if each != "/."), "/runs", "/outputs", "/multirun"]


def _recipe(overrides: Iterable[str]) -> str:
    return next((each for each in overrides if each.startswith("+recipe=")), "")
