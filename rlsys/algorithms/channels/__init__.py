"""The terms that a loss can be composed of. One file each."""

from rlsys.algorithms.channels.cross_entropy import CrossEntropy
from rlsys.algorithms.channels.distillation import Distillation
from rlsys.algorithms.channels.policy import PolicyGradient
from rlsys.algorithms.channels.preference import Preference
from rlsys.algorithms.channels.value import ValueLoss

__all__ = ["CrossEntropy", "Distillation", "PolicyGradient", "Preference", "ValueLoss"]
