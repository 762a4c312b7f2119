"""What log-probs must be when weights change between two tokens of a response."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from transformers import DynamicCache

from rlsys.batch.versions import WeightVersion
from rlsys.environments.base import Sample


def starts(sample: Sample) -> list[int]:
    """First token of each span of one version."""
    return [0, *(i for i, (a, b) in enumerate(pairwise(sample.versions), 1) if a != b)]


@torch.no_grad()
def kept(models: Mapping[WeightVersion, torch.nn.Module], prompt: list[int], sample: Sample) -> torch.Tensor:
    """[T] log-probs: each span by its own weights, on the keys and values that the weights before it left behind. What
    comes before a span's first token was computed before it, but for the last token, which is its first input."""
    known, first = torch.tensor([prompt + sample.token_ids]), starts(sample)
    begins = [0, *(len(prompt) + start - 1 for start in first[1:])]
    ends = [*begins[1:], known.shape[1] - 1]
    cache, logits = DynamicCache(), []
    for start, begin, end in zip(first, begins, ends, strict=True):
        model = models[sample.versions[start]]
        logits.append(model(known[:, begin:end], past_key_values=cache, use_cache=True).logits[0])
    return _picked(torch.cat(logits)[len(prompt) - 1 :], sample)


@torch.no_grad()
def recomputed(models: Mapping[WeightVersion, torch.nn.Module], prompt: list[int], sample: Sample) -> torch.Tensor:
    """[T] log-probs: each span as if its weights had computed all that comes before it."""
    known = torch.tensor([prompt + sample.token_ids])
    whole = {version: models[version](known).logits[0, len(prompt) - 1 : -1] for version in set(sample.versions)}
    return _picked(torch.stack([whole[version][i] for i, version in enumerate(sample.versions)]), sample)


def assert_sampled_by(
    models: Mapping[WeightVersion, torch.nn.Module], prompt: list[int], sample: Sample, in_flight: str
) -> None:
    """Every token's log-prob is that of the weights that its version names; versions never go back."""
    assert len(sample.token_ids) == len(sample.logprobs) == len(sample.versions)
    assert sample.versions == sorted(sample.versions)
    expected = (recomputed if in_flight == "recompute" else kept)(models, prompt, sample)
    torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)


def _picked(logits: torch.Tensor, sample: Sample) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
