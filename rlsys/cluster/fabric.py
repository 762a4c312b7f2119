"""``python -m rlsys.cluster.fabric``: prints this host's NVLink domain, for the label that Ray gives the node."""

from __future__ import annotations

import shutil
import subprocess
import sys

from rlsys.cluster.topology import fabric_domain

_SECONDS = 60


def main() -> int:
    """Returns 1, and prints nothing, where the GPUs are in no fabric."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        sys.stderr.write("there is no nvidia-smi on the path\n")
        return 1
    said = subprocess.run([smi, "-q"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    domain = fabric_domain(said.stdout)
    if said.returncode or domain is None:
        sys.stderr.write(f"the GPUs of this host are in no NVLink fabric {said.stderr.strip()}\n")
        return 1
    sys.stdout.write(domain + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
