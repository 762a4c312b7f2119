"""The driver's side of a weight update: one call, whatever the transport."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlsys.batch.versions import WeightVersion
from rlsys.config.sampler import sampled_adapter
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.engines.sync.transport import Transport, choose
from rlsys.workers.groups import RolloutGroup, TrainerGroup
from rlsys.workers.weights import Host, SendRequest


class WeightSync:
    """Hands the trainer's weights to every sampler and checks that they arrived.

    Args:
        trainer, rollout: the groups.
        config: of the samplers; ``sync`` says the transport.
    """

    def __init__(self, trainer: TrainerGroup, rollout: RolloutGroup, config: RunConfig):
        self._trainer, self._rollout, self._config = trainer, rollout, config.rollout
        self._adapter = sampled_adapter(config) is not None
        self._transport: Transport | None = None
        self._held: WeightVersion | None = None

    def __call__(self, version: WeightVersion) -> dict[str, float]:
        """One update of all samplers.

        Returns:
            Metrics: bytes that travelled, and the seconds of each part, of the slowest sampler.

        Raises:
            UserError: the transport asked for cannot act between these machines.
            SyncError: a sampler's checksum is not the sender's.
        """
        began = time.perf_counter()
        if self._transport is None:
            self._transport = self._chosen()
        base, self._held = self._held, None  # while it is under way nobody is known to hold anything
        request = SendRequest(self._transport, version, base, adapter=self._adapter)
        if self._transport == "nccl":
            sent, taken = self._rollout.receive_broadcast(self._trainer, self._config.dtype, request)
        elif self._transport == "cuda_ipc":
            sent, taken = self._rollout.read_buckets(self._trainer, self._config.dtype, request)
            self._trainer.release_weights()
        else:
            sent = self._trainer.export_weights(self._config.dtype, request)
            taken = self._rollout.update_weights(sent, version)
            self._trainer.release_weights()
        self._held = version
        seconds = dict(sent.seconds)
        for parts in (answer.seconds for answer in taken):
            for name, value in parts.items():
                seconds[name] = max(seconds.get(name, 0.0), value)
        metrics = {f"sync/{name}_s": value for name, value in seconds.items()}
        return metrics | {"sync/bytes": float(sent.nbytes), "sync/total_s": time.perf_counter() - began}

    def _chosen(self) -> Transport:
        place = placement(self._trainer.hosts(), self._rollout.hosts())
        if self._adapter:  # it is small, and what goes from GPU to GPU is whole weights
            place |= {"gpus": False, "same_gpus": False}
        return choose(self._config.sync, vllm=isinstance(self._config, VllmRollout), **place)


def placement(trainer: Sequence[Host], samplers: Sequence[Host]) -> dict[str, bool]:
    """What ``choose`` asks about where things are: ``one_host``, ``gpus``, ``same_gpus``, ``own_gpus``.

    Args:
        trainer: its ranks, 0 first.
    """
    meeting = [trainer[0], *samplers]
    taken = [gpu for host in meeting for gpu in host.gpus]
    packing = {place for host in trainer for place in host.places()} if trainer[0].gpus else set()
    return {
        "one_host": all(host.identity == trainer[0].identity for host in samplers),
        "gpus": all(host.gpu for host in meeting),
        "same_gpus": all(host.gpus and packing.issuperset(host.places()) for host in samplers),
        "own_gpus": all(host.gpus for host in meeting) and len(set(taken)) == len(taken),
    }
