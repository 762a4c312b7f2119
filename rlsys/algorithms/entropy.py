"""Which tokens carry the gradient: the uncertain ones (arXiv 2506.01939)."""

from __future__ import annotations

import torch

from rlsys.algorithms.collective import Collective


def above_quantile(entropy: torch.Tensor, mask: torch.Tensor, quantile: float, collective: Collective) -> torch.Tensor:
    """Unmasked tokens whose entropy is at least the quantile of all ranks' unmasked tokens.

    The quantile lies between two entropies by linear interpolation. 0.8 keeps the fifth of the tokens at which the
    policy is least certain; tokens of equal entropy are kept or left out together.

    Args:
        entropy: [N] in nats, of the policy before its first update on the batch; anything off the mask.
        mask: [N] bool.
        quantile: in 0 … 1; 0 keeps all.
        collective: the ranks that share the batch; each takes part, also one without tokens.

    Returns:
        [N] bool, false off the mask.

    Raises:
        ValueError: the quantile is out of its range, or shapes disagree.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"a quantile lies in 0 … 1, not at {quantile}")
    if entropy.shape != mask.shape:
        raise ValueError(f"entropy has the shape {tuple(entropy.shape)}, its mask {tuple(mask.shape)}")
    entropy = entropy.detach()
    everyone = collective.gather(entropy[mask]).sort().values
    if not len(everyone):
        return torch.zeros_like(mask)
    # torch.quantile refuses more than 2^24 values
    place = quantile * (len(everyone) - 1)
    below = int(place)
    pair = everyone[[below, min(below + 1, len(everyone) - 1)]].double()
    threshold = torch.lerp(pair[0], pair[1], place - below).to(entropy.dtype)
    return mask & (entropy >= threshold)
