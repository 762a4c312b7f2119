"""Hosts of a cluster on which rlsys does not run are named, each with why."""

from __future__ import annotations

import importlib
from copy import copy
from pathlib import Path

import pytest
import ray

from rlsys.cluster import session
from rlsys.cluster.preflight import nodes
from rlsys.cluster.topology import found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_host_without_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that only this process has stands for rlsys."""
    (tmp_path / "only_here.py").write_text("def look():\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(session, "look", importlib.import_module("only_here").look)
    (host,) = found(ray.nodes()).nodes
    with pytest.raises(session.HostsFailed, match=rf"{host.address}: .*No module named 'only_here'") as error:
        session._looks([host])
    assert str(copy(error.value)) == str(error.value)
    (issue,) = nodes.answered(nodes.Looked({}, {}, error.value.failed)).issues
    assert (issue.code, issue.node) == ("node_without_rlsys", host.address)
