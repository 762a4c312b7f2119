"""Runs that something is done to: each a process of its own, with a real Ray cluster. Of the tests in ``chaos/``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from faults import LOSS
from running import RUN_S, command, comparable, environment, processes_marked, read_jsonl, tensors_below

from rlsys.tracking.ledger import Audit, Kind, audit
from rlsys.tracking.metrics import read_metrics

TESTS = Path(__file__).resolve().parent
TINY = (
    "rollout=torch",
    "data.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "eval.every=0",
    "trainer.lr=1e-2",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
    "reward.parts.correct.use=rewards_for_runs.digits",
)
STEPS, SAMPLES = 4, 16
QUIET_S = 1.0  # after which a run without a new step is waiting for who was stopped
WHOLE = (f"steps={STEPS}", LOSS, "trainer.ranks=2")
"""A run with two trainer ranks that is compared with one that nothing was done to; SAMPLES of them a step."""


class ChaosRun:
    """A run under way. root: where it was started; folder: of the run."""

    def __init__(self, root: Path, *overrides: str, **variables: str):
        self.root, self.overrides, self._variables = root, overrides, variables
        self._test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        self.start()

    def start(self, *more: str) -> None:
        """Starts the command (again)."""
        self.said = self.root / f"said-{len(list(self.root.glob('said-*')))}"
        with self.said.open("w") as out:
            self.process = subprocess.Popen(
                command(*TINY, *self.overrides, *more),
                cwd=self.root,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment(PYTHONPATH=str(TESTS), RUN_OF_A_TEST=str(self.root), **self._variables),
                start_new_session=True,
            )

    @property
    def folder(self) -> Path:
        (folder,) = (path for path in (self.root / "runs").iterdir() if path.is_dir())
        return folder

    def steps(self) -> list[int]:
        """Of the lines that are whole."""
        found = []
        for path in self.root.glob("runs/*/metrics.jsonl"):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                found += [json.loads(line)["step"]] if line.endswith("\n") else []
        return found

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return [event for event in read_jsonl(self.folder / "events.jsonl") if kind in (None, event["kind"])]

    def until(self, condition: Callable[[], bool], what: str, seconds: float = RUN_S) -> None:
        """Waits for something to be so while the run goes on."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}:\n{self.said.read_text()}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.said.read_text()}"
            time.sleep(0.05)

    def until_step(self, step: int) -> None:
        self.until(lambda: max(self.steps(), default=0) >= step, f"step {step}")

    def roster(self) -> dict[str, int]:
        """Process by role, of the driver and all actors, as the run wrote it down last."""
        content = (self.folder / "processes.json").read_text(encoding="utf-8")
        return {entry["role"]: entry["pid"] for entry in json.loads(content) if not entry["below"]}

    def kill(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Sends a signal to an actor, or to the ``driver``. Returns the process it was sent to."""
        pid = self.process.pid if role == "driver" else self.roster()[role]
        os.kill(pid, number)
        return pid

    def interrupt(self, role: str) -> None:
        """Stops the actor, so that the run comes to wait for it whatever it is at, and kills it then."""
        pid = self.kill(role, signal.SIGSTOP)
        seen, since = self.steps(), time.monotonic()
        while time.monotonic() - since < QUIET_S:
            if self.steps() != seen:
                seen, since = self.steps(), time.monotonic()
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)

    def tear(self) -> None:
        """Leaves half a line in each file, as a writer does that is killed."""
        for name in ("metrics.jsonl", "events.jsonl", "ledger.jsonl"):
            with (self.folder / name).open("a") as file:
                file.write('{"step": 9')

    def ends(self, seconds: float = RUN_S) -> int:
        """Waits for the end; the exit code."""
        code = self.process.wait(seconds)
        print(self.said.read_text())
        return code

    def left(self, *, within_s: float = 30.0) -> list[str]:
        """Processes that outlived it."""
        return processes_marked(str(self.root), within_s=within_s)

    def account(self) -> str:
        """JSON: how it ended, seconds from each loss to the new process at work, and what became of its samples."""
        found = audit(self.folder)
        recovered = [
            {"who": event.get("actor", "trainers"), "phase": event.get("phase", ""), "s": event["seconds"]}
            for event in self.events()
            if event["kind"] in ("restarted", "trainer restarted")
        ]
        return json.dumps(
            {
                "test": self._test,
                "exit_code": self.process.returncode,
                "recovered": recovered,
                "lost": found.count(Kind.LOST),
                "trained_twice": found.count(Kind.TWICE),
                "trained": len(found.trained_ids),
                "said": [event["text"] for event in self.events("end")][-1:],
            }
        )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for process in psutil.process_iter():
            try:
                if process.environ().get("RUN_OF_A_TEST") == str(self.root):
                    process.kill()
            except psutil.Error:
                continue


def nothing_torn(folder: Path, steps: int) -> None:
    """Every step has one line, every sample was trained once, and no writer of a checkpoint left anything."""
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(1, steps + 1))
    assert len(surviving(folder).trained_ids) == steps * SAMPLES
    assert not any(path.name.startswith(".partial") for path in (folder / "checkpoints").iterdir())


Chaos = Callable[..., ChaosRun]


def surviving(folder: Path) -> Audit:
    """The run's ledger, in which nothing is amiss: no sample lost, none trained twice."""
    found = audit(folder)
    assert found.ok, found.violations
    return found


def same_result(folder: Path, undisturbed: Path) -> None:
    """Both runs end with the same weights and optimiser, bit for bit, after steps with the same figures but for those
    that count what happened to actors."""

    def figures(path: Path) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in line.items() if "lineage" not in name and not name.startswith("fleet/")}
            for line in comparable(path)
        ]

    assert figures(folder) == figures(undisturbed)
    newest = max(path.name for path in (undisturbed / "checkpoints").iterdir())
    for part in ("model", f"checkpoints/{newest}"):
        # Libraries move Python's own generator as time goes by, and nothing that is trained reads it.
        mine, theirs = (
            {name: content for name, content in tensors_below(path / part).items() if not name.startswith("rng-")}
            for path in (folder, undisturbed)
        )
        assert theirs
        assert [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)] == [], part
