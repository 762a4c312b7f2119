"""A recipe over several hosts: network namespaces with a Ray node each, a link that is cut and a host that dies.

The hosts share no memory, no process ids and no loopback; their own names lead nowhere, and beside the network that Ray
was given there is another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hosts import Host, hosts, wait_until, why_not
from running import SMALL, comparable, launch, only_run, read_jsonl, said_at_the_end, steps_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=f"no hosts can be made here: {why_not()}"),
]
RUN_S = 400
TINY = ("rollout=torch", "trainer.ranks=2", "data.prompts_per_step=4", "eval.every=0")
WEIGHTS = 3_216_896  # bytes of the bundled model


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Host]]:
    """Three hosts; the first is Ray's head, and where runs are started."""
    folder = tmp_path_factory.mktemp("hosts")
    with hosts(3, folder) as made:
        for host in made:
            host.start_ray(made[0], folder)
        yield made


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(cluster: Sequence[Host], tmp_path: Path) -> Start:
    """Starts a run on the head; its folder is below ``tmp_path/runs``, what it says in ``tmp_path/said``."""
    head = cluster[0]
    where = ("cluster=ray", f"cluster.address='{head.address}:6379'", *SMALL)

    def run(*overrides: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rlsys.launch", "+recipe=grpo_qwen", *where, *TINY, *overrides]
        return head.popen(*command, log=tmp_path / "said", cwd=tmp_path)

    return run


def ends(run: subprocess.Popen[str], root: Path) -> int:
    code = run.wait(RUN_S)
    print((root / "said").read_text())
    return code


def steps_done(root: Path) -> int:
    """Of a run that may still be starting, or writing its last line."""
    done = 0
    for path in root.glob("runs/*/metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                done = max(done, json.loads(line)["step"])
            except ValueError:
                return done
    return done


def test_a_run_over_three_hosts_computes_what_it_computes_on_one(
    cluster: Sequence[Host], start: Start, tmp_path: Path
) -> None:
    before = [(host.received("fast0"), host.received("mgmt0")) for host in cluster]
    assert ends(start("steps=3"), tmp_path) == 0
    carried = [
        (host.received("fast0") - fast, host.received("mgmt0") - slow)
        for host, (fast, slow) in zip(cluster, before, strict=True)
    ]
    # Gradients go between the first and the last, weights to the one in the middle: by the network that Ray was given.
    assert all(fast > WEIGHTS for fast, _ in carried), carried
    assert all(slow < 100_000 for _, slow in carried), carried
    alone = tmp_path / "alone"
    alone.mkdir()
    assert launch(*TINY, "steps=3", cwd=alone).returncode == 0
    apart, together = comparable(only_run(tmp_path)), comparable(only_run(alone))
    assert [line["sync/bytes"] for line in apart] == [line["sync/bytes"] for line in together]
    assert apart == together


def test_memory_of_another_host_is_refused_as_a_transport(start: Start, tmp_path: Path) -> None:
    assert ends(start("steps=1", "rollout.sync=shared_memory"), tmp_path) == 2
    assert "share no memory" in (tmp_path / "said").read_text()


def test_a_host_whose_link_is_cut_is_named_and_the_run_goes_on_without_it(
    cluster: Sequence[Host], start: Start, tmp_path: Path
) -> None:
    run = start("steps=30", "checkpoint.every=1")
    wait_until(lambda: steps_done(tmp_path) >= 2 or run.poll() is not None, "two steps", RUN_S)
    cluster[2].cut()
    assert ends(run, tmp_path) == 0
    assert_went_on(only_run(tmp_path), cluster[2], steps=30)


def test_a_host_that_dies_is_named_and_the_run_goes_on_without_it(
    cluster: Sequence[Host], start: Start, tmp_path: Path
) -> None:
    run = start("steps=30", "checkpoint.every=1")
    wait_until(lambda: steps_done(tmp_path) >= 2 or run.poll() is not None, "two steps", RUN_S)
    cluster[1].kill()
    assert ends(run, tmp_path) == 0
    assert_went_on(only_run(tmp_path), cluster[1], steps=30)


def assert_went_on(folder: Path, lost: Host, *, steps: int) -> None:
    (restart,) = (event for event in read_jsonl(folder / "events.jsonl") if event["kind"] == "restart")
    assert len(restart["lost"]) == 1
    assert lost.address in restart["lost"][0]
    assert lost.address in restart["text"]
    assert said_at_the_end(folder) == "finished"
    lines = steps_of(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert restart["step"] >= 1  # from a checkpoint
    # What the run went past was computed again in a new lineage, if there was any.
    assert {line["lineage"] for line in lines} <= {0, 1}
