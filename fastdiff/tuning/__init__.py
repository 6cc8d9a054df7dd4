"""Learned plans: the best table for one checkpoint and one budget, no weight of the network changed."""

from .derivative_free import NodeSearch, SearchConfig
from .nodes import SolverNodes
from .provenance import provenance
from .starts import rivals, starts
from .table import LearnedTable, Table
from .targets import Pairs, Score, endpoints, make_pairs, rmse_of
from .tune import TuneConfig, Tuner

__all__ = [
    "LearnedTable", "NodeSearch", "Pairs", "Score", "SearchConfig", "SolverNodes", "Table", "TuneConfig", "Tuner", "endpoints",
    "make_pairs", "provenance", "rivals", "rmse_of", "starts",
]  # fmt: skip
