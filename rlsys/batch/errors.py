"""Errors of the batch: a call that cannot be right, and a column that a stage needs and does not find."""

from __future__ import annotations

from rlsys.config.errors import UserError


class BatchError(AssertionError, ValueError):
    """Batches that do not fit together, or an operation that does not fit the batch.

    An AssertionError because code written for verl's DataProto expects one, a ValueError because that is what it is.
    """


class ColumnError(UserError, ValueError):
    """A column that a stage reads is missing or is not what ``rlsys.batch.columns`` declares."""
