"""Fixtures of all rooms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)  # how long an example takes says nothing on a busy machine
settings.load_profile("no deadline")

_HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters and engines come first: none of them is left over when all others are done."""
    heavy = {item.path for item in items if item.get_closest_marker("ray") or item.get_closest_marker("vllm")}
    items.sort(key=lambda item: item.path not in heavy)


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    """A folder with GSM8K's ``train.jsonl`` and ``test.jsonl``: the full sets where they lie beside the checkout, else
    the sample of 64 rows each that comes with the tests."""
    full = _HERE.parent.parent / "shared" / "data" / "gsm8k"
    return full if (full / "test.jsonl").is_file() else _HERE / "data" / "gsm8k_sample"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster for all tests of this process marked ``ray``."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    yield
    ray.shutdown()
