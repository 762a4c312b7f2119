"""Samplers behind one contract. Importing this imports neither vLLM nor transformers; starting an engine does."""

from __future__ import annotations

from rlsys.config.errors import UserError
from rlsys.config.schema import LoraConfig, RolloutConfig, VllmRollout
from rlsys.engines.rollout.base import RolloutEngine
from rlsys.environments.base import Sample, SamplingParams

__all__ = ["RolloutEngine", "Sample", "SamplingParams", "start_engine"]


async def start_engine(
    model_path: str,
    config: RolloutConfig,
    *,
    max_length: int,
    seed: int = 0,
    threads: int | None = None,
    adapter: LoraConfig | None = None,
    sleeps: bool = False,
) -> RolloutEngine:
    """Starts the engine that ``config`` names, inside the event loop that will use it.

    Args:
        model_path: a Hugging Face folder or hub id.
        config: the run's rollout group.
        max_length: longest prompt + response in tokens.
        seed: the engine's own; each sample has one of its own besides.
        threads: CPU threads of the model's kernels; None: one a core that this process may use.
        adapter: updates are of this adapter, and vLLM's alone; None: of whole weights.
        sleeps: it will be put to sleep.

    Raises:
        UserError: vLLM is wanted but not installed, or ``engine_args`` names what vLLM lacks or rlsys decides.
    """
    if isinstance(config, VllmRollout):
        from rlsys.engines.rollout.vllm_environment import quiet

        quiet()
        try:
            from rlsys.engines.rollout.vllm import VllmEngine
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise UserError(
                "vLLM is not installed",
                where="rollout.engine",
                fix="install rlsys[cpu] or rlsys[gpu], or sample with rollout=torch",
            ) from error
        return await VllmEngine.start(
            model_path, config, max_length=max_length, seed=seed, threads=threads, adapter=adapter, sleeps=sleeps
        )
    from rlsys.engines.rollout.torch import TorchEngine

    return TorchEngine(model_path, config, max_length=max_length, threads=threads, sleeps=sleeps)
