"""Advantage estimators against verl's, TRL's formulas and float64 loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.parity.case import Case, Tensors
from rlsys.algorithms.advantages import estimate, estimate_tokens
from rlsys.algorithms.collective import Alone

PARTS = {"correct": 1.0, "format": 0.3}


def draw(seed: int, *, even: bool = False, absent: bool = False) -> dict:
    """Rewards of ragged groups, and responses with given spans between the sampled tokens.

    Args:
        even: groups of one size, one after the other, as TRL wants them.
        absent: a part is not computed (NaN) for some samples.
    """
    generator = np.random.default_rng([seed, 1])
    sizes = [4] * 5 if even else generator.integers(2, 8, size=int(generator.integers(2, 7)))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    if not even:
        groups = generator.permutation(groups)
    count = len(groups)
    correct = generator.integers(0, 2, count) if seed % 2 else generator.normal(size=count)
    scores = {"correct": correct.astype(np.float64), "format": generator.normal(size=count)}
    if absent:
        scores["format"][generator.random(count) < 0.3] = np.nan
    rewards = sum(weight * np.nan_to_num(scores[part]) for part, weight in PARTS.items())
    total = generator.integers(1, 30, count)  # tokens of each response, sampled or given
    masks = [generator.random(n) < 0.7 for n in total]
    for mask in masks:
        mask[0] = True
    rows, mask = np.repeat(np.arange(count), total), np.concatenate(masks)
    as_tensor = lambda array: torch.tensor(array, dtype=torch.float32)  # noqa: E731
    return {
        "rewards": as_tensor(rewards),
        "uids": [f"{group}@0" for group in groups],
        "scores": {part: torch.tensor(values) for part, values in scores.items()},
        "baselines": torch.tensor(generator.normal(size=count)),
        "lengths": torch.tensor([int(mask.sum()) for mask in masks]),
        "mask": torch.tensor(mask),
        "rows": torch.tensor(rows),
        "values": as_tensor(generator.normal(size=len(rows))),
        "penalty": as_tensor(0.1 * generator.normal(size=len(rows))),
    }


def ours(name: str, options: dict[str, Any], inputs: dict) -> Tensors:
    reads = {read: inputs[read] for read in ("lengths", "scores", "baselines")} | {"weights": PARTS}
    return {"advantages": estimate(name, inputs["rewards"], inputs["uids"], inputs=reads, **options)[0]}


def ours_tokens(name: str, options: dict[str, Any], inputs: dict) -> Tensors:
    rewards, mask = inputs["rewards"], inputs["mask"]
    result = estimate_tokens(
        name,
        rewards,
        mask,
        inputs["rows"],
        len(rewards),
        Alone(),
        token_penalty=inputs["penalty"],
        inputs={"values": inputs["values"]},
        **options,
    )
    return {"advantages": result.advantages[mask], "returns": result.returns[mask]}


# --- verl: padded [B, T] float64 -------------------------------------------------------------------------------------


def padded(flat: torch.Tensor, inputs: dict) -> torch.Tensor:
    rows = inputs["rows"].tolist()
    dense = torch.zeros(len(inputs["rewards"]), max(rows.count(row) for row in set(rows)), dtype=torch.float64)
    column: dict[int, int] = {}
    for value, row in zip(flat.tolist(), rows, strict=True):
        place = column.setdefault(row, 0)
        dense[row, place], column[row] = value, place + 1
    return dense


def token_rewards(inputs: dict, *, penalised: bool) -> torch.Tensor:
    """[B, T] rewards at the last sampled token, less the penalty at each sampled one."""
    mask = padded(inputs["mask"], inputs)
    rewards = -padded(inputs["penalty"], inputs) * mask if penalised else torch.zeros_like(mask)
    for row, reward in enumerate(inputs["rewards"].tolist()):
        rewards[row, int(mask[row].nonzero()[-1])] += reward
    return rewards


def verl_samples(function: str, options: dict[str, Any], inputs: dict) -> Tensors:
    from verl.trainer.ppo import core_algos

    mask = padded(inputs["mask"], inputs)
    if function == "compute_remax_outcome_advantage":
        options = {**options, "reward_baselines": inputs["baselines"]}
    elif function != "compute_gdpo_outcome_advantage":
        options = {**options, "index": np.array(inputs["uids"])}
    else:
        present = padded(torch.ones_like(inputs["mask"]), inputs).long()
        options = {
            **options,
            "index": np.array(inputs["uids"]),
            "config": {"gdpo_reward_keys": list(PARTS), "gdpo_reward_weights": list(PARTS.values())},
            "non_tensor_batch": {part: values.numpy() for part, values in inputs["scores"].items()},
            "batch": {"prompts": torch.zeros(len(mask), 1), "attention_mask": torch.cat([present[:, :1], present], 1)},
        }
    call = getattr(core_algos, function)
    advantages, _ = call(token_level_rewards=token_rewards(inputs, penalised=False), response_mask=mask, **options)
    return {"advantages": advantages[:, 0]}  # the first token is sampled, and all have the sample's value


def verl_tokens(function: str, options: dict[str, Any], inputs: dict) -> Tensors:
    from verl.trainer.ppo import core_algos

    mask = padded(inputs["mask"], inputs)
    if function == "compute_gae_advantage_return":
        options = {**options, "values": padded(inputs["values"], inputs)}
    call = getattr(core_algos, function)
    advantages, returns = call(token_level_rewards=token_rewards(inputs, penalised=True), response_mask=mask, **options)
    return {"advantages": advantages[mask > 0], "returns": returns[mask > 0]}


# --- TRL: even groups [G, n], its own nanstd -------------------------------------------------------------------------


def trl_grpo(scale: str, inputs: dict) -> Tensors:
    from trl.trainer.utils import nanstd

    rewards = inputs["rewards"].double().view(-1, 4)
    std = nanstd(rewards, dim=1, keepdim=True) if scale == "group" else nanstd(rewards)
    return {"advantages": ((rewards - torch.nanmean(rewards, dim=1, keepdim=True)) / (std + 1e-4)).flatten()}


def trl_rloo(inputs: dict) -> Tensors:
    from trl.trainer.utils import nanstd

    rewards = inputs["rewards"].double().view(-1, 4)
    advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    return {"advantages": ((advantages - torch.nanmean(advantages)) / (nanstd(advantages) + 1e-4)).flatten()}


def trl_gdpo(inputs: dict) -> Tensors:
    from trl.trainer.utils import nanstd

    parts = torch.stack([inputs["scores"][part] for part in PARTS], dim=1).view(-1, 4, len(PARTS))
    scaled = (parts - torch.nanmean(parts, 1, keepdim=True)) / (nanstd(parts, dim=1, keepdim=True) + 1e-4)
    summed = (scaled * torch.tensor(list(PARTS.values()), dtype=torch.float64)).nansum(2).flatten()
    return {"advantages": (summed - torch.nanmean(summed)) / (nanstd(summed) + 1e-4)}


# --- float64 loops ---------------------------------------------------------------------------------------------------


def loop(advantage: Callable[[int, np.ndarray, dict], float], inputs: dict) -> Tensors:
    """``advantage(place in the group, the group's rewards, inputs)`` of each sample."""
    rewards, uids = inputs["rewards"].double().numpy(), np.array(inputs["uids"])
    result = []
    for row, uid in enumerate(uids):
        members = np.flatnonzero(uids == uid)
        result.append(advantage(int(np.flatnonzero(members == row)[0]), rewards[members], inputs))
    return {"advantages": torch.tensor(result, dtype=torch.float64)}


def population(i: int, group: np.ndarray, inputs: dict) -> float:
    return (group[i] - group.mean()) / (group.std() + 1e-8)


def variance(i: int, group: np.ndarray, inputs: dict) -> float:
    return (group[i] - group.mean()) / (group.std(ddof=1) + 1e-6) * ((group**2).mean() - group.mean() ** 2)


def binary_variance(i: int, group: np.ndarray, inputs: dict) -> float:
    return (group[i] - group.mean()) * group.mean() * (1 - group.mean())


def centre(i: int, group: np.ndarray, inputs: dict) -> float:
    return group[i] - group.mean()


def others(i: int, group: np.ndarray, inputs: dict) -> float:
    rest = np.delete(group, i)
    std = rest.std(ddof=1) if len(rest) > 1 else 0.0
    return (group[i] - rest.mean()) / (std if std > 1e-9 else 1.0)


def leave_one_out(i: int, group: np.ndarray, inputs: dict) -> float:
    return (group[i] - np.delete(group, i).mean()) / (group.std(ddof=1) + 1e-6)


def max_rl(i: int, group: np.ndarray, inputs: dict) -> float:
    return (group[i] - group.mean()) / group.mean() if group.mean() > 0 else 0.0


def gpg_paper(i: int, group: np.ndarray, inputs: dict) -> float:
    rewards, uids = inputs["rewards"].numpy(), np.array(inputs["uids"])
    useful = sum(int((uids == uid).sum()) for uid in set(uids) if len(set(rewards[uids == uid])) > 1)
    return len(rewards) / max(useful, 1) * (group[i] - group.mean())


def gae_raw(gamma: float, lam: float, inputs: dict) -> Tensors:
    """GAE over each row's list of sampled tokens, one by one, without whitening."""
    advantages, returns = [], []
    mask, rows = inputs["mask"].numpy(), inputs["rows"].numpy()
    for row, reward in enumerate(inputs["rewards"].double().tolist()):
        here = mask & (rows == row)
        values = inputs["values"].double().numpy()[here].tolist()
        earned = (-inputs["penalty"].double().numpy()[here]).tolist()
        earned[-1] += reward
        for t in range(len(values)):
            total = 0.0
            for k in range(t, len(values)):
                after = values[k + 1] if k + 1 < len(values) else 0.0
                total += (gamma * lam) ** (k - t) * (earned[k] + gamma * after - values[k])
            advantages.append(total)
            returns.append(total + values[t])
    as_tensor = partial(torch.tensor, dtype=torch.float64)
    return {"advantages": as_tensor(advantages), "returns": as_tensor(returns)}


def binary(seed: int) -> dict:
    inputs = draw(seed)
    inputs["rewards"] = (inputs["rewards"] > 0.2).float()
    return inputs


def positive(seed: int) -> dict:
    inputs = draw(seed)
    inputs["rewards"] = inputs["rewards"].abs() * (torch.arange(len(inputs["rewards"])) % 3 > 0)
    return inputs


def _verl(what: str, name: str, function: str, theirs: dict, **options: Any) -> Case:
    return Case(
        f"advantages/{what}",
        f"verl 0.9.1 core_algos.{function}",
        draw,
        partial(ours, name, options),
        partial(verl_samples, function, theirs),
    )


def _tokens(what: str, name: str, function: str, theirs: dict, **options: Any) -> Case:
    return Case(
        f"advantages/{what}",
        f"verl 0.9.1 core_algos.{function}",
        draw,
        partial(ours_tokens, name, options),
        partial(verl_tokens, function, theirs),
    )


def _loop(what: str, name: str, advantage: Callable, draws: Callable[[int], dict] = draw, **options: Any) -> Case:
    return Case(
        f"advantages/{what}", "float64 reference", draws, partial(ours, name, options), partial(loop, advantage)
    )


def _trl(what: str, oracle: str, name: str, theirs: Callable, absent: bool = False, **options: Any) -> Case:
    draws = partial(draw, even=True, absent=absent)
    return Case(f"advantages/{what}", f"trl 1.16.0 {oracle}", draws, partial(ours, name, options), theirs)


class _Gamma:
    """What verl's REINFORCE++ takes for a config."""

    gamma = 0.97


CASES = [
    _verl("grpo (sample std)", "grpo", "compute_grpo_outcome_advantage", {}),
    _verl("grpo (sample std), vectorised", "grpo", "compute_grpo_vectorized_outcome_advantage", {}),
    _verl("dr_grpo", "dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
    _verl("rloo", "rloo", "compute_rloo_outcome_advantage", {}),
    _verl("remax", "remax", "compute_remax_outcome_advantage", {}),
    _verl("opo", "opo", "compute_opo_outcome_advantage", {}),
    _verl("gpg (verl's count)", "gpg", "compute_gpg_outcome_advantage", {"f_norm": 2.0}, f_norm=2.0, counted="nonzero"),
    _verl("gdpo (batch over tokens)", "gdpo", "compute_gdpo_outcome_advantage", {}, batch="tokens"),
    _verl("grpo_passk", "grpo_passk", "compute_grpo_passk_outcome_advantage", {"config": {}}),
    _verl(
        "grpo_passk (no std)",
        "grpo_passk",
        "compute_grpo_passk_outcome_advantage",
        {"config": {"norm_adv_by_std_in_grpo": False}},
        normalize=False,
    ),
    _verl(
        "reinforce_plus_plus_baseline",
        "reinforce_plus_plus_baseline",
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        {},
    ),
    _trl("grpo (TRL, group)", "GRPOTrainer, scale_rewards=group", "grpo", partial(trl_grpo, "group"), eps=1e-4),
    _trl(
        "grpo (TRL, batch)",
        "GRPOTrainer, scale_rewards=batch",
        "grpo",
        partial(trl_grpo, "batch"),
        std="batch",
        eps=1e-4,
    ),
    _trl("rloo (normalised)", "RLOOTrainer, normalize_advantages", "rloo", trl_rloo, normalize=True),
    _trl("gdpo (batch over samples)", "GRPOTrainer, normalize_then_sum", "gdpo", trl_gdpo, absent=True, eps=1e-4),
    _loop("grpo (population std)", "grpo", population, std="population", eps=1e-8),
    _loop("grpo (leave-one-out, group's std)", "grpo", leave_one_out, leave_one_out=True),
    _loop("grpo (leave-one-out, std of the others)", "grpo", others, leave_one_out=True, std="others"),
    _loop("grpo (leave-one-out, std of the others, 0/1)", "grpo", others, binary, leave_one_out=True, std="others"),
    _loop("grpo (length-unbiased)", "grpo", centre, length_unbiased=True),
    _loop("grpo (variance weighting)", "grpo", variance, weighting="variance"),
    _loop("grpo (p(1-p) weighting, 0/1)", "grpo", binary_variance, binary, std="none", weighting="variance"),
    _loop("max_rl", "max_rl", max_rl, positive),
    _loop("gpg (paper's count)", "gpg", gpg_paper, binary),
    _tokens("gae", "gae", "compute_gae_advantage_return", {"gamma": 0.99, "lam": 0.9}, gamma=0.99, lam=0.9),
    _tokens("gae (defaults)", "gae", "compute_gae_advantage_return", {"gamma": 1.0, "lam": 0.95}),
    Case(
        "advantages/gae (not whitened)",
        "float64 reference",
        draw,
        partial(ours_tokens, "gae", {"gamma": 0.98, "lam": 0.8, "whiten": False}),
        partial(gae_raw, 0.98, 0.8),
    ),
    _tokens(
        "reinforce_plus_plus",
        "reinforce_plus_plus",
        "compute_reinforce_plus_plus_outcome_advantage",
        {"config": _Gamma},
        gamma=_Gamma.gamma,
    ),
]
