"""Ray's job API as rlsys uses it: find a cluster's dashboard, follow a job's log to its end, and ``rlsys jobs``."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlsys.cluster.topology import Topology, found
from rlsys.config.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

INTERRUPTED = 130
_ANSWER_S = 30.0  # deadline of one request
_SILENCE_S = 15.0  # of a log, after which the job itself is asked whether it has ended
_LOST_S = 120.0  # that a cluster may not answer while a job is followed
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def client_of(address: str | None, *, where: str = "cluster.address") -> JobSubmissionClient:
    """The job API of a cluster. Ray's token goes with every request where there is one.

    Args:
        address: of the cluster (``HOST:6379``, ``auto``, ``ray://…``), from which the dashboard's is found, or of the
            dashboard (``http://HOST:8265``). It comes before what the environment says; None: RAY_ADDRESS.
        where: what an error names.

    Raises:
        UserError: no address, nobody there, or its token is another one.
    """
    named = address or next((os.environ[name] for name in _ADDRESSES if os.environ.get(name)), None)
    if named is None:
        raise UserError(
            "no cluster was named",
            where=where,
            fix="give its address (HOST:6379, http://HOST:8265 or auto), or set RAY_ADDRESS",
        )
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", str(int(_ANSWER_S)))
    import ray  # noqa: F401 - sets its loggers when it is imported first
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    from rlsys.cluster.session import probe

    class Client(JobSubmissionClient):
        """With a deadline for every request."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=_ANSWER_S, **options)

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        if "://" not in named:
            probe(named)
        with _without(*(_ADDRESSES if address else ())):
            return Client(named)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            f"no job API answers at '{named}': {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=where,
            fix="is it the address of a running cluster whose head has a dashboard that this machine reaches "
            "(`ray start --head --dashboard-host=0.0.0.0`), and is its token here (RAY_AUTH_TOKEN_PATH)?",
        ) from error


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without these variables, which Ray would put before an address that it was given."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def nodes_of(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """The cluster's nodes in the words of ``ray.nodes()``, asked of its dashboard."""
    answer = client._do_request("GET", "/api/v0/nodes?limit=10000")
    answer.raise_for_status()
    rows: list[Mapping[str, Any]] = answer.json()["data"]["result"]["result"]
    return [
        {
            "NodeID": row["node_id"],
            "NodeManagerAddress": row["node_ip"],
            "Alive": row["state"] == "ALIVE",
            "Resources": row["resources_total"],
            "Labels": row.get("labels") or {},
        }
        for row in rows
    ]


def topology_of(client: JobSubmissionClient) -> Topology:
    return found(nodes_of(client))


def ended(details: JobDetails) -> bool:
    return bool(details.status.is_terminal())


def exit_code(details: JobDetails) -> int:
    """Of a job that has ended: its entry point's (128 + N where signal N killed it); 130: it was stopped; 1: it failed
    before its entry point began or without leaving a code."""
    if details.status.value == "SUCCEEDED":
        return 0
    if details.status.value == "STOPPED":
        return INTERRUPTED
    code = details.driver_exit_code
    return 1 if not code else 128 - code if code < 0 else int(code)


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> JobDetails:
    """Hands over the job's log as it grows, until the job has ended; a connection that breaks is made again.

    Returns:
        The job as it ended.

    Raises:
        UserError: there is no such job, or the cluster did not answer for two minutes.
    """
    written, answered = 0, time.monotonic()
    while True:
        try:
            details = details_of(client, job)
            answered = time.monotonic()
            if details.driver_agent_http_address or ended(details):  # else its log is not there yet
                written = asyncio.run(_tail(client, job, write, written))
                details = details_of(client, job)
            if ended(details):
                whole = client.get_job_logs(job)
                write(whole[written:])
                return details
        except (OSError, RuntimeError) as error:  # requests' and aiohttp's errors are either
            if time.monotonic() - answered > _LOST_S:
                raise UserError(
                    f"the cluster has not answered for {_LOST_S:g} s: {error}",
                    where=job,
                    fix=f"the job may go on without us: rlsys jobs logs {job} --follow",
                ) from error
        time.sleep(0.5)


async def _tail(client: JobSubmissionClient, job: str, write: Callable[[str], object], written: int) -> int:
    """Hands over what is new, until the log ends or the job has. Returns how many characters were handed over in all,
    ``written`` of them before."""
    import aiohttp

    broken = (OSError, RuntimeError, aiohttp.ClientError)
    seen = 0
    chunks = client.tail_job_logs(job)
    waiting: asyncio.Task[str] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({waiting}, timeout=_SILENCE_S)
            if not done:
                if ended(await asyncio.to_thread(client.get_job_info, job)):
                    break
                continue
            try:
                chunk = waiting.result()
            except (StopAsyncIteration, *broken):
                break
            waiting = None
            new = chunk[max(written - seen, 0) :]
            seen += len(chunk)
            if new:
                write(new)
    finally:
        if waiting is not None and not waiting.done():
            waiting.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration, *broken):
                await waiting
    return max(seen, written)


def details_of(client: JobSubmissionClient, job: str) -> JobDetails:
    """Raises UserError where the cluster knows no such job."""
    try:
        return client.get_job_info(job)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        known = ", ".join(str(each.submission_id) for each in client.list_jobs() if each.submission_id)
        raise UserError(f"there is no job '{job}'", where="job", fix=f"known: {known or 'none'}") from None


# --- rlsys jobs ---


def add_parser(subparsers: Any) -> None:
    """Adds ``jobs list|logs|stop``."""
    parser = subparsers.add_parser(
        "jobs", help="runs that were handed to a cluster: list them, read their logs, stop them"
    )
    commands = parser.add_subparsers(dest="jobs_command", required=True, metavar="COMMAND")
    for name, handler, text in (
        ("list", _list, "every job that the cluster remembers, the newest first"),
        ("logs", _logs, "a job's log"),
        ("stop", _stop, "ask a job to stop: it writes a checkpoint first"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if name != "list":
            command.add_argument("job", metavar="JOB", help="as `rlsys jobs list` names it")
        if name == "logs":
            command.add_argument(
                "--follow", action="store_true", help="until the job ends; its exit code is this one's"
            )
        command.add_argument(
            "--address",
            metavar="ADDRESS",
            help="of the cluster (HOST:6379, auto) or its dashboard (http://HOST:8265); default: RAY_ADDRESS or auto",
        )
        command.set_defaults(handler=handler)


def _client(arguments: argparse.Namespace) -> JobSubmissionClient:
    named = any(os.environ.get(name) for name in _ADDRESSES)
    return client_of(arguments.address or (None if named else "auto"), where="--address")


def _list(arguments: argparse.Namespace) -> int:
    Console(highlight=False).print(table_of(_client(arguments).list_jobs()))
    return 0


def table_of(jobs: list[JobDetails], now: float | None = None) -> Table:
    """A row for each submitted job, the newest first."""
    table = Table("job", "what", "state", "began", "took", box=None, header_style="bold")
    now = time.time() if now is None else now
    for job in sorted((each for each in jobs if each.submission_id), key=lambda each: -(each.start_time or 0)):
        began = (job.start_time or 0) / 1000
        seconds = ((job.end_time / 1000) if job.end_time else now) - began
        state = job.status.value.lower()
        if state == "failed":
            state += f" ({exit_code(job)})"
        table.add_row(
            escape(str(job.submission_id)),
            escape(str((job.metadata or {}).get("rlsys", job.entrypoint or ""))),
            state,
            datetime.fromtimestamp(began).strftime("%Y-%m-%d %H:%M:%S"),
            _duration(seconds),
        )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _logs(arguments: argparse.Namespace) -> int:
    client = _client(arguments)
    details = details_of(client, arguments.job)
    if not arguments.follow:
        write_out(client.get_job_logs(arguments.job))
        return 0
    details = follow(client, arguments.job, write_out)
    return exit_code(details)


def _stop(arguments: argparse.Namespace) -> int:
    client = _client(arguments)
    if ended(details_of(client, arguments.job)):
        raise UserError("the job has ended already", where=arguments.job, fix="see `rlsys jobs list`")
    client.stop_job(arguments.job)
    Console(highlight=False).print(f"{escape(arguments.job)} was asked to stop; it writes a checkpoint first")
    return 0


def write_out(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
