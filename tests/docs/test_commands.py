"""Every command on the pages about algorithms is one that a run would start from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from composing import composed
from pages import DOCS, blocks, commands, tables, text_of, write_python_block

from rlsys.algorithms.divergences.jsd import jsd
from rlsys.cluster.placement import place
from rlsys.cluster.topology import expected
from rlsys.config.assets import bundled_model
from rlsys.config.build import build
from rlsys.config.compose import overridden_keys
from rlsys.config.ignored import refuse_ignored
from rlsys.config.schema import ReplayConfig
from rlsys.controller.trial import try_out
from rlsys.data.prompts import PromptEncoder, load_tokenizer
from rlsys.replay.pairs import load_pairs

NEW = "how-to/new-algorithm.md"
CLUSTERS = ["how-to/dgx-spark.md", "how-to/nvl72.md"]
PAGES = [
    NEW,
    "how-to/async.md",
    "how-to/choose-an-algorithm.md",
    "how-to/self-distillation.md",
    "how-to/preferences.md",
    *CLUSTERS,
]
COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.fixture
def my_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_python_block(NEW, tmp_path / "mine", "my_algorithm").parent)


@pytest.mark.usefixtures("my_algorithm")
@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_every_command_composes_and_nothing_in_it_is_ignored(page: str, command: list[str]) -> None:
    recipe = next(word.removeprefix("+recipe=") for word in command if word.startswith("+recipe="))
    overrides = [word for word in command if not word.startswith("+recipe=")]
    config = build(composed(*overrides, recipe=recipe))
    refuse_ignored(config, overridden_keys(overrides))
    try_out(config)
    if page in CLUSTERS:
        assert place(config, expected(config.cluster)).of("trainer")


def test_pages_link_to_pages_that_are_there() -> None:
    for page in (*PAGES, "architecture.md"):
        for link in re.findall(r"\]\(([\w./-]+\.md)", text_of(page)):
            assert ((DOCS / page).parent / link).is_file(), f"{page} links to {link}"


def test_every_page_has_commands() -> None:
    assert {page for page, _ in COMMANDS} == set(PAGES)


def test_the_jump_of_jsd_at_its_ends_is_as_the_page_has_it() -> None:
    _, rows = tables("how-to/self-distillation.md", "Divergences")
    student, teacher = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()
    assert [float(alpha) for alpha, _ in rows] == [0, 0.01, 0.1, 0.5, 0.9, 0.99, 1]
    for alpha, value in rows:
        assert jsd(student, teacher, alpha=float(alpha)).item() == pytest.approx(float(value), abs=5e-5)


def test_the_pairs_and_states_of_the_page_are_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bundled_model("bundled:arithmetic"))
    encoder = PromptEncoder(tokenizer, max_prompt_tokens=16)
    found = {}
    for source, rows in zip(("file", "agreement"), blocks("how-to/preferences.md", "json"), strict=True):
        file = tmp_path / f"{source}.jsonl"
        file.write_text(rows, encoding="utf-8")
        replay = ReplayConfig(source=source, path=str(file))  # type: ignore[arg-type]
        pairs, _ = load_pairs(replay, replay.path, encoder, tokenizer, max_response_tokens=8)
        found[source] = [[tokenizer.decode(ids[:-1]) for ids in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    assert found == {"file": [["042", "032"], ["041", "031"]], "agreement": [["042", "032"]]}
