"""What must hold after weights went from trainer to sampler. A sampler left on old weights trains on for hours without
an error, so it is one here."""

from __future__ import annotations


class SyncError(RuntimeError):
    """The sampler does not hold the weights that it was sent; what it samples now must not be trained on."""


def check_sync(
    *,
    sender_before: str | None,
    sender_after: str,
    sampler_before: str | None,
    sampler_after: str,
    sampler: str = "the sampler",
) -> None:
    """Compares the checksums around one weight sync.

    Args:
        sender_before: checksum of what was sent the last time; None at the first sync.
        sender_after: checksum of what was sent now, in the sampler's dtype.
        sampler_before: checksum of what the sampler held before; None where it was not taken.
        sampler_after: checksum of what the sampler holds now, computed from what it holds.
        sampler: who it is, for the error.
        sampler: its name, for the message.

    Raises:
        SyncError: the sampler did not change although the sender did, or it holds something else than was sent.
    """
    if sender_after == sampler_after:
        return
    sender_changed = sender_before is not None and sender_before != sender_after
    if sender_changed and sampler_before == sampler_after:
        raise SyncError(
            f"the trainer's weights changed but those of {sampler} did not: the update never reached it "
            f"(sent {sender_after}, it still holds {sampler_after})"
        )
    raise SyncError(
        f"after the sync {sampler} holds other weights than were sent (sent {sender_after}, it holds {sampler_after}): "
        "a tensor is missing, went to a wrong name, or is not a finite number"
    )
