"""What probes find becomes one report: JSON as its schema says, a page, an error that names everything."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from rlsys.cluster.preflight import Finding, Issue, PreflightFailed, Probe, Report, run_probes
from rlsys.cluster.preflight.report import NAME, PAGE, SCHEMA_FILE
from rlsys.config.errors import UserError

SCHEMA = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
LOW = Issue("disk_tight", "warning", "little room", "run_root=runs", "delete something", node="10.0.0.2")


def refused() -> Finding:
    raise UserError("there is no such file: a.jsonl", where="data.path", fix="give a file")


def unreadable() -> Finding:
    return Finding({"text": Path("/nowhere/at/all").read_text()})


@pytest.fixture
def report() -> Report:
    probes = [
        Probe("data", refused, "data_unusable"),
        Probe("disk", lambda: Finding({"free_gib": 3.25, "names": ["a|b"], "none": None}, (LOW,))),
        Probe("again", refused, "inputs_unusable"),
        Probe("driver", unreadable),
        Probe("sound", lambda: Finding({"count": 2})),
    ]
    return run_probes(probes, {"cluster": "local"})


def test_no_probe_hides_the_next_one_and_nothing_is_said_twice(report: Report) -> None:
    assert [(p.name, p.worst) for p in report.probes] == [
        ("data", "error"),
        ("disk", "warning"),
        ("again", "error"),
        ("driver", "error"),
        ("sound", "ok"),
    ]
    assert [(name, issue.code) for name, issue in report.issues] == [
        ("data", "data_unusable"),
        ("driver", "unreadable"),
        ("disk", "disk_tight"),
    ]
    assert not report.ok


def test_a_bug_in_a_probe_is_no_issue_of_the_machine() -> None:
    def bug() -> Finding:
        raise KeyError("gpus")

    with pytest.raises(KeyError):
        run_probes([Probe("bug", bug)])


def test_the_file_is_as_the_schema_says_and_read_back_the_same(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path)
    content = json.loads((tmp_path / NAME).read_text(encoding="utf-8"))
    jsonschema.validate(content, SCHEMA, cls=jsonschema.Draft202012Validator)
    again = Report.read(tmp_path / NAME)
    assert again.issues == report.issues
    assert again.facts("disk") == report.facts("disk")
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert page.startswith("# Preflight: 2 errors\n")
    for _, issue in report.issues:
        assert all(text in page for text in (issue.what, issue.where, issue.fix, issue.code))


@pytest.mark.parametrize(
    "change",
    [{"ok": "yes"}, {"schema": 2}, {"issues": [{"code": "Bad Code"}]}, {"probes": [{"name": "a"}]}, {"more": 1}],
)
def test_the_schema_refuses_what_is_none(report: Report, change: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(report.content() | change, SCHEMA, cls=jsonschema.Draft202012Validator)


def test_a_damaged_report_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"schema": 9}'):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(UserError, match="cannot be read"):
            Report.read(tmp_path / NAME)


def test_a_later_look_takes_the_place_of_an_earlier_one(report: Report) -> None:
    mended = report.joined(run_probes([Probe(name, Finding) for name in ("data", "again", "driver")]))
    assert mended.ok
    assert [issue.code for _, issue in mended.issues] == ["disk_tight"]
    assert mended.topology == {"cluster": "local"}


def test_the_error_names_each_with_its_fix_and_crosses_processes(report: Report) -> None:
    error = PreflightFailed([*report.errors, LOW])
    for text in (str(error), str(pickle.loads(pickle.dumps(error)))):  # noqa: S301 - made here
        assert "there is no such file: a.jsonl\n  where: data.path\n  fix:   give a file\n" in text
        assert "where: run_root=runs on 10.0.0.2" in text
    one = PreflightFailed(report.errors[:1])
    assert str(one) == str(UserError("there is no such file: a.jsonl", where="data.path", fix="give a file"))
