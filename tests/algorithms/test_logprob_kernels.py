"""The Triton kernels, interpreted on the CPU, against dense float64; what chooses them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlsys.algorithms import kernels
from rlsys.algorithms.logprobs import token_logprobs

pytest.importorskip("triton")

# Triton reads TRITON_INTERPRET when it is imported, so this runs in a process of its own.
CHECK = """
import itertools
import torch
from rlsys.algorithms.kernels import logprob, tiles
from rlsys.algorithms.logprobs import token_logprobs

logprob._BLOCK = 16  # several blocks in a tile
tiles._CPU = tiles._Size(tokens=3, elements=1, words=40)  # several tiles, the last one ragged

def dense(hidden, weight, bias, targets, temperature):
    log_p = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias) / temperature, -1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

def case(tokens, words, bias, temperature, entropy, dtype, scale):
    generator = torch.Generator().manual_seed(tokens + words)
    normal = lambda *shape: torch.randn(*shape, generator=generator).mul(scale).to(dtype).requires_grad_()
    leaves = [normal(tokens, 6), normal(words, 6)] + ([normal(words)] if bias else [])
    targets = torch.randint(words, (tokens,), generator=generator)
    weights = torch.randn(2, tokens, generator=generator)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for inputs, run in ((leaves, token_logprobs), (exact, dense)):
        hidden, weight, *rest = inputs
        more = dict(entropy_gradient=entropy, kernels=True) if run is token_logprobs else {}
        both = run(hidden, weight, *(rest or [None]), targets, temperature=temperature, **more)
        loss = (both[0] * weights[0]).sum() + ((both[1] * weights[1]).sum() if entropy else 0)
        results.append([*both, *torch.autograd.grad(loss, inputs)])
    # bfloat16 logits are rounded before the softmax, here as in the dense computation in that dtype
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.1, atol=0.1)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **tolerance)

for tokens, words, bias in itertools.product((0, 1, 7), (1, 40, 101), (False, True)):
    for temperature, entropy in ((1.0, True), (0.7, False)):
        case(tokens, words, bias, temperature, entropy, torch.float32, 1.0)
case(5, 101, True, 1.5, True, torch.float32, 6.0)  # logits of a hundred
case(5, 101, True, 1.5, True, torch.bfloat16, 0.5)
print("passed")
"""


def test_interpreted_kernels_match_dense_float64() -> None:
    run = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "passed"


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Down to machine code, for which no GPU is needed."""
    script = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlsys.algorithms.kernels import logprob

TYPES = {"stride": "i32", "targets": "*i64", "first": "i32", "words": "i32", "temperature": "fp32"}
for kernel in (logprob._fold_kernel, logprob._gradient_kernel):
    names = kernel.arg_names
    types = {name: "constexpr" if name.isupper() else TYPES.get(name, "*fp32") for name in names} | {"tile": "*bf16"}
    constants = {name: value for name, value in (("BLOCK", logprob._BLOCK), ("ENTROPY", True)) if name in names}
    source = ASTSource(kernel, types, constexprs=constants)
    for capability in (80, 90, 100):
        target = GPUTarget("cuda", capability, 32)
        assert compile(source, target=target, options={"num_warps": logprob._WARPS}).asm["cubin"]
"""
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr


def test_kernels_are_for_gpus() -> None:
    assert not kernels.use_kernels(torch.zeros(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_match_torch_on_a_gpu(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(n, 256, generator=generator, device="cuda").div_(8).to(dtype).requires_grad_()
        for n in (5000, 50_001)
    )
    targets = torch.randint(50_001, (5000,), generator=generator, device="cuda")
    results = []
    for use in (True, False):
        both = token_logprobs(hidden, weight, None, targets, temperature=0.8, entropy_gradient=True, kernels=use)
        results.append([*both, *torch.autograd.grad(both[0].sum() + both[1].sum(), (hidden, weight))])
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*results, strict=True):
        assert torch.linalg.vector_norm((ours - theirs).float()) < bound * torch.linalg.vector_norm(theirs.float())
