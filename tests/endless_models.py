"""Model folders whose responses end at their limit alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model_folders import make_model_folder, make_tokenizer


def make_endless_folder(path: Path, **model: Any) -> Path:
    """As ``make_model_folder``, without any token that ends a response."""
    folder = make_model_folder(path, **model)
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": None}))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return folder
