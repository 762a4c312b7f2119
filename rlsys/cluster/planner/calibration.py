"""Measured coefficients of the planner's model, and where each came from (``calibration.json``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

FILE = Path(__file__).with_name("calibration.json")
Kind = Literal["cpu", "gpu"]
SCHEMA = 1


@dataclass(frozen=True)
class Coefficients:
    """Of one kind of device. Fractions are of what the hardware table says.

    matmul_fraction: matrix products in training and over prompts, of the peak.
    activation_passes: how often what a layer keeps for its backward pass goes through memory in training.
    layer_s: seconds that a layer takes in a micro-batch, forward and backward, however small it is.
    decode_matmul_fraction, decode_bandwidth_fraction: matrix products, and weights and cache, while decoding.
    decode_layer_s: seconds a layer of a decoding step, however few rows there are.
    sync_gbs, sync_s: new weights on their way to a sampler of the same host: rate, and seconds beside it.
    driver_s, driver_sample_s: prompts, rewards, advantages and everything else of a step: at all, and for each sample.
    host_link_gbs: between a device and main memory, one way.
    network_fraction: of the links between devices.
    activation_factor: what the trainer's activations are, by what autograd keeps.
    trainer_mib, sampler_mib: that a trainer rank and a sampler need beside everything that is counted.
    baseline_mib: of a process with everything imported and no model.
    peak_gflops: of one core, by dtype, and bandwidth_gbs: of the host, where no table says (CPUs); else empty and 0.
    """

    matmul_fraction: float
    activation_passes: float
    layer_s: float
    decode_matmul_fraction: float
    decode_bandwidth_fraction: float
    decode_layer_s: float
    sync_gbs: float
    sync_s: float
    driver_s: float
    driver_sample_s: float
    host_link_gbs: float
    network_fraction: float
    activation_factor: float
    trainer_mib: float
    sampler_mib: float
    baseline_mib: float
    peak_gflops: Mapping[str, float]
    bandwidth_gbs: float


@dataclass(frozen=True)
class Calibration:
    """source: where the coefficients are from, in words; measured: whether any run of rlsys stands behind them."""

    coefficients: Coefficients
    source: str
    measured: bool


def load(kind: Kind, path: Path = FILE) -> Calibration:
    """Raises ValueError for a file of another schema."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["schema"] != SCHEMA:
        raise ValueError(f"{path} has schema {found['schema']}, and {SCHEMA} is read")
    entry = found["kinds"][kind]
    names = {field.name for field in fields(Coefficients)}
    if set(entry["coefficients"]) != names:
        raise ValueError(f"{path}: {kind} has other coefficients than {sorted(names)}")
    return Calibration(Coefficients(**entry["coefficients"]), entry["source"], entry["measured"])


def save(kind: Kind, calibration: Calibration, provenance: Mapping[str, Any], path: Path = FILE) -> None:
    """Replaces one kind's entry. provenance: JSON content: machine, date, versions, runs that were fitted."""
    found = json.loads(path.read_text(encoding="utf-8"))
    found["kinds"][kind] = {
        "source": calibration.source,
        "measured": calibration.measured,
        "coefficients": asdict(calibration.coefficients),
        "provenance": dict(provenance),
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
