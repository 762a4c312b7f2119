"""Weights that vLLM rounds to FP8 while it loads them count as those that were sent, not as what they were rounded to:
vLLM's own layers, with one number a row, the rounding that it can do on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")

DTYPE = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """What a layer of vLLM's asks for when it is made: a configuration, and groups of ranks."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    from rlsys.engines.rollout.vllm_held import remember_packed_weights

    config, before = VllmConfig(), torch.get_default_dtype()
    config.model_config = SimpleNamespace(dtype=DTYPE, is_moe=False)  # type: ignore[assignment]
    remember_packed_weights()
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        torch.set_default_dtype(DTYPE)
        yield
        torch.set_default_dtype(before)
        destroy_model_parallel()
        destroy_distributed_environment()


class Rounding:
    """As vLLM's quantisation settings, for layers that are made one by one."""

    online_quantization_config = None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod

        return Fp8PtpcOnlineLinearMethod()


def rounded_model() -> torch.nn.Module:
    """A fused layer, one cut by its columns, and a norm, which is not rounded."""
    from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

    model, layer = torch.nn.Module(), torch.nn.Module()
    model.packed_modules_mapping = {"qkv": ["q", "k", "v"]}  # type: ignore[assignment]
    rounding: Any = Rounding()
    layer.qkv = QKVParallelLinear(64, 16, 4, 2, bias=False, params_dtype=DTYPE, quant_config=rounding, prefix="qkv")
    layer.o = RowParallelLinear(64, 32, bias=False, params_dtype=DTYPE, quant_config=rounding, prefix="o")
    layer.norm = torch.nn.LayerNorm(64, bias=False, dtype=DTYPE)
    model.layer = layer
    return model


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (32, 64), "norm": (64,)}
    return {f"layer.{name}.weight": torch.randn(shape, generator=generator).to(DTYPE) for name, shape in shapes.items()}


def load(model: Any, sent: dict[str, torch.Tensor]) -> None:
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    for name, weight in sent.items():
        part = name.split(".")[1]
        parameter = getattr(model.layer, "qkv" if part in "qkv" else part).weight
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, weight, *([part] if part in "qkv" else []))


def update(model: Any, sent: dict[str, torch.Tensor]) -> None:
    """As a sampler does, which has been loaded before."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    initialize_layerwise_reload(model)
    load(model, sent)
    finalize_layerwise_reload(model, SimpleNamespace(dtype=DTYPE))


def held(model: torch.nn.Module) -> str:
    from rlsys.engines.rollout.vllm_held import held_pieces
    from rlsys.engines.sync.checksum import pieces_checksum

    with torch.no_grad():
        return pieces_checksum([held_pieces(model, DTYPE)])


@pytest.fixture
def model() -> Any:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    made = rounded_model()
    record_metadata_for_reloading(made)
    load(made, weights(0))
    return made


def test_rounded_layers_count_as_what_was_rounded(model: Any) -> None:
    """And the numbers that they are scaled by count as nothing."""
    from rlsys.engines.sync.checksum import weights_checksum

    for layer in (model.layer.qkv, model.layer.o):
        assert layer.weight.dtype == torch.float8_e4m3fn
        assert "weight_scale" in dict(layer.named_parameters())
    assert held(model) == weights_checksum(weights(0).items())


def test_an_update_counts_when_it_has_been_rounded(model: Any) -> None:
    from rlsys.engines.sync.checksum import weights_checksum

    update(model, weights(1))
    assert model.layer.o.weight.dtype == torch.float8_e4m3fn
    assert held(model) == weights_checksum(weights(1).items())


def test_a_difference_that_rounding_removes_is_seen(model: Any) -> None:
    """The sender's bits count: the sampler's rounded weights alone could not tell the two apart."""
    from rlsys.engines.sync.checksum import weights_checksum

    sent, rounded, found = weights(0), [], []
    for tiny in (1e-6, 2e-6):  # beside numbers of about 1 both are rounded to 0
        sent["layer.o.weight"][3, 5] = tiny
        update(model, sent)
        rounded.append(model.layer.o.weight.view(torch.uint8).clone())
        found.append(held(model))
        assert found[-1] == weights_checksum(sent.items())
    assert torch.equal(*rounded)
    assert found[0] != found[1]


def test_a_layer_that_the_update_never_reached_is_not_the_senders(model: Any) -> None:
    from rlsys.engines.sync.checksum import weights_checksum

    sent = weights(1)
    update(model, sent | {"layer.o.weight": weights(0)["layer.o.weight"]})
    assert held(model) != weights_checksum(sent.items())
