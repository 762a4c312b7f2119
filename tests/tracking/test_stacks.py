"""Stacks of processes that do not cooperate."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rlsys.tracking import stacks

SLEEPER = """
import sys, time
from rlsys.tracking import stacks
{first}
def waits_for_ever():
    print("ready", flush=True)
    time.sleep(3600)
waits_for_ever()
"""


def started(first: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER.format(first=first)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    process = started("stacks.answer_signal()")
    yield process
    process.kill()
    process.wait()


def test_of_a_process_that_is_stopped(sleeper: subprocess.Popen[str]) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    text = stacks.of_tree(sleeper.pid)
    assert "waits_for_ever" in text
    assert f"process {sleeper.pid}, stopped" in text


def test_without_py_spy_a_worker_writes_its_own(
    sleeper: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "spy", lambda: None)
    for _ in range(2):  # each answer is whole, and of this time
        text = stacks.of(sleeper.pid)
        assert text.count("waits_for_ever") == 1
    assert sleeper.poll() is None


def test_who_neither_may_be_read_nor_answers_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "spy", lambda: None)
    process = started()
    try:
        assert "no stacks" in stacks.of(process.pid)
        assert process.poll() is None  # SIGUSR2 would have ended it
    finally:
        process.kill()
        process.wait()


def test_processes_below_are_in_it() -> None:
    process = started("import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])")
    try:
        text = stacks.of_tree(process.pid)
        assert text.count("=== process") == 2
    finally:
        for line in text.splitlines():
            if line.startswith("=== process"):
                os.kill(int(line.split()[2].rstrip(",")), signal.SIGKILL)
        process.wait()


def test_of_all_threads_of_this_process() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="a thread of this test")
    thread.start()
    try:
        assert "a thread of this test" in stacks.own()
    finally:
        ended.set()
        thread.join()


def test_of_one_that_is_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert "gone" in stacks.of_tree(process.pid)
