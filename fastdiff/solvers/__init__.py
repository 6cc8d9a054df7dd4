"""Solvers: pure functions (schedule, grid, options) -> Plan. Float64 mathematics; no torch, no state."""

from .registry import SolverInfo, list_solvers, plan

__all__ = ["SolverInfo", "list_solvers", "plan"]
