"""Whatever a reward function does, only its own sample pays for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from rlsys.config.errors import UserError
from rlsys.config.schema import RewardConfig, RewardPart
from rlsys.rewards.budget import FailureBudget, RewardBudgetExceeded
from rlsys.rewards.compose import build_parts
from rlsys.rewards.pool import RewardPool

MODULE = """
    import ctypes, math, os, re, subprocess, sys, threading
    from rlsys.rewards.base import RewardResult, hooks

    def misbehave(response, task):
        if response == "loop":
            while True: pass
        if response == "loop in C": re.match(r"(a+)+$", "a" * 64 + "b")
        if response == "wait": threading.Event().wait()
        if response == "child":
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            open(task["pid_file"], "w").write(str(child.pid))
            child.wait()
        if response == "exit": os._exit(3)
        if response == "sys.exit": sys.exit(3)
        if response == "segfault": ctypes.string_at(0)
        if response == "raise": raise RuntimeError("boom")
        if response == "print": print("noise", flush=True)
        return {"nan": math.nan, "none": None, "text": "1"}.get(response, 1.0)

    def modules(response, task):
        info = {"modules": sorted(m for m in sys.modules if "." not in m), "pid": os.getpid()}
        return RewardResult(1.0, "words", info)

    def late(response, task):
        if response == "loop":
            while True: pass
        return 1.0

    def unready(): raise RuntimeError("no such model")

    @hooks(warm_up=unready)
    def never_ready(response, task): return 1.0

    def echo(response, task): return float(response)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_pool_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)


def pool_of(use: str, *, workers: int = 1, timeout_s: float = 30.0) -> RewardPool:
    return RewardPool(build_parts({"part": RewardPart(use=use)}), workers=workers, timeout_s=timeout_s)


@pytest.mark.usefixtures("mine")
def test_results_come_in_the_order_of_the_items() -> None:
    with pool_of("my_pool_rewards.echo", workers=2) as pool:
        for size in (0, 1, 300):
            scored = pool.score([(str(i), {}) for i in range(size)])
            assert [s.reward for s in scored] == [float(i) for i in range(size)]


@pytest.mark.usefixtures("mine")
def test_large_samples_pass() -> None:
    with pool_of("my_pool_rewards.echo") as pool:
        scored = pool.score([("1", {"prompt": "x" * 3_000_000})] * 3)
    assert [s.reward for s in scored] == [1.0] * 3


@pytest.mark.usefixtures("mine")
def test_failures_stay_with_their_sample() -> None:
    expected = {
        "raise": ("raised", "RuntimeError: boom"),
        "sys.exit": ("raised", "SystemExit: 3"),
        "exit": ("crashed", "exit code 3"),
        "segfault": ("crashed", "SIGSEGV"),
        "nan": ("bad value", "nan"),
        "none": ("bad value", "None"),
        "text": ("bad value", "str '1'"),
    }
    responses = [word for bad in expected for word in (bad, "fine", "print")]
    with pool_of("my_pool_rewards.misbehave", workers=2) as pool:
        scored = pool.score([(response, {}) for response in responses])
        assert all(s.failure is None for s in pool.score([("fine", {})] * 20)), "the pool goes on"
    for response, sample in zip(responses, scored, strict=True):
        if response in expected:
            kind, words = expected[response]
            assert sample.failure is not None
            assert (sample.failure.kind, sample.failure.part, sample.reward) == (kind, "part", 0.0)
            assert words in sample.failure.message
        else:
            assert (sample.failure, sample.reward) == (None, 1.0)
    segfault = scored[responses.index("segfault")].failure
    assert segfault is not None
    assert "in misbehave" in segfault.message, "a crash says where"


@pytest.mark.usefixtures("mine")
def test_a_call_past_its_limit_is_ended_and_says_where_it_was() -> None:
    responses = ["fine", "loop", "fine", "loop in C", "wait", "fine"]
    with pool_of("my_pool_rewards.misbehave", timeout_s=1.5) as pool:
        scored = pool.score([(response, {}) for response in responses])
    for response, sample in zip(responses, scored, strict=True):
        if response == "fine":
            assert (sample.failure, sample.reward) == (None, 1.0)
        else:
            assert sample.failure is not None
            assert sample.failure.kind == "timeout"
            assert "no result within 1.5 s" in sample.failure.message
            assert "in misbehave" in sample.failure.message


@pytest.mark.usefixtures("mine")
def test_what_a_reward_started_ends_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with pool_of("my_pool_rewards.misbehave", timeout_s=2.0) as pool:
        (sample,) = pool.score([("child", {"pid_file": str(pid_file)})])
    assert sample.failure is not None
    pid = int(pid_file.read_text())
    _, alive = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    for process in alive:
        process.kill()
    assert not alive


@pytest.mark.usefixtures("mine")
def test_a_time_out_names_the_part_and_keeps_the_scores_before_it() -> None:
    parts = build_parts(
        {
            "first": RewardPart(use="exact_match"),
            "gated": RewardPart(use="my_pool_rewards.late", when="first > 0.5", weight=0.5),
        }
    )
    with RewardPool(parts, timeout_s=1.5) as pool:
        scored = pool.score([("loop", {"answer": "loop"}), ("loop", {"answer": "x"}), ("fine", {"answer": "fine"})])
    assert scored[0].failure is not None
    assert (scored[0].failure.part, scored[0].failure.kind) == ("gated", "timeout")
    assert (scored[0].scores, scored[0].reward) == ({"first": 1.0, "gated": None}, 0.0)
    assert (scored[1].scores, scored[1].failure) == ({"first": 0.0, "gated": None}, None), "gated off: never called"
    assert (scored[2].scores, scored[2].reward) == ({"first": 1.0, "gated": 1.0}, 1.5)


@pytest.mark.usefixtures("mine")
def test_workers_stay_light_and_pass_words_and_info_on() -> None:
    with pool_of("my_pool_rewards.modules") as pool:
        (sample,) = pool.score([("x", {})])
    assert sample.feedback == "words"
    info = sample.info["part"]
    assert not {"torch", "ray", "vllm", "transformers", "pydantic", "numpy", "math_verify"} & set(info["modules"])
    assert info["pid"] != os.getpid()


@pytest.mark.usefixtures("mine")
def test_a_worker_that_dies_while_idle_is_replaced() -> None:
    with pool_of("my_pool_rewards.modules") as pool:
        (before,) = pool.score([("x", {})])
        worker = psutil.Process(before.info["part"]["pid"])
        worker.kill()
        psutil.wait_procs([worker], timeout=20)
        (after,) = pool.score([("x", {})])
    assert after.failure is None
    assert after.info["part"]["pid"] != before.info["part"]["pid"]


@pytest.mark.usefixtures("mine")
def test_a_part_that_cannot_be_prepared_is_an_error_at_once() -> None:
    with pytest.raises(UserError, match="no such model"):
        pool_of("my_pool_rewards.never_ready")


@pytest.mark.usefixtures("mine")
def test_the_budget_ends_a_step_that_is_lost_anyway() -> None:
    with pool_of("my_pool_rewards.misbehave", timeout_s=1.0) as pool:
        with pytest.raises(RewardBudgetExceeded, match="3 of 100 samples") as caught:  # not after a hundred time-outs
            pool.score([("loop", {"prompt": "p"})] * 100, budget=FailureBudget(0.02))
        assert [row["error"] for row in caught.value.rows] == ["timeout"] * 3
        assert pool.score([("fine", {})])[0].reward == 1.0, "and the pool can be used again"
        assert pool.score([("raise", {})], budget=FailureBudget(0.5), total=2)[0].failure is not None


@pytest.mark.usefixtures("mine")
def test_close_leaves_no_process() -> None:
    with pool_of("my_pool_rewards.modules", workers=2) as pool:
        worker = psutil.Process(pool.score([("x", {})])[0].info["part"]["pid"])
    assert not worker.is_running()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.score([])


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """Even one that never comes back from C code, which holds the interpreter."""
    (tmp_path / "my_orphan_rewards.py").write_text(
        "import os, re\n"
        "def hang(response, task):\n"
        "    print(os.getpid(), flush=True)\n"
        "    re.match(r'(a+)+$', 'a' * 64 + 'b')\n"
    )
    program = (
        "from rlsys.config.schema import RewardPart\n"
        "from rlsys.rewards.compose import build_parts\n"
        "from rlsys.rewards.pool import RewardPool\n"
        "RewardPool(build_parts({'x': RewardPart(use='my_orphan_rewards.hang')}), timeout_s=1000).score([('', {})])\n"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert parent.stderr is not None
    worker = psutil.Process(int(parent.stderr.readline()))  # what a reward prints goes to standard error
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stderr.close()
    _, alive = psutil.wait_procs([worker], timeout=20)
    assert not alive


def test_the_pool_of_a_configuration() -> None:
    config = RewardConfig(
        parts={"correct": RewardPart(use="gsm8k"), "form": RewardPart(use="regex", args={"pattern": "#"})}
    )
    with RewardPool.from_config(config) as pool:
        (sample,) = pool.score([("#### 5", {"answer": "5"})])
    assert sample.reward == 2.0
