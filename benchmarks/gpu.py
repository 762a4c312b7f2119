"""What is measured on a GPU: gradients, log-prob kernels, utilisation, memory, weight sync, sampling, a GRPO step.

    python -m benchmarks.gpu [--part NAME …] [--quick] [--json PATH] [--out docs/results]

Each part is a process of its own that takes less than eight minutes on a data-centre GPU. Parts that are measured in
several calls with the same ``--json`` join in that file, and the page is made of all that it has. A part that cannot
run says why; it has no figure. Without a GPU: exit code 2. A part that failed: 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

NAMES = ("correctness", "logprob", "mfu", "activations", "sync", "sampling", "grpo_step")
PACKAGES = ("transformers", "triton", "flash-attn", "vllm", "trl", "liger-kernel", "ray")
LIMIT_S = 540


def measure(name: str, quick: bool) -> dict[str, Any]:
    """One part in this process: its figures, or why there are none."""
    from benchmarks.gpu_parts import PARTS, Unavailable

    try:
        return dataclasses.asdict(PARTS[name](quick))
    except Unavailable as reason:
        return {"skipped": str(reason)}


def apart(name: str, quick: bool) -> dict[str, Any]:
    """One part in a process of its own, with where and when."""
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "part.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", "--part", name, "--json", str(path)]
        if quick:
            command.append("--quick")
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            said = process.communicate(timeout=LIMIT_S)[1].strip().splitlines()
            found = json.loads(path.read_text()) if path.exists() else {"failed": (said or ["it said nothing"])[-1]}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.communicate()
            found = {"failed": f"it took more than {LIMIT_S} s"}
    where = {"machine": report.machine(), "versions": report.versions(*PACKAGES), "date": date.today().isoformat()}
    return found | where | {"quick": quick}


def joined(path: Path | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of that file and these, in the order of NAMES; what was measured now replaces what there was."""
    old = json.loads(path.read_text(encoding="utf-8"))["parts"] if path is not None and path.exists() else {}
    return {name: (old | dict(found))[name] for name in NAMES if name in old or name in found}


def page(parts: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """Of all parts that there are."""
    sections = []
    for name, part in parts.items():
        lines = [f"## {name}"]
        reason = next((f"*{kind}*: {part[kind]}" for kind in ("skipped", "failed") if kind in part), None)
        if reason is not None:
            lines.append(reason)
        else:
            lines += [_wrapped(part["text"]), report.table(part["header"], part["rows"])]
            if part["ratios"]:
                rows = [(n, f"{v:.3g}", f"{limits[n]:g}" if n in limits else "") for n, v in part["ratios"].items()]
                lines.append(report.table(("ratio", "value", "bar"), rows))
        used = ", ".join(f"{package} {version}" for package, version in part["versions"].items())
        quick = " `--quick`: it ran, and is no figure." if part["quick"] else ""
        lines.append(_wrapped(f"{part['date']}, {part['machine']}. {used}.{quick}"))
        sections.append("\n\n".join(lines))
    missing = [name for name in NAMES if name not in parts]
    sections += [f"Not measured yet: {', '.join(missing)}."] if missing else []
    body = "\n\n".join(sections)
    return f"# On one GPU\n\n`python -m benchmarks.gpu`; each part is a process of its own.\n\n{body}\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--part", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("error: benchmarks.gpu measures on a GPU, and torch sees none here\n")
        return 2
    if arguments.child:
        report.write_json(arguments.json, measure(arguments.part[0], arguments.quick))
        return 0
    from benchmarks.gpu_parts import LIMITS

    found: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for name in arguments.part:
        found[name] = apart(name, arguments.quick)
        parts = joined(arguments.json, found)
        if arguments.json:  # after each: what is there survives what comes
            ratios = {n: v for part in parts.values() if not part["quick"] for n, v in part.get("ratios", {}).items()}
            report.write_json(arguments.json, {"ratios": ratios, "limits": LIMITS, "parts": parts})
    text = page(parts, LIMITS)
    sys.stdout.write(text)
    if arguments.out:
        report.write_page(arguments.out, "gpu", text)
    return int(any("failed" in part for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
