"""Which way weights go from trainer to sampler."""

from __future__ import annotations

from typing import Literal

from rlsys.config.errors import UserError

Transport = Literal["shared_memory", "object_store", "delta", "nccl", "cuda_ipc"]


def choose(
    wanted: Literal["auto"] | Transport,
    *,
    one_host: bool,
    gpus: bool,
    vllm: bool,
    same_gpus: bool = False,
    own_gpus: bool = False,
) -> Transport:
    """The transport of a run.

    Args:
        wanted: ``rollout.sync``. ``auto``: inside the GPUs that both are on, else memory on one host, NCCL between GPUs
            of several, else the object store.
        one_host: whether every sampler can open trainer rank 0's memory.
        gpus: whether trainer and samplers have GPUs.
        vllm: whether the samplers are vLLM's.
        same_gpus: whether every sampler's rank is on the GPU of a trainer rank of its host.
        own_gpus: whether trainer rank 0 and every sampler's rank has a GPU that none of the others is on: NCCL takes no
            two ranks on one.

    Raises:
        UserError: the one asked for cannot act here.
    """
    if wanted == "auto":
        if same_gpus:
            return "cuda_ipc"
        if one_host:
            return "shared_memory"
        return "nccl" if gpus and vllm and own_gpus else "object_store"
    if wanted == "shared_memory" and not one_host:
        raise UserError(
            "samplers and trainer rank 0 are not processes of one host, container and user: they share no memory",
            where="rollout.sync",
            fix="set rollout.sync=auto, nccl, object_store or delta",
        )
    if wanted == "nccl" and not gpus:
        raise UserError(
            "NCCL connects GPUs, and there are none",
            where="rollout.sync",
            fix="set rollout.sync=auto, object_store or delta",
        )
    if wanted == "nccl" and not own_gpus:
        raise UserError(
            "NCCL takes one process a GPU, and of trainer rank 0 and the samplers two are on the same",
            where="rollout.sync",
            fix="set rollout.sync=auto, or cluster.placement=disaggregated",
        )
    if wanted == "cuda_ipc" and not same_gpus:
        raise UserError(
            "CUDA hands memory over inside a GPU, and "
            + ("a sampler is on one that no trainer rank is on" if gpus else "there are none"),
            where="rollout.sync",
            fix="set rollout.sync=auto" + (", or cluster.placement=colocated" if gpus else ""),
        )
    return wanted
