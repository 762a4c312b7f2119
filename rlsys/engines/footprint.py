"""Amounts of memory, in words and as there is."""

from __future__ import annotations

import psutil
import torch


def gib(nbytes: int) -> str:
    """In GiB, with two digits below 1 and one decimal above."""
    return f"{nbytes / 2**30:.2g}" if nbytes < 2**30 else f"{nbytes / 2**30:.1f}"


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU, or of this host's memory. Where they are one, CUDA counts what the page cache would give back as
    taken, and the host knows better."""
    memory = psutil.virtual_memory()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if torch.cuda.get_device_properties(device).is_integrated:
            free = min(max(free, memory.available), total)
        return int(free), int(total)
    return int(memory.available), int(memory.total)
