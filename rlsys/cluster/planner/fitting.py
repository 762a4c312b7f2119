"""Coefficients from measured runs: each phase's time is linear in what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from rlsys.cluster.planner.calibration import Calibration, Coefficients
from rlsys.cluster.planner.plan import Question, RunPlan, plan_run

_MIB = 2**20
Run = tuple[Question, Mapping[str, float]]


def nonnegative(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """x ≥ 0 for which rows · x is nearest to the targets, by the sum of squared relative errors. Every choice of
    columns that are not 0 is tried: there are few."""
    matrix = np.asarray(rows, dtype=float) / np.asarray(targets, dtype=float)[:, None]
    best, least = np.zeros(matrix.shape[1]), float("inf")
    for size in range(1, min(matrix.shape) + 1):
        for columns in combinations(range(matrix.shape[1]), size):
            part, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(matrix)), rcond=None)
            if (part < 0).any():
                continue
            error = float(np.square(matrix[:, columns] @ part - 1).sum())
            if error < least - 1e-12:
                best, least = np.zeros(matrix.shape[1]), error
                best[list(columns)] = part
    return [float(x) for x in best]


def fit_rates(start: Coefficients, runs: Sequence[Run]) -> Coefficients:
    """Everything that times depend on.

    Args:
        start: the device's rates, which the fractions are of; other coefficients are replaced.
        runs: what was asked, and the run's metrics (``time/…_s``, medians).
    """
    unit = replace(
        start, matmul_fraction=1.0, activation_passes=1.0, layer_s=1.0, decode_matmul_fraction=1.0,
        decode_bandwidth_fraction=1.0, decode_layer_s=1.0,
    )  # fmt: skip
    plans = [plan_run(replace(asked, calibration=Calibration(unit, "", True))) for asked, _ in runs]
    update = [plan.phases["update"].parts for plan in plans]
    names = ("matrix products", "memory", "starting layers")
    spent = [run["time/update_s"] - parts["optimiser"] for parts, (_, run) in zip(update, runs, strict=True)]
    products, passes, layer = nonnegative([[parts[name] for name in names] for parts in update], spent)
    matmul = 1 / max(products, 1e-3)
    decode = [plan.phases["rollout"].parts for plan in plans]
    spent = [run["time/rollout_s"] - parts["prompts"] / matmul for parts, (_, run) in zip(decode, runs, strict=True)]
    columns = [
        [p["matrix products"], p["weights from memory"] + p["cache from memory"], p["starting layers"]] for p in decode
    ]
    product, read, started = nonnegative(columns, spent)
    sent = [plan.work.shape.parameters * 4e-9 for plan in plans]
    per_gb, agreeing = nonnegative([[gb, 1.0] for gb in sent], [run["time/sync_s"] for _, run in runs])
    rest = [run["time/step_s"] - sum(run[f"time/{n}_s"] for n in ("update", "rollout", "sync")) for _, run in runs]
    fixed, each = nonnegative([[1.0, plan.work.samples] for plan in plans], [max(r, 1e-3) for r in rest])
    return replace(
        start, matmul_fraction=matmul, activation_passes=passes, layer_s=layer,
        decode_matmul_fraction=1 / max(product, 1e-3), decode_bandwidth_fraction=1 / max(read, 1e-3),
        decode_layer_s=started, sync_gbs=1 / max(per_gb, 1e-3), sync_s=agreeing, driver_s=fixed, driver_sample_s=each,
    )  # fmt: skip


def fit_memory(
    start: Coefficients, runs: Sequence[Run], resident: Callable[[RunPlan], Mapping[str, float]]
) -> Coefficients:
    """What memory depends on.

    Args:
        runs: what was asked, and measured bytes of ``trainer`` and ``sampler`` beyond the import baseline.
        resident: the same two of a plan.
    """

    def said(known: Coefficients) -> list[Mapping[str, float]]:
        return [resident(plan_run(replace(asked, calibration=Calibration(known, "", True)))) for asked, _ in runs]

    bare = replace(start, activation_factor=0.0, trainer_mib=0.0, sampler_mib=0.0)
    without, once = said(bare), said(replace(bare, activation_factor=1.0))
    rows = [[b["trainer"] - a["trainer"], float(_MIB)] for a, b in zip(without, once, strict=True)]
    left = [max(run["trainer"] - a["trainer"], 1.0) for a, (_, run) in zip(without, runs, strict=True)]
    factor, trainer = nonnegative(rows, left)
    spare = [run["sampler"] - a["sampler"] for a, (_, run) in zip(without, runs, strict=True)]
    return replace(
        start, activation_factor=factor, trainer_mib=trainer, sampler_mib=max(sum(spare) / len(spare) / _MIB, 0.0)
    )
