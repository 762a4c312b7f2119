"""Kernels with a layout of their own are checked by what they were packed from and by what they answer."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm")


class Method:
    """Packs as vLLM's CPU layers do: a function that holds the weight, and no tensor left."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        kept = layer.weight.detach().clone()
        layer.packed = kept
        layer.cpu_linear = lambda x, weight, bias: x @ kept.t()
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=kept.dtype), requires_grad=False)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return layer.cpu_linear(x, None, bias)


def packed(weight: torch.Tensor, method: Method) -> torch.nn.Module:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    layer.quant_method, layer.input_size = method, weight.shape[1]
    layer.input_size_per_partition = weight.shape[1]
    method.process_weights_after_loading(layer)
    return layer


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> Method:
    from rlsys.engines.rollout import vllm_held

    monkeypatch.setattr(Method, "process_weights_after_loading", Method.process_weights_after_loading)
    vllm_held._wrap(Method, vllm_held._on_kernel)
    return Method()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_counts_as_the_tensor_it_was_packed_from(method: Method, dtype: torch.dtype) -> None:
    from rlsys.engines.rollout.vllm_held import held_pieces
    from rlsys.engines.sync.checksum import pieces_checksum, weights_checksum

    weight = torch.randn(48, 64).to(dtype)
    weight[0, 0], weight[1, :] = -0.0, 1e-40
    model = torch.nn.Module()
    model.add_module("proj", packed(weight, method))
    assert pieces_checksum([held_pieces(model, dtype)]) == weights_checksum([("proj.weight", weight)])


def test_a_kernel_whose_memory_was_damaged_is_found_by_what_it_answers(method: Method) -> None:
    from rlsys.engines.rollout.vllm_held import held_pieces
    from rlsys.engines.sync.verify import SyncError

    model = torch.nn.Module()
    model.add_module("proj", packed(torch.randn(48, 64), method))
    list(held_pieces(model, torch.float32))
    model.proj.packed += 1
    with pytest.raises(SyncError, match="proj"):
        list(held_pieces(model, torch.float32))
