"""rlsys: reinforcement learning of language models on a Ray cluster."""

__version__ = "0.1.0"
