"""Trackers: one file each; see :mod:`rlsys.tracking.trackers.base` for the contract."""

from rlsys.tracking.trackers.base import TRACKERS, Tracker, TrackerSet

__all__ = ["TRACKERS", "Tracker", "TrackerSet"]
