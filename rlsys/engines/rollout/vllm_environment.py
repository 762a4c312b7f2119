"""What vLLM reads from the environment and from nowhere else. Imports no vLLM, so that it can come before it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def quiet() -> None:
    """No usage reports, and errors only in the log; call it before vLLM is imported. What the user has set stays."""
    for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(name, value)


@contextmanager
def core_environment(threads: int, *, on_cpu: bool, eager: bool) -> Iterator[None]:
    """The environment that vLLM's core process is started in; afterwards this process has its own again.

    On a CPU, vLLM would start a third process and pin the model's threads to all cores but one; here model and
    scheduler share the core process, with ``threads`` threads that the operating system may place. Compiling sampling
    code with the machine's C++ compiler takes 10 s at the first token and gains nothing on a small batch, so ``eager``
    turns that off too.
    """
    before = dict(os.environ)
    quiet()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # whole GiB only, and would override the configured size
        if eager:
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
