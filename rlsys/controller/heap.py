"""The heap of a long-running driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """What is alive now is left out of garbage collections until the end of the block.

    The modules and tables that a driver has loaded are millions of objects that stay; looking through all of them takes
    a quarter of a second, every few steps, with every thread waiting.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
