"""Collapse monitors: alarms on outputs that become all the same, or leave the place where the run began.

Each looks at a few of a step's metrics, has one limit, and is silent on a step that lacks one of them:

===================  ================================================================================================
``variance``         variance of the critic's predictions below .5 × that of their targets
``distance``         their mean pairwise distance below .5 × that of the targets
``variance_start``   variance of the critic's predictions below .5 × that in the first batch
``distance_start``   their mean pairwise distance below .5 × that in the first batch
``kl``               ``policy/kl``, ``policy/kl_ref`` or ``policy/approx_kl`` above 10 nats a token
``entropy``          entropy below .05 × that of the first batch, and rewards have not paid for it
``reward_std``       10 looks in a row at a batch of equal rewards, and they are below the best seen or never differed
``length``           mean response length more than 4 × that of the first batch, or less than a quarter of it
``truncated``        more than .9 of the responses ran into the length limit
``repetition``       more than .5 of a response's n-grams occurred before in it
===================  ================================================================================================

What a run does when it goes well is no collapse, hence three exceptions:

- A value head begins at zero, so the critic's four are silent for the first 20 steps. They are silent too where the
  targets' spread is below half of the largest seen: the task is being solved, all returns are alike, and little is left
  to predict. Where returns are mostly chance (the same prompt succeeds and fails), also a perfect critic predicts
  less than half of their variance: such a run wants a lower limit.
- A policy that learns a task with one right answer loses nearly all its entropy. ``entropy`` is silent where the mean
  reward is above the first batch's by half that batch's standard deviation, or is above it at all and rewards differ
  less than half as much.
- A solved task gives equal rewards. ``reward_std`` counts a batch only where the mean is below the largest seen, or
  where no batch ever had different rewards, so that there was nothing to learn from.

A metric that is not finite is an alarm of every monitor that reads it; except that a step with a skipped update
(``guards.max_skipped`` bounds those) is not held against the policy or the critic, whose weights stayed as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlsys.config.errors import UserError
from rlsys.tracking.alerts import Alert

GRACE = 20  # steps before the critic is judged
_FADED = 0.5  # of the targets' largest spread: below, the targets themselves have drawn together
_PAID = 0.5  # of the first batch's standard deviation of rewards: a rise that accounts for lost entropy

_FIRST = (
    "critic/prediction_variance",
    "critic/prediction_distance",
    "policy/entropy",
    "reward/mean",
    "reward/std",
    "rollout/length_mean",
)
_LARGEST = ("critic/target_variance", "critic/target_distance", "reward/mean", "reward/std")


class Look(NamedTuple):
    """metrics: finite ones of this step; first, largest: of the run so far, this step included; steps: since the first
    one seen; alike: looks in a row, with this one, at a batch of equal rewards without a good reason."""

    metrics: Mapping[str, float]
    first: Mapping[str, float]
    largest: Mapping[str, float]
    steps: int
    alike: int


@dataclass(frozen=True)
class Monitor:
    """default: its limit; reads: metrics without which it is silent (any_of: one is enough); judge: a sentence where
    the limit is passed; above: a limit has to be larger."""

    default: float
    reads: tuple[str, ...]
    judge: Callable[[Look, float], str | None]
    above: float = 0.0
    any_of: bool = False


def _against_targets(kind: str, what: str) -> Monitor:
    prediction, target = f"critic/prediction_{kind}", f"critic/target_{kind}"

    def judge(look: Look, limit: float) -> str | None:
        found, wanted = look.metrics[prediction], look.metrics[target]
        if look.steps < GRACE or _faded(look, target) or found >= limit * wanted:
            return None
        return (
            f"{what} of the critic's predictions is {found:.3g} where that of its targets is {wanted:.3g} (limit "
            f"{limit:g} ×): it predicts much the same everywhere; look at critic/loss, its learning rate, the returns"
        )

    return Monitor(0.5, (prediction, target), judge)


def _against_start(kind: str, what: str) -> Monitor:
    prediction, target = f"critic/prediction_{kind}", f"critic/target_{kind}"

    def judge(look: Look, limit: float) -> str | None:
        found, began = look.metrics[prediction], look.first[prediction]
        if look.steps < GRACE or _faded(look, target) or found >= limit * began:
            return None
        return (
            f"{what} of the critic's predictions fell from {began:.3g} in the first batch to {found:.3g} (limit "
            f"{limit:g} ×) while its targets still differ: look at critic/loss, its learning rate and the value clip"
        )

    return Monitor(0.5, (prediction,), judge)


def _faded(look: Look, target: str) -> bool:
    return target in look.metrics and look.metrics[target] < _FADED * look.largest[target]


_KL = ("policy/kl", "policy/kl_ref", "policy/approx_kl")


def _kl(look: Look, limit: float) -> str | None:
    far = [f"{name} is {look.metrics[name]:.3g}" for name in _KL if look.metrics.get(name, 0.0) > limit]
    if not far:
        return None
    return (
        f"{' and '.join(far)} nats a token (limit {limit:g}): the policy has run away; lower trainer.lr, raise the "
        "KL's weight, or go back to an earlier checkpoint"
    )


def _entropy(look: Look, limit: float) -> str | None:
    found, began = look.metrics["policy/entropy"], look.first["policy/entropy"]
    if found >= limit * began or _paid(look):
        return None
    return (
        f"entropy fell from {began:.3g} nats in the first batch to {found:.3g} (limit {limit:g} ×) while the mean "
        f"reward went from {look.first['reward/mean']:.3g} to {look.metrics['reward/mean']:.3g}: the policy stopped "
        "exploring before it learnt; lower trainer.lr, add an entropy bonus or clip higher"
    )


def _paid(look: Look) -> bool:
    rise, std = look.metrics["reward/mean"] - look.first["reward/mean"], look.first["reward/std"]
    return rise > _PAID * std or (rise > 0 and look.metrics["reward/std"] < 0.5 * std)


def _reward_std(look: Look, limit: float) -> str | None:
    if look.alike < limit:
        return None
    return (
        f"all rewards of a batch were equal in {look.alike} looks in a row (limit {limit:g}; the last at "
        f"{look.metrics['reward/mean']:.3g}, the best mean {look.largest['reward/mean']:.3g}): there is nothing to "
        "learn from; look at the rollouts, the reward and the difficulty of the prompts"
    )


def _length(look: Look, limit: float) -> str | None:
    found, began = look.metrics["rollout/length_mean"], look.first["rollout/length_mean"]
    if began / limit <= found <= began * limit:
        return None
    return (
        f"responses have {found:.4g} tokens on average, {began:.4g} in the first batch (limit {limit:g} ×, either "
        "way): read some rollouts, and look for a reward that pays for length"
    )


def _share(name: str, text: str) -> Callable[[Look, float], str | None]:
    def judge(look: Look, limit: float) -> str | None:
        found = look.metrics[name]
        return f"{found:.0%} {text.format(limit=f'{limit:.0%}')}" if found > limit else None

    return judge


MONITORS: dict[str, Monitor] = {
    "variance": _against_targets("variance", "the variance"),
    "distance": _against_targets("distance", "the mean pairwise distance"),
    "variance_start": _against_start("variance", "the variance"),
    "distance_start": _against_start("distance", "the mean pairwise distance"),
    "kl": Monitor(10.0, _KL, _kl, any_of=True),
    "entropy": Monitor(0.05, ("policy/entropy", "reward/mean", "reward/std"), _entropy),
    "reward_std": Monitor(10.0, ("reward/std", "reward/mean"), _reward_std),
    "length": Monitor(4.0, ("rollout/length_mean",), _length, above=1.0),
    "truncated": Monitor(
        0.9,
        ("rollout/truncated",),
        _share(
            "rollout/truncated",
            "of the responses ran into the length limit (limit {limit}): raise the response length, or look at the "
            "rollouts for text that does not end",
        ),
    ),
    "repetition": Monitor(
        0.5,
        ("rollout/repetition",),
        _share(
            "rollout/repetition",
            "of a response's n-grams occurred before in it (limit {limit}): read some rollouts; lower trainer.lr or go "
            "back to an earlier checkpoint",
        ),
    ),
}


class CollapseMonitor:
    """All monitors of a run. What it remembers is JSON, so that a resumed run raises what the whole one would have.

    Args:
        limits: by monitor, a limit in place of the default; None: off (config: ``guards.limits``).
        every: steps between looks (config: ``guards.every``); first and largest values are taken from every step.

    Raises:
        UserError: there is no such monitor, or its limit is out of range.
    """

    def __init__(self, limits: Mapping[str, float | None], every: int = 1):
        if every < 1:
            raise ValueError(f"looks are at least one step apart, not {every}")
        for name, limit in limits.items():
            _check_limit(name, limit)
        merged = {name: monitor.default for name, monitor in MONITORS.items()} | dict(limits)
        self.limits = {name: limit for name, limit in merged.items() if limit is not None}
        self.every = every
        self._began: int | None = None
        self._first: dict[str, float] = {}
        self._largest: dict[str, float] = {}
        self._alike = 0

    def check(self, metrics: Mapping[str, float], step: int) -> list[Alert]:
        """Alerts of one step, in the order of ``MONITORS``; to be called once for every step.

        Args:
            metrics: of the step.
            step: counted from 1; there is a look at multiples of ``every``.
        """
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        self._began = step if self._began is None else self._began
        self._first = {name: finite[name] for name in _FIRST if name in finite} | self._first
        for name in _LARGEST:
            if name in finite:
                self._largest[name] = max(finite[name], self._largest.get(name, -math.inf))
        if step % self.every:
            return []
        if "reward/mean" in finite and "reward/std" in finite:
            self._alike = self._alike + 1 if self._without_signal(finite) else 0
        look = Look(finite, self._first, self._largest, step - self._began, self._alike)
        skipped = metrics.get("train/skipped", 0.0) > 0 or metrics.get("critic/skipped", 0.0) > 0
        alerts = []
        for name, limit in self.limits.items():
            text = _judge(MONITORS[name], limit, metrics, look, skipped)
            if text is not None:
                alerts.append(Alert(name, text))
        return alerts

    def state_dict(self) -> dict[str, Any]:
        """JSON content, all finite."""
        return {
            "began": self._began,
            "first": dict(self._first),
            "largest": dict(self._largest),
            "alike": self._alike,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._began, self._alike = state["began"], state["alike"]
        self._first, self._largest = dict(state["first"]), dict(state["largest"])

    def _without_signal(self, metrics: Mapping[str, float]) -> bool:
        """All rewards are equal (up to rounding), and not because they are as good as they ever were."""
        mean, rounding = metrics["reward/mean"], 1e-9 * max(1.0, abs(metrics["reward/mean"]))
        if metrics["reward/std"] > rounding:
            return False
        return mean < self._largest["reward/mean"] - rounding or self._largest["reward/std"] <= rounding


def _judge(monitor: Monitor, limit: float, metrics: Mapping[str, float], look: Look, skipped: bool) -> str | None:
    there = [name for name in monitor.reads if name in metrics]
    if not there or (len(there) < len(monitor.reads) and not monitor.any_of):
        return None
    broken = [name for name in there if name not in look.metrics]
    if not broken:
        return monitor.judge(look, limit)
    if skipped and all(name.startswith(("policy/", "critic/")) for name in broken):
        return None
    found = " and ".join(f"{name} is {metrics[name]:g}" for name in broken)
    return f"{found}: look at the rewards and the log-probs of this step's rollouts, and lower trainer.lr"


def _check_limit(name: str, limit: float | None) -> None:
    where = f"guards.limits.{name}"
    if name not in MONITORS:
        raise UserError(
            f"there is no collapse monitor '{name}'", where=where, fix=f"the monitors are {', '.join(MONITORS)}"
        )
    monitor = MONITORS[name]
    if limit is not None and not monitor.above < limit < math.inf:
        raise UserError(
            f"the limit of '{name}' is a number above {monitor.above:g}, not {limit}",
            where=where,
            fix=f"the default is {monitor.default:g}; null turns the monitor off",
        )
