"""Issues, what probes found, and the report that they make: JSON, a page, a table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import rlsys
from rlsys.checkpoint.atomic import write_json, writing
from rlsys.config.errors import UserError

SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("preflight.schema.json")
NAME, PAGE = "preflight.json", "preflight.md"

Severity = Literal["error", "warning", "info"]
_ORDER: tuple[Severity, ...] = ("error", "warning", "info")
_STYLE = {"error": "bold red", "warning": "yellow", "info": "dim", "ok": "green"}


@dataclass(frozen=True)
class Issue:
    """One thing that is wrong.

    code: the same for ever, for programs (``shared_memory_small``).
    severity: an ``error`` ends the run before it begins; a ``warning`` and an ``info`` are said.
    what, where, fix: as of :class:`UserError`.
    node: the host that it was seen on; None: this one.
    """

    code: str
    severity: Severity
    what: str
    where: str
    fix: str
    node: str | None = None

    @classmethod
    def of(cls, error: UserError, code: str) -> Issue:
        """An error that a check raised."""
        return cls(code, "error", error.what, error.where or "configuration", error.fix or "see the message")


@dataclass(frozen=True)
class Finding:
    """What a probe saw. facts: JSON content, for whoever reads the report."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    issues: tuple[Issue, ...] = ()


@dataclass(frozen=True)
class Probe:
    """name: of the row in the report; look: raises UserError for bad input, which becomes the issue ``code``."""

    name: str
    look: Callable[[], Finding]
    code: str = "bad_input"


@dataclass(frozen=True)
class Probed:
    """A finding with the name of its probe and how long it took."""

    name: str
    finding: Finding
    seconds: float

    @property
    def worst(self) -> str:
        """The highest severity of its issues, or ``ok``."""
        found = {issue.severity for issue in self.finding.issues}
        return next((severity for severity in _ORDER if severity in found), "ok")


@dataclass(frozen=True)
class Report:
    """topology: where the run is meant for, as JSON content; generated_at: ISO 8601, UTC."""

    probes: tuple[Probed, ...]
    topology: Mapping[str, Any] = field(default_factory=dict)
    generated_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def issues(self) -> list[tuple[str, Issue]]:
        """(probe, issue), errors first; one that several probes ran into once."""
        found = {
            (i.what, i.where, i.node): (probed.name, i)
            for probed in reversed(self.probes)
            for i in probed.finding.issues
        }
        kept = [
            pair
            for probed in self.probes
            for i in probed.finding.issues
            if (pair := found.pop((i.what, i.where, i.node), None))
        ]
        return sorted(kept, key=lambda pair: _ORDER.index(pair[1].severity))

    @property
    def errors(self) -> list[Issue]:
        return [issue for _, issue in self.issues if issue.severity == "error"]

    @property
    def ok(self) -> bool:
        return not self.errors

    def facts(self, probe: str) -> Mapping[str, Any]:
        """Of the probe of that name; empty where it did not run."""
        return next((probed.finding.facts for probed in self.probes if probed.name == probe), {})

    def joined(self, other: Report) -> Report:
        """This report and the probes of a later one, which take the place of those of the same name."""
        again = {probed.name for probed in other.probes}
        kept = [probed for probed in self.probes if probed.name not in again]
        return Report((*kept, *other.probes), other.topology or self.topology, self.generated_at)

    @classmethod
    def read(cls, path: Path) -> Report:
        """What :meth:`write_json` wrote.

        Raises:
            UserError: it cannot be read, or another version wrote it.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, not {SCHEMA}")
            issues = [(entry.pop("probe"), Issue(**entry)) for entry in content["issues"]]
            probes = []
            for entry in content["probes"]:
                own = tuple(issue for name, issue in issues if name == entry["name"])
                probes.append(Probed(entry["name"], Finding(entry["facts"], own), entry["seconds"]))
            return cls(tuple(probes), content["topology"], content["generated_at"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the report cannot be read: {error}", where=str(path), fix="remove it; the next start writes it anew"
            ) from error

    def content(self) -> dict[str, Any]:
        """JSON content, as ``preflight.schema.json`` describes it."""
        return {
            "schema": SCHEMA,
            "generated_at": self.generated_at,
            "rlsys": rlsys.__version__,
            "ok": self.ok,
            "topology": dict(self.topology),
            "probes": [
                {"name": p.name, "result": p.worst, "seconds": round(p.seconds, 4), "facts": dict(p.finding.facts)}
                for p in self.probes
            ],
            "issues": [{"probe": name, **asdict(issue)} for name, issue in self.issues],
        }

    def write_json(self, path: Path) -> None:
        """Raises:
        UserError: it cannot be written there.
        """
        with writing(path.name, path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.content())

    def write(self, folder: Path) -> None:
        """``preflight.json`` and the page beside it.

        Raises:
            UserError: the folder cannot be written to.
        """
        self.write_json(folder / NAME)
        with writing(PAGE, folder / PAGE):
            (folder / PAGE).write_text(self.page(), encoding="utf-8")

    def page(self) -> str:
        """The report in Markdown."""
        count = len(self.errors)
        said = "nothing stands against a run" if self.ok else f"{count} error{'s' * (count > 1)}"
        lines = [f"# Preflight: {said}", "", f"{self.generated_at}, rlsys {rlsys.__version__}", ""]
        if self.topology:
            lines += [", ".join(f"{name} {_short(value)}" for name, value in self.topology.items()), ""]
        for name, issue in self.issues:
            at = f" on {issue.node}" if issue.node else ""
            lines += [f"## {issue.severity}: {issue.what}", ""]
            lines += [f"- where: `{issue.where}`{at}", f"- fix: {issue.fix}", f"- {name}, `{issue.code}`", ""]
        lines += ["| probe | result | seen |", "|---|---|---|"]
        cells = ((p.name, p.worst, summary(p.finding.facts).replace("|", "\\|")) for p in self.probes)
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells), ""])

    def rendered(self) -> RenderableType:
        """For a terminal: a table of the probes, and every issue below it."""
        table = Table("probe", "result", "seen", box=None, pad_edge=False)
        for probed in self.probes:
            table.add_row(probed.name, Text(probed.worst, _STYLE[probed.worst]), Text(summary(probed.finding.facts)))
        return Group(table, *self._issue_blocks())

    def _issue_blocks(self) -> Iterator[Text]:
        for _, issue in self.issues:
            at = f" on {issue.node}" if issue.node else ""
            yield Text.assemble(
                f"\n{issue.severity} ",
                (issue.code, _STYLE[issue.severity]),
                f": {issue.what}\n  where: {issue.where}{at}\n  fix:   {issue.fix}",
            )


class PreflightFailed(UserError):
    """Several things are wrong at once; each is named. With one issue it reads as any other UserError.

    Args:
        issues: at least one, all of them errors.
    """

    def __init__(self, issues: Sequence[Issue]):
        first = issues[0]
        where = f"{first.where} on {first.node}" if first.node else first.where
        super().__init__(first.what, where=where, fix=first.fix)
        self.issues = tuple(issues)

    def __str__(self) -> str:
        more = [
            UserError(i.what, where=f"{i.where} on {i.node}" if i.node else i.where, fix=i.fix) for i in self.issues[1:]
        ]
        return "\n".join([super().__str__(), *map(str, more)])

    def __reduce__(self) -> tuple:
        return type(self), (self.issues,)


def run_probes(probes: Iterable[Probe], topology: Mapping[str, Any] | None = None) -> Report:
    """Runs all of them, whatever the ones before found. What is no bad input and no fault of the machine's (any other
    exception) is a bug, and raised."""
    done = []
    for probe in probes:
        began = time.perf_counter()
        try:
            finding = probe.look()
        except UserError as error:
            finding = Finding(issues=(Issue.of(error, probe.code),))
        except OSError as error:
            place = str(error.filename or probe.name)
            fix = "check that the file or device is there and may be read"
            finding = Finding(issues=(Issue("unreadable", "error", f"{error.strerror or error}", place, fix),))
        done.append(Probed(probe.name, finding, time.perf_counter() - began))
    return Report(tuple(done), topology or {})


def summary(facts: Mapping[str, Any]) -> str:
    """Facts on one line."""
    said = [
        f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items() if value not in (None, [], {}, "")
    ]
    return ", ".join(said)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} of them"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
