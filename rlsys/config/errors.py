"""The one error a user sees for bad input: what is wrong, where, and what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The command line prints it as one short block and leaves with exit code 2.

    Args:
        what: what is wrong, in one sentence.
        where: the file, line, key or row that it was found at.
        fix: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple:
        # Crosses process borders (Ray actors raise it too), so that keyword-only arguments survive.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[UserError], what: str, where: str | None, fix: str | None) -> UserError:
    return cls(what, where=where, fix=fix)


class JobFailed(Exception):
    """A job of a sweep did not finish. The sweep's table has said which and why."""
