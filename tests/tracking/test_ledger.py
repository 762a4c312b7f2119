"""The ledger says what became of every group, whatever was killed when; and it finds what should not have happened."""

import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlsys.batch.versions import WeightVersion
from rlsys.cli import main
from rlsys.config.errors import UserError
from rlsys.tracking.ledger import OUTSTANDING, Kind, Ledger, LedgerGroup, State, audit, sample_ids

SAMPLES = 3


@dataclass
class Keeper:
    """What a controller knows: the model that the ledger is compared with.

    groups: (state, attempt) by uid; reopened: under way since before the last resume; given_up: earlier attempts.
    """

    step: int = 0
    lineage: int = 0
    next_uid: int = 0
    groups: dict[str, tuple[State, int]] = field(default_factory=dict)
    reopened: set[str] = field(default_factory=set)
    given_up: list[LedgerGroup] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)

    def within(self, *states: State) -> list[LedgerGroup]:
        return [LedgerGroup(uid, attempt, SAMPLES) for uid, (state, attempt) in self.groups.items() if state in states]

    def put(self, groups: list[LedgerGroup], state: State) -> None:
        for group in groups:
            self.groups[group.uid] = (state, group.attempt)

    def resumed(self, lineage: int) -> "Keeper":
        """A copy, as it goes on after a resume."""
        again = copy.deepcopy(self)
        again.lineage = lineage
        again.reopened = {group.uid for group in self.within(State.IN_FLIGHT, State.READY)}
        return again


class Driver:
    """Does what a controller does, to the model and to the ledger. rng decides which groups."""

    def __init__(self, path: Path):
        self.path = path
        self.keeper = Keeper()
        self.lineages = 0
        self.saved: list[tuple[Keeper, int]] = [(Keeper(), 0)]
        """Checkpoints on the present lineage, and how many bytes were on the disk by then."""
        self.ledger = Ledger(path)

    def issue(self, rng: random.Random) -> None:
        keeper = self.keeper
        new = [LedgerGroup(f"row{keeper.next_uid + i}@0", 0, SAMPLES) for i in range(rng.randint(1, 4))]
        keeper.next_uid += len(new)
        again = [LedgerGroup(g.uid, g.attempt + 1, SAMPLES) for g in self._some(rng, State.WAITING)]
        lost = [g for g in self._some(rng, State.IN_FLIGHT, State.READY) if g.uid in keeper.reopened]
        groups = [*new, *again, *lost]
        keeper.reopened -= {group.uid for group in groups}
        keeper.put(groups, State.IN_FLIGHT)
        self.ledger.issued(groups, WeightVersion(keeper.lineage, keeper.step))

    def receive(self, rng: random.Random) -> None:
        groups = self._some(rng, State.IN_FLIGHT)
        self.keeper.put(groups, State.READY)
        self.ledger.received(groups)

    def receive_late(self, rng: random.Random) -> None:
        self.ledger.received(rng.sample(self.keeper.given_up, min(2, len(self.keeper.given_up))))

    def reissue(self, rng: random.Random) -> None:
        groups = self._some(rng, State.IN_FLIGHT, State.READY)
        self.keeper.put(groups, State.WAITING)
        self.keeper.given_up += groups
        self.ledger.reissued(groups, "too old")

    def leave(self, rng: random.Random) -> None:
        groups = self._some(rng, State.READY)
        self.keeper.put(groups, State.FILTERED)
        self.ledger.filtered(groups, "equal rewards")

    def train(self, rng: random.Random) -> None:
        groups = self._some(rng, State.READY)
        self.keeper.step += 1
        self.keeper.put(groups, State.TRAINED)
        self.keeper.trained |= {sample for group in groups for sample in sample_ids(group)}
        self.ledger.trained(groups, self.keeper.step, self.keeper.lineage)

    def checkpoint(self, rng: random.Random) -> None:
        self.ledger.checkpointed(self.keeper.within(*OUTSTANDING), self.keeper.step, self.keeper.lineage)
        self.saved.append((copy.deepcopy(self.keeper), self.path.stat().st_size))

    def resume(self, rng: random.Random) -> None:
        """From any checkpoint of this lineage whose step comes up only there."""
        index = rng.randrange(len(self.saved))
        while index + 1 < len(self.saved) and self.saved[index + 1][0].step == self.saved[index][0].step:
            index += 1  # the newest checkpoint of a step is the one on disk
        if self.saved[index][0].step == 0:
            index = 0
        self.lineages += 1
        self.keeper = self.saved[index][0].resumed(self.lineages)
        self.saved = self.saved[: index + 1]
        self.ledger.resumed(self.keeper.step, self.keeper.lineage)

    def crash(self, rng: random.Random) -> None:
        """The file ends at any byte after those that were flushed; then the run goes on."""
        self.ledger.close()
        durable = self.saved[-1][1]
        size = self.path.stat().st_size
        os.truncate(self.path, min(size, rng.randint(durable, max(durable, size))))
        assert audit(self.path).ok
        self.ledger = Ledger(self.path)
        assert not audit(self.path).torn
        self.resume(rng)

    def _some(self, rng: random.Random, *states: State) -> list[LedgerGroup]:
        return [group for group in self.keeper.within(*states) if rng.random() < 0.5]


ACTIONS = ("issue", "receive", "receive_late", "reissue", "leave", "train", "checkpoint", "resume", "crash")


class LedgerMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(os.environ["LEDGER_TEST_FOLDER"])
        path = self.folder / f"{len(list(self.folder.iterdir()))}.jsonl"
        self.driver = Driver(path)

    @rule(action=st.sampled_from(ACTIONS), seed=st.integers(0, 2**32))
    def act(self, action: str, seed: int) -> None:
        getattr(self.driver, action)(random.Random(seed))

    @precondition(lambda self: hasattr(self, "driver"))
    @invariant()
    def says_what_the_model_knows(self) -> None:
        found, keeper = audit(self.driver.path), self.driver.keeper
        assert found.violations == []
        assert found.trained_ids == keeper.trained
        for state in State:
            assert found.groups[state] == len(keeper.within(state))
            assert found.samples[state] == SAMPLES * len(keeper.within(state))
        assert found.outstanding == len(keeper.within(*OUTSTANDING))

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.ledger.close()


def test_follows_any_interleaving_of_crashes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LEDGER_TEST_FOLDER", str(tmp_path))
    machine = LedgerMachine.TestCase
    machine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
    machine().runTest()


def played(path: Path, seed: int) -> Driver:
    """A run of random actions that has groups in every state."""
    rng, driver = random.Random(seed), Driver(path)
    for _ in range(60):
        getattr(driver, rng.choice(ACTIONS))(rng)
    for action in ("issue", "issue", "issue", "receive", "receive", "reissue", "issue", "receive", "leave", "train"):
        getattr(driver, action)(rng)
    for state in (State.IN_FLIGHT, State.READY, State.WAITING, State.FILTERED, State.TRAINED):
        if not driver.keeper.within(state):
            driver.ledger.close()
            return played(path.with_name(path.name + "~"), seed + 1000)
    assert audit(driver.path).ok
    return driver


def twice(driver: Driver, rng: random.Random) -> None:
    driver.ledger.trained([rng.choice(driver.keeper.within(State.TRAINED))], driver.keeper.step + 1, 0)


def lost(driver: Driver, rng: random.Random) -> None:
    held = driver.keeper.within(*OUTSTANDING)
    held.remove(rng.choice(held))
    driver.ledger.checkpointed(held, driver.keeper.step, 0)


def torn_apart(driver: Driver, rng: random.Random) -> None:
    group = rng.choice(driver.keeper.within(State.READY))
    driver.ledger.trained([group._replace(samples=SAMPLES - 1)], driver.keeper.step + 1, 0)


def two_attempts(driver: Driver, rng: random.Random) -> None:
    group = rng.choice(driver.keeper.within(State.TRAINED))
    driver.ledger.trained([group._replace(attempt=group.attempt + 1)], driver.keeper.step + 1, 0)


def given_up(driver: Driver, rng: random.Random) -> None:
    driver.ledger.trained([rng.choice(driver.keeper.within(State.WAITING))], driver.keeper.step + 1, 0)


def filtered(driver: Driver, rng: random.Random) -> None:
    driver.ledger.trained([rng.choice(driver.keeper.within(State.FILTERED))], driver.keeper.step + 1, 0)


def never_received(driver: Driver, rng: random.Random) -> None:
    driver.ledger.trained([rng.choice(driver.keeper.within(State.IN_FLIGHT))], driver.keeper.step + 1, 0)


def never_issued(driver: Driver, rng: random.Random) -> None:
    driver.ledger.trained([LedgerGroup("stranger@0", 0, SAMPLES)], driver.keeper.step + 1, 0)


def issued_twice(driver: Driver, rng: random.Random) -> None:
    driver.issue(rng)
    fresh = [group for group in driver.keeper.within(State.IN_FLIGHT) if group.uid not in driver.keeper.reopened]
    driver.ledger.issued([rng.choice(fresh)], WeightVersion(0, 0))


def issued_after_training(driver: Driver, rng: random.Random) -> None:
    driver.ledger.issued([rng.choice(driver.keeper.within(State.TRAINED))], WeightVersion(0, 0))


def invented(driver: Driver, rng: random.Random) -> None:
    held = [*driver.keeper.within(*OUTSTANDING), rng.choice(driver.keeper.within(State.TRAINED))]
    driver.ledger.checkpointed(held, driver.keeper.step, 0)


def from_nowhere(driver: Driver, rng: random.Random) -> None:
    driver.ledger.resumed(driver.keeper.step + 7, 9)


FAULTS = {
    twice: Kind.TWICE,
    lost: Kind.LOST,
    torn_apart: Kind.NOT_WHOLE,
    two_attempts: Kind.ATTEMPTS,
    given_up: Kind.ORDER,
    filtered: Kind.ORDER,
    never_received: Kind.ORDER,
    never_issued: Kind.ORDER,
    issued_twice: Kind.ORDER,
    issued_after_training: Kind.ORDER,
    invented: Kind.ORDER,
    from_nowhere: Kind.ORDER,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_finds_what_should_not_have_happened(tmp_path: Path, fault):
    for seed in range(5):
        driver = played(tmp_path / f"{seed}.jsonl", seed)
        fault(driver, random.Random(seed))
        found = audit(driver.path)
        assert [violation.kind for violation in found.violations] == [FAULTS[fault]]
        driver.ledger.close()


def test_what_a_resume_makes_void_may_be_trained_again(tmp_path: Path):
    a, b = LedgerGroup("a@0", 0, 2), LedgerGroup("b@0", 0, 2)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.issued([a, b], WeightVersion(0, 0))
        ledger.received([a, b])
        ledger.trained([a], 1, 0)
        ledger.checkpointed([b], 1, 0)
        ledger.trained([b], 2, 0)
        ledger.resumed(1, 1)
        assert audit(tmp_path).trained_ids == {"a@0#0", "a@0#1"}
        ledger.issued([b], WeightVersion(1, 1))
        ledger.received([b])
        ledger.trained([b], 2, 1)
    found = audit(tmp_path)
    assert found.ok
    assert found.groups[State.TRAINED] == 2
    assert (found.voided, found.resumes) == (2, 1)


def test_without_a_line_of_the_checkpoint_the_trained_line_counts(tmp_path: Path):
    a, b = LedgerGroup("a@0", 0, 2), LedgerGroup("b@0", 0, 2)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.issued([a, b], WeightVersion(0, 0))
        ledger.received([a, b])
        ledger.trained([a], 1, 0)
        ledger.trained([b], 2, 0)
        ledger.resumed(1, 1)
    found = audit(tmp_path)
    assert found.ok
    assert found.trained_ids == {"a@0#0", "a@0#1"}
    assert found.outstanding == 1


def test_a_torn_line_is_cut_off_and_said(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.issued([LedgerGroup("a@0", 0, 2)], WeightVersion(0, 0))
    whole = path.read_bytes()
    for tail in (b'{"event": "tra', b"\0" * 40, b"\0" * 40 + b"\n"):
        path.write_bytes(whole + tail)
        assert audit(path).torn
        said: list[str] = []
        with Ledger(path, said.append) as ledger:
            assert path.read_bytes() == whole
        assert f"{len(tail)} bytes" in said[0]


def test_damage_in_its_midst_is_refused_and_named(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    for damaged in ("not json", '{"event": "sold", "groups": []}', '{"event": "trained", "groups": []}', "[]"):
        path.write_text(damaged + '\n{"event": "received", "groups": []}\n')
        with pytest.raises(UserError, match="line 1"):
            audit(path)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.received([LedgerGroup("a@0", 0, 2)])
        whole = path.read_bytes()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, before[1]))
        try:
            with pytest.raises(UserError, match=r"ledger\.jsonl could not be written"):
                ledger.received([LedgerGroup("b@0", 0, 2)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == whole
        ledger.received([LedgerGroup("c@0", 0, 2)])
    assert [json.loads(line)["groups"][0][0] for line in path.read_text().splitlines()] == ["a@0", "c@0"]


def test_threads_write_whole_lines(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:

        def write(name: int) -> None:
            for number in range(200):
                ledger.issued([LedgerGroup(f"{name}.{number}@0", 0, 2)], WeightVersion(0, 0))

        threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert audit(path).groups[State.IN_FLIGHT] == 800


WRITER = """
import sys
from pathlib import Path
from rlsys.tracking.ledger import Ledger, LedgerGroup
ledger, number = Ledger(Path(sys.argv[1])), 0
while True:
    number += 1
    groups = [LedgerGroup(f"{number}.{i}@0", 0, 8) for i in range(50)]
    ledger.issued(groups, (0, 0))
    ledger.received(groups)
    ledger.trained(groups, number, 0)
    ledger.checkpointed([], number, 0)
    if number == 5:
        print("running", flush=True)
"""


def test_a_killed_writer_leaves_a_ledger_that_goes_on(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    with Ledger(path) as ledger:
        found = audit(path)
        assert found.ok
        steps = found.groups[State.TRAINED] // 50
        assert steps >= 5
        ledger.resumed(5, 1)
    found = audit(path)
    assert found.ok
    assert len(found.trained_ids) == 5 * 50 * 8
    assert found.voided == (steps - 5) * 50 * 8


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    group = LedgerGroup("row7@0", 0, 2)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.issued([group], WeightVersion(0, 0))
        ledger.received([group])
        ledger.trained([group], 1, 0)
        assert main(["ledger", str(tmp_path)]) == 0
        assert main(["ledger", str(tmp_path), "--json"]) == 0
        said = capsys.readouterr().out
        assert json.loads(said[said.index("{") :])["distinct_samples_trained"] == 2
        ledger.trained([group], 2, 0)
    assert main(["ledger", str(tmp_path)]) == 1
    assert "row7@0 was trained twice" in capsys.readouterr().out
    assert main(["ledger", str(tmp_path / "nowhere")]) == 2
