"""The stream over real actors that sample nothing: whatever is lost, late, filtered or closed, every group that was
handed out is trained once or is still outstanding, and no error stays unseen."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from rlsys.batch.versions import WeightVersion
from rlsys.cluster.placement import ActorSpec
from rlsys.config.modes import AsyncController, HealthConfig, OneStepOffController
from rlsys.config.schema import DeadlineConfig
from rlsys.controller import stream as streams
from rlsys.controller.buffer import State
from rlsys.controller.stream import Pools, Stream, Taken
from rlsys.tracking.ledger import Ledger, audit
from rlsys.workers.actors import Group
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup
from rlsys.workers.waits import ActorFailed, DeadlineExceeded, StopFlag, StopRequested, gather

pytestmark = pytest.mark.ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # who runs the actors cannot import the tests

SAMPLES, STEP = 2, 2


class Actor:
    """What a stand-in does stands in a folder: ``held-NAME`` holds an answer up as long as the file is there."""

    def start(self, folder: str) -> int:
        self.folder = Path(folder)
        return os.getpid()

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Alive."""

    def close(self) -> None:
        """There is nothing to end."""

    def wait(self, name: str) -> None:
        (self.folder / f"began-{name}").touch()
        while (self.folder / f"held-{name}").exists():
            time.sleep(0.02)


@dataclass
class Summary:
    uid: str
    pid: int
    oldest_version: Any

    def __post_init__(self) -> None:
        self.prompt_lengths = self.response_lengths = np.array([3, 3])

    def __len__(self) -> int:
        return 2


class Sampler:
    async def start(self, folder: str) -> int:
        self.folder, self.version, self.given_up = Path(folder), 0, set[str]()
        return os.getpid()

    async def update(self, version: int) -> None:
        self.version = version

    async def generate(self, prompts: Any, first: int, last: int, request: Any, ticket: str) -> tuple[Any, Any]:
        uid, version = prompts["uid"][first], self.version
        (self.folder / f"began-{uid}.{os.getpid()}").touch()
        if (self.folder / "broken").exists():
            raise ValueError("no such environment")
        while (self.folder / f"held-{uid}").exists() or (self.folder / f"held-{os.getpid()}").exists():
            await asyncio.sleep(0.02)
        return uid, Summary(uid, os.getpid(), SimpleNamespace(step=version))

    @ray.method(concurrency_group="control")
    async def cancel(self, tickets: list[str]) -> None:
        self.given_up.update(tickets)

    @ray.method(concurrency_group="control")
    async def ping(self) -> None:
        """Alive."""

    async def close(self) -> None:
        """There is nothing to end."""


class Rewarder(Actor):
    def score(self, record_rows: list[int], step_rows: int, train: bool, *uids: str) -> tuple[Any, ...]:
        self.wait("reward")
        alike = [(self.folder / f"alike-{uid}").exists() for uid in uids]
        found = [SimpleNamespace(rewards=[0.0, 0.0 if same else 1.0], failures=[]) for same in alike]
        return *uids, found


class Referee(Actor):
    def logprobs(self, *uids: str) -> tuple[Any, ...]:
        self.wait("reference")
        return *uids, len(uids)


class Samplers(RolloutGroup):
    worker, concurrency_groups = Sampler, {"control": 4}  # type: ignore[assignment]


class Rewarders(RewardGroup):
    worker = Rewarder  # type: ignore[assignment]


class Referees(ReferenceGroup):
    worker = Referee  # type: ignore[assignment]


class Prompts:
    """Rows 0, 1, 2, …, of one epoch."""

    def __init__(self) -> None:
        self.at, self.full = 0, False

    def draw(self, count: int) -> tuple[Any, list[tuple[int, int]]]:
        if self.full:
            self.at += 1
            raise MemoryError("the store is full")
        places = [(row, 0) for row in range(self.at, self.at + count)]
        self.at += count
        return self.again(places), places

    def again(self, places: list[tuple[int, int]]) -> Any:
        return Batch(np.array([f"{row}@{epoch}" for row, epoch in places], dtype=object))

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Batch(dict[str, Any]):
    def __init__(self, uids: np.ndarray):
        super().__init__(uid=list(uids))
        self.non_tensor_batch = {"uid": uids}

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


@dataclass
class Bench:
    """A driver without a trainer: its weights are a number."""

    folder: Path
    config: Any
    pools: Pools
    fleets: Fleets
    pids: dict[str, list[int]]
    prompts: Prompts = field(default_factory=Prompts)
    step: int = 0
    lineage: int = 0
    stop: StopFlag = field(default_factory=StopFlag)

    def __post_init__(self) -> None:
        self.fleets.catch_up = self.give
        self.ledger = Ledger(self.folder / "ledger.jsonl")
        self.stream = self.opened()

    def opened(self, outstanding: Any = ()) -> Stream:
        prompts: Any = self.prompts
        return Stream(self.config, self.pools, prompts, self.ledger, self.stop, outstanding=outstanding)

    def give(self, samplers: list[int]) -> None:
        group, version = self.pools.rollout, WeightVersion(self.lineage, self.step)
        calls = [a.call("update", self.step, what="weights") for a in group.reached() if a.spec.index in samplers]
        self.fleets.rollout.given([call for call, _ in group._answers(calls, "sync")], version)

    def sync(self) -> None:
        self.give(self.fleets.rollout.reachable())
        self.stream.advance(WeightVersion(self.lineage, self.step))

    def train(self) -> Taken:
        """One step."""
        taken = self.stream.take(self.step)
        self.step += 1
        self.stream.trained(self.step, self.lineage)
        self.sync()
        return taken

    def until_trained(self, uid: str) -> list[Taken]:
        steps = [self.train()]
        while uid not in uids(steps[-1]):
            steps.append(self.train())
        return steps

    def checked(self) -> None:
        """At the end of a test: what the checkpoint has is what the ledger says."""
        self.stream.checkpoint(self.step, self.lineage)
        found = audit(self.folder)
        assert not found.violations
        assert len(found.trained_ids) >= SAMPLES * STEP * self.step or self.config.algorithm.filters

    def hold(self, name: Any) -> None:
        (self.folder / f"held-{name}").touch()

    def free(self, name: Any) -> None:
        (self.folder / f"held-{name}").unlink()

    def began(self, name: Any) -> list[str]:
        return [path.name for path in self.folder.glob(f"began-{name}*")]


def uids(taken: Taken) -> list[str]:
    return [shard.rollout.uid for shard in taken.experience.shards]  # type: ignore[attr-defined]


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.02)


@pytest.fixture(scope="module")
def groups(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Makes the groups of a test; what is left of them ends with the module."""
    made: list[Group] = []

    def make(folder: Path, samplers: int, reference: bool, health: HealthConfig) -> tuple[Pools, Fleets, Any]:
        def placement(role: str, count: int) -> Any:
            specs = [ActorSpec(role, index) for index in range(count)]
            return SimpleNamespace(plan=SimpleNamespace(of=lambda _: specs), options=lambda _: {"num_cpus": 0})

        deadlines, stop = DeadlineConfig(), StopFlag()
        rollout = Samplers(placement("rollout", samplers), deadlines, stop)
        reward = Rewarders(placement("reward", 1), deadlines, stop)
        refers = Referees(placement("reference", 1), deadlines, stop) if reference else None
        present = [group for group in (rollout, reward, refers) if group is not None]
        made.extend(present)
        starts = {g.role: g._starts(lambda a: a.call("start", str(folder), what="its start")) for g in present}
        pids = {role: gather(calls, phase="start", seconds=300) for role, calls in starts.items()}
        fleets = Fleets.watch(rollout, reward, refers, health, lambda *_, **__: None, start_s=300)
        return Pools(rollout, reward, refers, fleets), fleets, pids

    yield make
    for group in made:
        for actor in group._actors:
            ray.kill(actor.handle)


Make = Callable[..., Bench]


@pytest.fixture
def make(groups: Callable[..., Any], tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def bench(
        *,
        bound: int = 1,
        ordered: bool = False,
        samplers: int = 2,
        reference: bool = False,
        filters: bool = False,
        restarts: int = 3,
        **deadlines: float,
    ) -> Bench:
        controller = (
            OneStepOffController(kind="one_step_off")
            if ordered
            else AsyncController(kind="async", max_staleness=bound, uncorrected=True)
        )
        config = SimpleNamespace(
            controller=controller,
            data=SimpleNamespace(prompts_per_step=STEP, max_response_tokens=4),
            rollout=SimpleNamespace(samples_per_prompt=SAMPLES, temperature=1.0),
            algorithm=SimpleNamespace(filters={"zero_variance": {}} if filters else {}, max_refills=3),
            deadlines=DeadlineConfig(**deadlines),
            seed=1,
        )
        made.append(Bench(tmp_path, config, *groups(tmp_path, samplers, reference, HealthConfig(restarts=restarts))))
        return made[-1]

    yield bench
    for one in made:
        one.stream.close()
        one.ledger.close()


@pytest.mark.parametrize(
    ("bound", "ordered"),
    [pytest.param(0, False, marks=pytest.mark.slow), (2, False), pytest.param(1, True, marks=pytest.mark.slow)],
)
def test_every_group_is_trained_once_and_none_is_too_old(make: Make, bound: int, ordered: bool) -> None:
    bench = make(bound=bound, ordered=ordered, samplers=1)
    bench.sync()
    steps = [bench.train() for _ in range(4)]
    trained = [uid for step in steps for uid in uids(step)]
    assert len(set(trained)) == len(trained) == 4 * STEP
    assert all(taken.metrics["async/staleness_max"] <= bound for taken in steps)
    if ordered:
        assert trained == [f"{row}@0" for row in range(4 * STEP)]
    bench.checked()


def test_what_a_killed_sampler_had_is_sampled_by_another_and_it_comes_back_with_weights(make: Make) -> None:
    bench = make()
    dead = bench.pids["rollout"][0]
    bench.hold(dead)
    bench.sync()
    until(lambda: bench.began(f"*.{dead}"))
    had = [name.split("-")[1].split(".")[0] for name in bench.began(f"*.{dead}")]
    os.kill(dead, signal.SIGKILL)
    steps = bench.until_trained(had[0])
    assert sum(taken.metrics["async/reissued"] for taken in steps) >= len(had)
    while len(bench.fleets.rollout.ready()) < 2:
        bench.train()
    bench.checked()


@pytest.mark.slow
def test_what_a_sampler_had_that_has_left_for_good_is_sampled_by_another(make: Make) -> None:
    bench = make(bound=3)
    gone = bench.pids["rollout"][0]
    bench.hold(gone)
    bench.sync()
    until(lambda: len(bench.began(f"*.{gone}")) >= 2)
    bench.fleets.rollout.leave(0, finish=False)
    bench.until_trained(bench.began(f"*.{gone}")[-1].split("-")[1].split(".")[0])
    bench.checked()


def test_a_straggler_is_sampled_anew_at_the_bound_and_in_the_end_waited_for(make: Make) -> None:
    bench = make(bound=1, samplers=1)
    bench.hold("0@0")
    bench.sync()
    late = 0.0
    while not late:
        late = bench.train().metrics["async/late"]
    assert bench.stream.buffer["0@0"].attempt >= 1
    bench.free("0@0")
    bench.until_trained("0@0")
    bench.checked()


@pytest.mark.slow
def test_what_passes_its_deadline_goes_to_another_sampler(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that it was taken from has nothing to do since, and would be the least busy."""
    monkeypatch.setattr(streams, "_TRIES", 1000)
    bench = make()
    stuck = bench.pids["rollout"][0]
    bench.hold(stuck)
    bench.sync()
    until(lambda: bench.began(f"*.{stuck}"))
    had = bench.began(f"*.{stuck}")[0].split("-")[1].split(".")[0]
    bench.config.deadlines = DeadlineConfig(rollout=0.5)
    until(lambda: len(bench.began(had)) == 2)
    bench.config.deadlines = DeadlineConfig()
    bench.free(stuck)
    bench.until_trained(had)
    bench.checked()


def test_what_passes_its_deadline_again_and_again_ends_the_run(make: Make) -> None:
    bench = make(samplers=1, rollout=0.3)
    bench.hold("0@0")
    bench.sync()
    until(lambda: not any(thread.name == "stream" for thread in threading.enumerate()))
    with pytest.raises(DeadlineExceeded, match="did not end"):
        bench.stream.take(0)
    bench.checked()


def test_groups_that_a_filter_drops_are_replaced(make: Make) -> None:
    bench = make(samplers=1, filters=True)
    for row in (0, 3):
        (bench.folder / f"alike-{row}@0").touch()
    bench.sync()
    steps = [bench.train() for _ in range(3)]
    assert not {"0@0", "3@0"} & {uid for step in steps for uid in uids(step)}
    assert sum(taken.metrics["filter/zero_variance_dropped"] for taken in steps) == 2
    bench.checked()


@pytest.mark.parametrize("role", ["reward", pytest.param("reference", marks=pytest.mark.slow)])
def test_what_a_lost_judge_was_asked_is_asked_again(make: Make, role: str) -> None:
    bench = make(samplers=1, reference=role == "reference")
    bench.hold(role)
    bench.sync()
    until(lambda: bench.began(role))
    os.kill(bench.pids[role][0], signal.SIGKILL)
    bench.free(role)
    steps = [bench.train(), bench.train()]
    assert sum(taken.metrics["async/reissued"] for taken in steps) == 0  # nothing is sampled again
    bench.checked()


def test_a_group_sampled_anew_while_its_reward_is_under_way_is_not_taken_for_the_old_one(make: Make) -> None:
    bench = make(bound=0, samplers=1)
    bench.hold("reward")
    bench.sync()
    until(lambda: bench.began("reward"))
    bench.step += 1
    bench.sync()  # as if a step had been trained: all that is under way is too old
    assert all(bench.stream.buffer[key].attempt == 1 for key in bench.stream.buffer.within())
    bench.free("reward")
    taken = bench.stream.take(bench.step)
    assert taken.metrics["async/staleness_max"] == 0
    bench.stream.trained(bench.step + 1, 0)
    assert not audit(bench.folder).violations


def test_an_error_of_a_sampler_reaches_who_takes_the_next_step_and_loses_nothing(make: Make) -> None:
    bench = make(samplers=1)
    (bench.folder / "broken").touch()
    bench.sync()
    for _ in range(2):
        with pytest.raises(ActorFailed, match="no such environment"):
            bench.stream.take(0)
    _, outstanding = bench.stream.checkpoint(0, 0)
    assert [place for *place, _ in outstanding] == [[row, 0] for row in range(2 * STEP)]


def test_prompts_that_could_not_be_handed_out_come_next(make: Make) -> None:
    bench = make(samplers=1)
    bench.prompts.full = True
    bench.stream = bench.opened([(7, 0, 2)])
    bench.sync()
    with pytest.raises(MemoryError):
        bench.stream.take(0)
    data, outstanding = bench.stream.checkpoint(0, 0)
    assert (data, outstanding) == ({"at": 0}, [[7, 0, 2]])


def test_a_step_is_never_held_back_by_a_full_store(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_STORE_SHARE", 0.0)
    bench = make(bound=3, samplers=1)
    bench.sync()
    steps = [bench.train() for _ in range(3)]
    assert sum(taken.metrics["async/held_back"] for taken in steps) > 0
    bench.checked()


def test_a_closed_stream_ends_at_once_and_the_next_one_goes_on(make: Make) -> None:
    bench = make(samplers=1)
    bench.hold("0@0")
    bench.sync()
    bench.train()
    data, outstanding = bench.stream.checkpoint(bench.step, 0)
    trained = audit(bench.folder).trained_ids
    before = {tuple(place): attempt for *place, attempt in outstanding}
    assert before[0, 0] == bench.stream.buffer["0@0"].attempt + 1
    with suppress(StopRequested):
        bench.stop.request()
        bench.stream.take(bench.step)
    bench.stop.requested_at = None
    bench.stream.close()
    assert not bench.stream.buffer.count(State.TAKEN)
    for _ in range(2):  # the first one is interrupted before its first checkpoint
        bench.stream.close()
        bench.lineage += 1
        bench.ledger.resumed(bench.step, bench.lineage)
        bench.prompts.load_state_dict(data)
        bench.stream = bench.opened(outstanding)
        bench.sync()
        until(lambda: bench.stream.buffer.within())
    assert bench.stream.buffer["0@0"].attempt == before[0, 0]
    bench.free("0@0")
    bench.until_trained("0@0")
    found = audit(bench.folder)
    assert not found.violations
    assert trained < found.trained_ids
    bench.checked()
