"""Hydra's side of the configuration: the groups' schemas as its config store, and its errors in our words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlsys.config import clusters, modes, schema
from rlsys.config.assets import asset
from rlsys.config.build import build, defaults, leaves, optional_groups, suggest
from rlsys.config.errors import UserError
from rlsys.config.ignored import refuse_ignored

_GROUPS: dict[str, type] = {
    "model": schema.ModelConfig,
    "data/arithmetic": schema.ArithmeticData,
    "data/gsm8k": schema.GSM8KData,
    "data/file": schema.FileData,
    "data/reasoning_gym": schema.ReasoningGymData,
    "reward": schema.RewardConfig,
    "rollout/vllm": schema.VllmRollout,
    "rollout/torch": schema.TorchRollout,
    "trainer": schema.TrainerConfig,
    "algorithm": schema.AlgorithmConfig,
    "hints": schema.HintsConfig,
    "controller/sync": modes.SyncController,
    "controller/one_step_off": modes.OneStepOffController,
    "controller/async": modes.AsyncController,
    "cluster/local": clusters.LocalCluster,
    "cluster/ray": clusters.RayCluster,
    "cluster/gb10": clusters.Gb10,
    "cluster/gb10_pair": clusters.Gb10Pair,
    "cluster/h100_node": clusters.H100Node,
    "cluster/gpu_pool": clusters.GpuPool,
    "cluster/gb200_nvl72": clusters.Gb200Nvl72,
    "tracker": schema.TrackerConfig,
}
_TAG = {"data": "kind", "rollout": "engine", "controller": "kind", "cluster": "kind"}
_OWN_GROUP = ("model", "data", "reward", "rollout", "trainer", "algorithm", "hints", "controller", "cluster", "tracker")


def register_schemas() -> None:
    """Makes every dataclass's defaults available to the YAML files as ``_schema/…``: a value is written once."""
    store = ConfigStore.instance()
    for path, cls in _GROUPS.items():
        group, _, variant = path.partition("/")
        node = defaults(cls)
        if variant:
            node[_TAG[group]] = variant
        folder = f"{group}/_schema/{group}" if variant else f"{group}/_schema"
        store.store(group=folder, name=variant or group, node=node, package=group)
    run = {k: v for k, v in defaults(schema.RunConfig).items() if k not in _OWN_GROUP}
    store.store(group="_schema", name="run", node=run, package="_global_")


def compose_run(overrides: Sequence[str]) -> schema.RunConfig:
    """The configuration that ``python -m rlsys.launch OVERRIDES`` runs, checked as there.

    Raises:
        UserError: a key, a group or a value that is not known, or an override that the combination ignores.
    """
    register_schemas()
    try:
        with initialize_config_dir(str(asset("configs")), version_base="1.3"):
            plain = to_plain(compose("config", overrides=open_overrides(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from None
    config = build(plain)
    refuse_ignored(config, overridden_keys(overrides))
    return config


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The composed configuration as dictionaries, resolved.

    Raises:
        UserError: a value that is required has not been given, or an interpolation does not resolve.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    if "name" in missing:
        recipes = sorted(p.stem for p in (asset("configs") / "recipe").glob("*.yaml"))
        raise UserError(
            "no recipe was chosen", where="command line", fix=f"add +recipe=NAME; known: {', '.join(recipes)}"
        )
    if missing:
        raise UserError(
            f"{', '.join(missing)}: a value is required",
            where=missing[0],
            fix=f"add {' '.join(f'{k}=…' for k in missing)}",
        )
    try:
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(
            f"the configuration does not resolve: {str(error).splitlines()[0]}", where=str(error.full_key)
        ) from None
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def open_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides of leaves that are mappings (a plug-in's options, reward parts), so that they do what they say.

    Hydra merges a mapping into the one that is there and refuses new keys. Here ``LEAF={…}`` takes its place (as
    ``~LEAF ++LEAF={…}``), and ``LEAF.KEY=…`` adds or overrides (``++``), so nobody has to know which keys there are
    already; whoever reads the mapping checks names. A key of a group that is null makes it a group.
    """
    known = set(leaves())
    below = tuple(f"{opened}." for opened in (*known, *optional_groups()))
    opened: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in known and value.lstrip().startswith("{"):
            opened += [f"~{key}", f"++{override}"]
        else:
            opened.append(f"++{override}" if override.startswith(below) else override)
    return opened


def overridden_keys(overrides: Iterable[str]) -> list[str]:
    """The dotted keys that a command line sets itself (``+recipe=…`` and group choices are not keys)."""
    keys = [o.partition("=")[0].lstrip("+~") for o in overrides]
    return [k for k in keys if k not in (*_OWN_GROUP, "recipe") and not k.startswith("hydra")]


def explain(error: HydraException | OmegaConfBaseException) -> UserError:
    """What Hydra says about a command line or YAML, as one clear error."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        return UserError(f"there is no key '{key}'", where=key, fix=suggest(key) or "`--cfg job` lists every key")
    if match := re.search(r"Could not find '([^']+)'\n\nAvailable options in '([^']+)':\n((?:\t\S+\n?)+)", text):
        options = [o for o in match[3].split() if o != "_schema"]
        return UserError(f"there is no '{match[1]}'", where=match[2], fix=f"known: {', '.join(options)}")
    if match := re.search(r"Could not override '?([^'\s]+)'?\.\s*No match in the defaults list", text):
        return UserError(f"there is no group '{match[1]}'", where=match[1], fix=suggest(match[1]))
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot read the override '{error.override}'", where="command line", fix="write KEY=VALUE")
    first = next((line for line in text.splitlines() if line.strip()), text)
    if isinstance(error, MissingConfigException | ConfigCompositionException):
        return UserError(first, where="configuration", fix="`--help` lists the groups and their choices")
    return UserError(first, where="configuration")
