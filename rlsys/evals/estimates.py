"""Held-out figures with their uncertainty: accuracy, avg@n, pass@k. Pure numpy; nothing here samples.

A problem is the unit of sampling: the n responses of one problem are not n independent trials, so every interval
is taken over problems.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Estimate(NamedTuple):
    """A mean and its confidence interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of ``k`` responses is right, from ``c`` right ones among ``n``.

    1 - C(n-c, k) / C(n, k), evaluated as a running product so that no binomial overflows
    (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374, eq. 1).

    Raises:
        ValueError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n (with k > n no unbiased estimate exists).
    """
    if not 0 <= c <= n:
        raise ValueError(f"c={c} right responses among n={n}")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 ≤ k ≤ n={n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def wilson(mean: float, trials: float, level: float = 0.95) -> Estimate:
    """Wilson's score interval of a proportion (Wilson 1927, JASA 22:209-212).

    Unlike mean ± z·s it stays in [0, 1] and keeps a width at 0 % and 100 %.

    Args:
        mean: observed proportion.
        trials: number of trials; a fraction where it is an effective sample size.
        level: confidence level.

    Raises:
        ValueError: no trials, or a mean outside [0, 1].
    """
    if trials <= 0 or not 0 <= mean <= 1:
        raise ValueError(f"a proportion needs trials > 0 and a mean in [0, 1], got {mean} of {trials}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z * z / trials
    centre = (mean + z * z / (2 * trials)) / shrink
    half = z / shrink * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials * trials))
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def mean_over_problems(values: ArrayLike, samples: int = 1, level: float = 0.95) -> Estimate:
    """Mean of one figure a problem, with Wilson's interval at the effective sample size of the clusters.

    The effective size is mean·(1-mean) / (s²/P): how many independent yes/no trials would vary as much as the P
    problems did (Kish 1965, "Survey Sampling", design effect). It is held between P (problems all right or all wrong)
    and P·samples (responses as good as independent), so that for one sample a problem this is Wilson's interval itself,
    and P equal problems do not claim certainty.

    Args:
        values: [P] in [0, 1].
        samples: responses behind each value.
        level: confidence level.

    Raises:
        ValueError: no problems, or values outside [0, 1].
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"one value a problem is needed, got shape {values.shape}")
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("values of problems must lie in [0, 1]")
    problems = values.size
    mean = float(np.clip(values.mean(), 0.0, 1.0))
    variance_of_mean = values.var(ddof=1) / problems if problems > 1 else 0.0
    effective = mean * (1 - mean) / variance_of_mean if variance_of_mean > 0 else problems
    return wilson(mean, float(np.clip(effective, problems, problems * samples)), level)


def accuracy(correct: ArrayLike, level: float = 0.95) -> Estimate:
    """Share of right answers, one greedy response a problem.

    Args:
        correct: [P] of 0/1 or bool.
    """
    return mean_over_problems(correct, 1, level)


def avg_at_n(correct: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean accuracy of a sampled response.

    Args:
        correct: [P, n] of 0/1 or bool, n responses for each problem.
    """
    correct = _responses(correct)
    return mean_over_problems(correct.mean(axis=1), correct.shape[1], level)


def mean_pass_at_k(correct: ArrayLike, k: int, level: float = 0.95) -> Estimate:
    """pass@k averaged over problems.

    Args:
        correct: [P, n] of 0/1 or bool.
        k: at most n.

    Raises:
        ValueError: k above n.
    """
    correct = _responses(correct)
    n = correct.shape[1]
    by_count = np.array([pass_at_k(n, c, k) for c in range(n + 1)])
    return mean_over_problems(by_count[correct.sum(axis=1)], n, level)


def greedy_metrics(correct: ArrayLike) -> dict[str, float]:
    """``eval/accuracy`` with its 95 % interval, from [P] greedy outcomes."""
    return _named("eval/accuracy", accuracy(correct))


def sampled_metrics(correct: ArrayLike, k: int) -> dict[str, float]:
    """``eval/avg@n`` and ``eval/pass@k`` with their 95 % intervals, from [P, n] sampled outcomes."""
    n = _responses(correct).shape[1]
    return _named(f"eval/avg@{n}", avg_at_n(correct)) | _named(f"eval/pass@{k}", mean_pass_at_k(correct, k))


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _responses(correct: ArrayLike) -> np.ndarray:
    """[P, n] outcomes as int64."""
    correct = np.asarray(correct)
    if correct.ndim != 2 or not correct.size:
        raise ValueError(f"outcomes must be [problems, samples] and not empty, got shape {correct.shape}")
    return correct.astype(np.int64)
