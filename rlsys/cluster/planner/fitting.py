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


def nonnegative(
    rows: Sequence[Sequence[float]], targets: Sequence[float], least: Sequence[float] | None = None
) -> list[float]:
    """x ≥ least for which rows · x is nearest to the targets, by the sum of squared relative errors. Every choice of
    columns that are above their least is tried: there are few.

    Args:
        least: of each column; None: 0.
    """
    matrix = np.asarray(rows, dtype=float) / np.asarray(targets, dtype=float)[:, None]
    start = np.zeros(matrix.shape[1]) if least is None else np.asarray(least, dtype=float)
    left = 1 - matrix @ start
    best, smallest = np.zeros(matrix.shape[1]), float(np.square(left).sum())
    for size in range(1, min(matrix.shape) + 1):
        for columns in combinations(range(matrix.shape[1]), size):
            part, *_ = np.linalg.lstsq(matrix[:, columns], left, rcond=None)
            if (part < 0).any():
                continue
            error = float(np.square(matrix[:, columns] @ part - left).sum())
            if error < smallest - 1e-12:
                best, smallest = np.zeros(matrix.shape[1]), error
                best[list(columns)] = part
    return [float(x) for x in start + best]


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
    # No device is faster than its own peak, whatever a few runs of small models would fit best.
    products, passes, layer = nonnegative([[p[name] for name in names] for p in update], spent, (1.0, 0.0, 0.0))
    matmul = 1 / products
    decode = [plan.phases["rollout"].parts for plan in plans]
    spent = [run["time/rollout_s"] - parts["prompts"] / matmul for parts, (_, run) in zip(decode, runs, strict=True)]
    columns = [
        [p["matrix products"], p["weights from memory"] + p["cache from memory"], p["starting layers"]] for p in decode
    ]
    product, read, started = nonnegative(columns, spent, (1.0, 1.0, 0.0))
    sent = [plan.work.shape.parameters * 4e-9 for plan in plans]
    per_gb, agreeing = nonnegative([[gb, 1.0] for gb in sent], [run["time/sync_s"] for _, run in runs])
    rest = [run["time/step_s"] - sum(run[f"time/{n}_s"] for n in ("update", "rollout", "sync")) for _, run in runs]
    fixed, each = nonnegative([[1.0, plan.work.samples] for plan in plans], [max(r, 1e-3) for r in rest])
    return replace(
        start, matmul_fraction=matmul, activation_passes=passes, layer_s=layer,
        decode_matmul_fraction=1 / product, decode_bandwidth_fraction=1 / read,
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
