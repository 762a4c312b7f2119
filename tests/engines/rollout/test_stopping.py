"""Which tokens end a response."""

from __future__ import annotations

import json
from pathlib import Path

from model_folders import EOS, make_model_folder, make_tokenizer

from rlsys.engines.rollout.stopping import end_token_ids


def test_every_file_that_names_one_counts_and_words_that_the_model_lacks_do_not(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")  # of 72 words
    assert end_token_ids(str(folder), make_tokenizer()) == (EOS,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [71, 72, 100]}))
    assert end_token_ids(str(folder), make_tokenizer()) == (EOS, 71)
