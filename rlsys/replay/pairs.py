"""Preference pairs: where they come from (``pair_files``, ``agreement``) and their columns (``pair_columns``)."""

from rlsys.replay.agreement import AgreedPair, State, agreement_pairs
from rlsys.replay.pair_columns import SIDES, Side, join_pairs, pairs_from_groups, reference_view, with_reference
from rlsys.replay.pair_files import Pair, PairStream, load_pairs, pair_batch

__all__ = [
    "SIDES",
    "AgreedPair",
    "Pair",
    "PairStream",
    "Side",
    "State",
    "agreement_pairs",
    "join_pairs",
    "load_pairs",
    "pair_batch",
    "pairs_from_groups",
    "reference_view",
    "with_reference",
]
