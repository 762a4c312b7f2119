"""The driver's side of a weight update: one call, whatever the transport."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlsys.batch.versions import WeightVersion
from rlsys.config.sampler import sampled_adapter
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.engines.rollout.base import InFlight
from rlsys.engines.sync.transport import Transport, choose
from rlsys.workers.groups import RolloutGroup, TrainerGroup
from rlsys.workers.weights import Host, SendRequest

_FOR_ALL: tuple[Transport, ...] = ("nccl", "cuda_ipc", "delta")


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
        self._auto = config.rollout.sync == "auto"
        self._held: WeightVersion | None = None
        self._holders: dict[int, int] = {}  # lives of the samplers that hold it

    def __call__(
        self, version: WeightVersion, in_flight: InFlight = "finish", *, only: Sequence[int] | None = None
    ) -> dict[str, float]:
        """One update of all samplers that can be reached; one that is lost meanwhile leaves the others theirs.

        Args:
            in_flight: what becomes of sequences under way (``RolloutEngine.update_weights``).
            only: these samplers, which are given the weights that the others hold already.

        Returns:
            Metrics: bytes that travelled, and the seconds of each part, of the slowest sampler.

        Raises:
            UserError: the transport asked for cannot act between these machines.
            SyncError: a sampler's checksum is not the sender's.
        """
        began = time.perf_counter()
        transport = self._transport_to(only)
        base = None
        if only is None:  # while it is under way nobody is known to hold anything
            lives = self._rollout.lives()
            base, self._held = (self._held if lives == self._holders else None), None
            self._holders = lives
        request = SendRequest(transport, version, base, adapter=self._adapter)
        if transport == "nccl":
            sent, taken = self._rollout.receive_broadcast(self._trainer, self._config.dtype, request, in_flight)
        elif transport == "cuda_ipc":
            sent, taken = self._rollout.read_buckets(self._trainer, self._config.dtype, request, in_flight)
            self._trainer.release_weights()
        else:
            sent = self._trainer.export_weights(self._config.dtype, request)
            taken = self._rollout.update_weights(sent, version, in_flight, only=only)
            self._trainer.release_weights()
        if only is None:
            self._held = version
        seconds = dict(sent.seconds)
        for parts in (answer.seconds for answer in taken):
            for name, value in parts.items():
                seconds[name] = max(seconds.get(name, 0.0), value)
        metrics = {f"sync/{name}_s": value for name, value in seconds.items()}
        return metrics | {"sync/bytes": float(sent.nbytes), "sync/total_s": time.perf_counter() - began}

    def _transport_to(self, only: Sequence[int] | None) -> Transport:
        """Few samplers are given weights through the object store where the transport is one for all together: NCCL's
        group has fixed members, handles of CUDA are read by all at once, changes are those since the last update."""
        if self._transport is None or (self._rollout.lives() != self._holders and self._auto):
            self._transport = self._chosen()  # who was started anew may be on another host
        if self._transport == "nccl" and not self._rollout.meets:
            return "object_store"
        return "object_store" if only is not None and self._transport in _FOR_ALL else self._transport

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
