"""The torch engine needs no vLLM: nothing imports it before a vLLM engine is started."""

from __future__ import annotations

import subprocess
import sys


def test_vllm_is_imported_only_by_its_own_engine() -> None:
    program = (
        "import sys; sys.modules['vllm'] = None; "  # importing it raises from here on
        "import rlsys.engines.rollout, rlsys.engines.rollout.torch, rlsys.environments.play, rlsys.engines.sync.verify"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
