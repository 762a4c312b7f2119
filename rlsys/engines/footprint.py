"""Amounts of memory, in words and as there is."""

from __future__ import annotations

import psutil
import torch


def gib(nbytes: int) -> str:
    """In GiB, with two digits below 1 and one decimal above."""
    return f"{nbytes / 2**30:.2g}" if nbytes < 2**30 else f"{nbytes / 2**30:.1f}"


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, or of this host's memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)
