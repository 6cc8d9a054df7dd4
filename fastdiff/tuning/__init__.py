"""Learned plans: the best table for one checkpoint and one budget, no weight of the network changed."""

from .table import LearnedTable
from .targets import Pairs, make_pairs
from .tune import TuneConfig, Tuner

__all__ = ["LearnedTable", "Pairs", "TuneConfig", "Tuner", "make_pairs"]
