"""The reference page lists every key, with the default that it has."""

from __future__ import annotations

import json
import re
from typing import Any

from rlsys.config import schema
from rlsys.config.assets import asset
from rlsys.config.build import defaults, leaves, variants

ROW = re.compile(r"\| `([\w.]+)` \| .*? \| (?:`(.*?)`|required) \| \S.* \|")
CHOSEN_BY_GROUP = {"data.kind", "rollout.engine", "cluster.kind", "controller.kind"}


def listed() -> list[tuple[str, Any]]:
    page = (asset("configs").parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    return [(key, "???" if default == "" else json.loads(default)) for key, default in ROW.findall(page)]


def test_every_key_is_listed_and_no_other() -> None:
    keys = {key for key, _ in listed() if not key.startswith("reward.parts.")}
    assert keys == set(leaves()) - CHOSEN_BY_GROUP


def test_the_defaults_are_those_of_the_schema() -> None:
    def flat(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        nested = {k: v for k, v in node.items() if isinstance(v, dict) and v}
        return {f"{prefix}{k}": v for k, v in node.items() if k not in nested} | {
            key: value for k, v in nested.items() for key, value in flat(v, f"{prefix}{k}.").items()
        }

    known = flat(defaults(schema.RunConfig), "")
    unions = {
        "data.": variants(schema.DataConfig),
        "rollout.": variants(schema.RolloutConfig),
        "controller.": variants(schema.ControllerConfig),
        "cluster.": variants(schema.ClusterConfig),
    }
    allowed: dict[str, list[Any]] = {key: [value] for key, value in known.items()}
    for prefix, classes in unions.items():
        for cls in classes:
            for key, value in flat(defaults(cls), prefix).items():
                allowed.setdefault(key, []).append(value)
    allowed |= {f"reward.parts.NAME.{key}": [value] for key, value in defaults(schema.RewardPart).items()}
    for group, cls in {
        "model.lora": schema.LoraConfig,
        "trainer.critic": schema.CriticConfig,
        "algorithm.kl": schema.KLConfig,
        "replay": schema.ReplayConfig,
    }.items():
        allowed |= {f"{group}.{key}": [value] for key, value in defaults(cls).items()}
    wrong = [(key, default) for key, default in listed() if default not in allowed[key]]
    assert not wrong
