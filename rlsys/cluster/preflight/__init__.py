"""What can be wrong with a machine, a cluster or a run's surroundings, found before GPU hours are spent.

A probe is a name and a function without arguments that returns what it saw and what is wrong with it (``report.py``).
The functions behind them are pure: they compare what a run wants with what was seen (``machine.py`` looks at a host),
so that any set-up can be tried without having it. Every issue has a code, a place and what to do about it.
"""

from __future__ import annotations

from rlsys.cluster.preflight.report import Finding, Issue, PreflightFailed, Probe, Report, run_probes

__all__ = ["Finding", "Issue", "PreflightFailed", "Probe", "Report", "run_probes"]
