"""The driver's side of a weight update: one call, whatever the transport."""

from __future__ import annotations

import time

from rlsys.batch.versions import WeightVersion
from rlsys.config.sampler import sampled_adapter
from rlsys.config.schema import RunConfig, VllmRollout
from rlsys.engines.sync.transport import Transport, choose
from rlsys.workers.groups import RolloutGroup, TrainerGroup
from rlsys.workers.weights import SendRequest


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
        sender, *receivers = [self._trainer.host(), *self._rollout.hosts()]
        gpus = {gpu for host in self._trainer.hosts() for gpu in host.gpus} if sender.gpus else set()
        return choose(
            self._config.sync,
            one_host=all(receiver.identity == sender.identity for receiver in receivers),
            # An adapter is small, and vLLM's broadcast is of whole weights.
            gpus=not self._adapter and all(host.gpu for host in (sender, *receivers)),
            vllm=isinstance(self._config, VllmRollout),
            same_gpus=not self._adapter and all(host.gpus and gpus.issuperset(host.gpus) for host in receivers),
        )
