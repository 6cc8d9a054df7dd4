"""What a network is conditioned on, from a file: .safetensors, each tensor under the name that the network takes it by.

A part of a mapping is named mapping.part, such as added_cond_kwargs.time_ids. What guidance leads away from, and what training
drops a condition to, has the same names behind "negative."; a name that is left out there is as without it. The first side of a
tensor counts its rows: one for all samples, or one for each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser, rows_of, told
from ..errors import CheckpointError, FastdiffError
from ..streaming import out_of_memory
from .diffusers_networks import Row, Rows
from .weights import listed, read

NEGATIVE = "negative."


@dataclass(frozen=True)
class Conditions:
    """`cond` and `negative` as a network takes them; `count` rows, 1 for all samples; `hash`: sha256 of the file."""

    cond: dict[str, Any]
    negative: dict[str, Any] | None
    count: int
    hash: str

    def places(self, seeds: Sequence[int]) -> dict[int, int]:
        """The number of each seed's row; empty where one serves all."""
        return {seed: i for i, seed in enumerate(seeds)} if self.count > 1 else {}

    def rows(self, index: Tensor) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """`cond` and `negative` of the samples of these numbers."""
        if self.count == 1:
            return self.cond, self.negative
        negative = None if self.negative is None else rows_of(self.negative, index, self.count)
        return rows_of(self.cond, index, self.count), negative

    def bound(self, denoiser: Denoiser, rows: Sequence[int]) -> Denoiser:
        """The denoiser of the samples of these numbers; `guide.cfg(..., negative=its unprompted)` guides it."""
        cond, negative = self.rows(torch.tensor(list(rows)))
        same = denoiser.bind(**cond)
        same.contrast = negative
        return same


def wanted(denoiser: Denoiser) -> Rows:
    """The conditions that a denoiser's network must be given, classes that are asked for by number apart."""
    takes = getattr(denoiser.network, "takes", {})
    return {name: row for name, row in takes.items() if name != "class_labels" or not denoiser.num_classes}


def read_conditions(path: Path, denoiser: Denoiser, count: int, what: str = "seed") -> Conditions:
    """The conditions of a file, for `count` samples.

    Raises:
        CheckpointError: no safetensors file, or a damaged one.
        FastdiffError: names that the network does not take or that are missing; tensors of another shape or number of rows.
    """
    takes = wanted(denoiser)
    if not takes:
        hint = "its classes are chosen by number (--classes)" if denoiser.num_classes else "leave out --condition"
        raise FastdiffError(f"this network takes no conditions from a file: {hint}")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"conditions are read from .safetensors alone (safetensors.torch.save_file); given {path}")
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    weights = read(path)
    known = takes | getattr(denoiser.network, "may_take", {})
    _check_names(path, list(weights.tensors), takes, known)
    for name, t in weights.tensors.items():
        _check(f"{path}: {name}", t, known[name.removeprefix(NEGATIVE)], count, what)
    given = {name: t.float() for name, t in weights.tensors.items()}
    cond = {name: t for name, t in given.items() if not name.startswith(NEGATIVE)}
    negative = {name.removeprefix(NEGATIVE): t for name, t in given.items() if name.startswith(NEGATIVE)}
    rows = max(len(t) for t in given.values())
    return Conditions(_nested(cond), _nested(cond | negative) if negative else None, rows, weights.hash)


def _check_names(path: Path, names: list[str], takes: Rows, known: Rows) -> None:
    missing = [name for name in takes if name not in names]
    unknown = [name for name in names if name.removeprefix(NEGATIVE) not in known]
    found = [f"{listed(some)} is {how}" for some, how in ((missing, "missing"), (unknown, "not known here")) if some]
    if found:
        takes_all = f"this network takes {listed(list(known))}, each also behind {NEGATIVE}"
        raise FastdiffError(f"{path}: {'; '.join(found)}; {takes_all}")


def _check(where: str, t: Tensor, row: Row, count: int, what: str) -> None:
    fits = t.ndim == 1 + len(row) and all(side in (None, given) for side, given in zip(row, t.shape[1:], strict=True))
    if not fits:
        sides = ", ".join(["rows", *("any" if side is None else str(side) for side in row)])
        raise FastdiffError(f"{where} must have shape ({sides}); given {tuple(t.shape)}")
    if len(t) not in (1, count):
        raise FastdiffError(f"{where} has {len(t)} rows; give 1 for all, or one for each {what} ({count})")
    if t.is_complex() or not bool(t.float().isfinite().all()):
        raise FastdiffError(f"{where} must hold finite real numbers")


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}"""
    out: dict[str, Any] = {}
    for name, t in flat.items():
        whole, _, part = name.partition(".")
        if part:
            out.setdefault(whole, {})[part] = t
        else:
            out[name] = t
    return out


def tried(denoiser: Denoiser) -> Tensor:
    """What the network returns for one sample of zeros under the conditions bound.

    Raises:
        FastdiffError: it does not run on such a sample, or on these conditions.
    """
    shape = denoiser.shape
    assert shape is not None
    if denoiser.num_classes:
        denoiser = denoiser.bind(class_labels=torch.zeros(1, dtype=torch.long, device=denoiser.device))
    x = torch.zeros(1, *shape, device=denoiser.device)
    t = (denoiser.schedule.t_min + denoiser.schedule.t_max) / 2
    try:
        return denoiser.raw(x, told(x, denoiser.level(t)[1]))
    except FastdiffError:
        raise
    except Exception as e:  # another library's network on a stranger's tensors: anything may come
        if out_of_memory(e):
            raise
        kind = denoiser.info.get("format", type(denoiser.network).__name__)
        shapes = f"samples of {shape}" + (f" under {', '.join(denoiser.cond)}" if denoiser.cond else "")
        why = " ".join(str(e).split())[:200]
        raise FastdiffError(f"this network ({kind}) does not run on {shapes}: {why}") from e
