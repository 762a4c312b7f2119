"""``rlsys doctor`` on a cluster of two nodes: each is asked, the run is placed, and the way between them measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from running import RUN_S, environment

from rlsys.cluster.preflight.report import SCHEMA_FILE

SCRIPT = """
import sys
from ray.cluster_utils import Cluster
from rlsys import cli
resources = {"num_cpus": 1, "object_store_memory": 400 << 20}
cluster = Cluster(initialize_head=True, head_node_args={**resources, "include_dashboard": False})
try:
    cluster.add_node(**resources)
    run = ["+recipe=grpo_qwen", "cluster=ray", f"cluster.address='{cluster.address}'"]
    sys.exit(cli.main(["doctor", *run, *sys.argv[1:]]))
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
def test_nodes_are_asked_and_the_network_between_them_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, "--bandwidth", "--json", "report.json"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=RUN_S, check=False, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(content, json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    facts = {probe["name"]: probe["facts"] for probe in content["probes"]}
    assert len(facts["nodes"]["nodes"]) == len(facts["clocks"]["ahead_s"]) == 2
    assert facts["versions"] == {"nodes": 2, "differ": 0}
    assert facts["placement"]["actors"] == 3
    rates = facts["network rates"]["gbs"]
    assert len(rates) == 2
    assert all(rate > 0 for rate in rates.values())
