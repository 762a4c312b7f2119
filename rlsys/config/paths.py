"""Names of files that come out of a file: they stay in the folder that they are said to be in."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from rlsys.config.errors import UserError


def inside(folder: Path, name: str, *, where: str) -> Path:
    """``folder / name``, for a name that somebody else wrote (in a manifest, an index, a row of data).

    Args:
        where: the file that has the name, for the error message.

    Raises:
        UserError: the name is empty, absolute, or goes through ``..``. Links are followed: they are of who
            made the folder.
    """
    pure = PurePosixPath(name)
    if not pure.parts or "\0" in name or pure.is_absolute() or ".." in pure.parts:
        raise UserError(
            f"the name {name!r} leads out of {folder}",
            where=where,
            fix="do not use this file: nobody writes such names",
        )
    return folder / name
