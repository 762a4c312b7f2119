"""A step's experience: sampled, scored, filtered, refilled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from rlsys.algorithms.advantages import group_index
from rlsys.algorithms.filters import kept
from rlsys.algorithms.requirements import needs_baselines
from rlsys.batch import DataProto
from rlsys.config.schema import RunConfig
from rlsys.workers.experience import SHARDS_PER_WORKER, Experience, collect
from rlsys.workers.fleet import Fleets
from rlsys.workers.groups import ReferenceGroup, RewardGroup, RolloutGroup
from rlsys.workers.rollout import SampleRequest
from rlsys.workers.waits import StopFlag


class Prompts(Protocol):
    """Where prompts come from, as ``PromptStream`` gives them."""

    def next_batch(self, count: int | None = None) -> DataProto: ...


@dataclass(frozen=True)
class Collector:
    """Plays prompt groups until a step has its number, or is out of rounds.

    prompts: where more come from. check: called with what was sampled, before it is used; may raise.
    recorded_rows: so many rows, from the first, come back in full for people to read.
    fleets: keep the actors alive.
    """

    config: RunConfig
    rollout: RolloutGroup
    reward: RewardGroup
    reference: ReferenceGroup | None
    prompts: Prompts
    stop: StopFlag
    check: Callable[[Experience], None]
    recorded_rows: int
    fleets: Fleets | None = None

    def step(self, prompts: DataProto) -> tuple[Experience, np.ndarray | None, dict[str, float]]:
        """The step's groups; where groups are filtered, those that passed, and new ones in the place of the others.

        A round asks for exactly as many groups as are missing, so that none that passed is ever left over. When the
        rounds are used up the step is smaller; where no group passed at all, it is trained on as it was sampled.

        Returns:
            Samples; the reward [B] of each one's greedy response, where the estimator reads it; ``filter/…`` metrics.
        """
        algorithm, wanted = self.config.algorithm, len(prompts)
        experience = self._play(prompts, self.recorded_rows)
        greedy = self._greedy(prompts)
        if not algorithm.filters:
            return experience, _lookup(greedy, experience), {}
        first, rounds = experience, 0
        experience, dropped = self._filter(experience)
        counts = dict(dropped)
        while (missing := wanted - _groups(experience)) and rounds < algorithm.max_refills:
            rounds += 1
            more = self.prompts.next_batch(missing)
            played, dropped = self._filter(self._play(more, 0))
            greedy |= self._greedy(more)
            experience = experience.followed_by(played)
            counts = {name: counts.get(name, 0) + number for name, number in dropped.items()}
        metrics = {f"filter/{name}_dropped": float(number) for name, number in counts.items()}
        metrics |= {
            "filter/rounds": float(rounds),
            "filter/groups": float(_groups(experience)),
            "filter/generated": float(experience.generated),
        }
        experience = experience if len(experience) else experience.first(first.generated)
        return experience, _lookup(greedy, experience), metrics

    def _play(self, prompts: DataProto, recorded_rows: int) -> Experience:
        config = self.config
        request = SampleRequest(
            samples=config.rollout.samples_per_prompt,
            temperature=config.rollout.temperature,
            max_tokens=config.data.max_response_tokens,
            run_seed=config.seed,
        )
        experience = collect(
            prompts,
            request,
            self.rollout,
            self.reward,
            self.reference,
            config.deadlines,
            self.stop,
            record_rows=recorded_rows,
            # The torch sampler's samples depend on its batch in the last bits: one shard a worker makes runs
            # repeatable.
            shards_per_worker=1 if config.rollout.engine == "torch" else SHARDS_PER_WORKER,
            fleets=self.fleets,
        )
        self.check(experience)
        return experience

    def _filter(self, experience: Experience) -> tuple[Experience, dict[str, int]]:
        """What passes, and how many groups each filter dropped."""
        uids = list(experience.rollout("uids"))
        keep, counts = kept(self.config.algorithm.filters, torch.from_numpy(experience.rewards), uids)
        return experience.keep(keep[group_index(uids)].numpy()), counts

    def _greedy(self, prompts: DataProto) -> dict[str, float]:
        """Reward of each prompt's greedy response, by uid; none where nobody reads it."""
        if not needs_baselines(self.config):
            return {}
        request = SampleRequest(
            samples=1, temperature=0.0, max_tokens=self.config.data.max_response_tokens, run_seed=self.config.seed
        )
        played = collect(
            prompts,
            request,
            self.rollout,
            self.reward,
            None,
            self.config.deadlines,
            self.stop,
            shards_per_worker=1,
            train=False,
            fleets=self.fleets,
        )
        self.check(played)
        return dict(zip(played.rollout("uids"), played.rewards.tolist(), strict=True))


def _groups(experience: Experience) -> int:
    return len(set(experience.rollout("uids"))) if len(experience) else 0


def _lookup(greedy: dict[str, float], experience: Experience) -> np.ndarray | None:
    return np.array([greedy[uid] for uid in experience.rollout("uids")]) if greedy else None
