"""Files that ship with rlsys: in a checkout beside the package, in a wheel inside it."""

from __future__ import annotations

from pathlib import Path

from rlsys.config.errors import UserError

_PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED = "bundled:"


def asset(name: str) -> Path:
    """The folder ``configs`` or ``recipes``."""
    inside = _PACKAGE / "_assets" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def bundled_model(path: str, *, where: str = "model.path") -> str:
    """The folder behind ``bundled:NAME``; any other path as it is.

    Raises:
        UserError: no bundled checkpoint has that name.
    """
    if not path.startswith(BUNDLED):
        return path
    root = asset("recipes") / "start_model" / "checkpoints"
    known = sorted(p.name for p in root.iterdir() if (p / "config.json").exists()) if root.is_dir() else []
    name = path.removeprefix(BUNDLED)
    if name not in known:
        raise UserError(
            f"no checkpoint called '{name}' ships with rlsys", where=where, fix=f"known: {', '.join(known)}"
        )
    return str(root / name)
