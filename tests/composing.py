"""Configurations for tests, composed as the command line composes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_dir

from rlsys.config.assets import asset
from rlsys.config.build import build
from rlsys.config.compose import open_overrides, register_schemas, to_plain
from rlsys.config.schema import RunConfig


def composed(*overrides: str, recipe: str = "grpo_qwen") -> dict[str, Any]:
    """The plain dictionary that ``python -m rlsys.launch +recipe=… OVERRIDES`` composes."""
    register_schemas()
    with initialize_config_dir(str(asset("configs")), version_base="1.3"):
        return to_plain(compose("config", overrides=[f"+recipe={recipe}", *open_overrides(overrides)]))


def run_config(*overrides: str, recipe: str = "grpo_qwen") -> RunConfig:
    return build(composed(*overrides, recipe=recipe))


def with_leaves(config: Any, leaves: Mapping[str, Any]) -> Any:
    """The dataclass (or mapping) with other values of some dotted leaves."""
    for leaf, value in leaves.items():
        name, _, rest = leaf.partition(".")
        if isinstance(config, dict):
            config = {**config, name: with_leaves(config.get(name, {}), {rest: value}) if rest else value}
        else:
            config = replace(config, **{name: with_leaves(getattr(config, name), {rest: value}) if rest else value})
    return config
