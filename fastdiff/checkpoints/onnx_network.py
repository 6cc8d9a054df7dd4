"""A network alone in an ONNX graph, called as any torch network is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, FastdiffError
from ..models.labelled import Labelled
from .weights import listed

DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32,
}  # fmt: skip


class OnnxNetwork:
    """A graph (x, time, conditions) -> prediction. No gradients; tensors come from and go back to where x is.

    Args:
        session: ONNX Runtime's.
        names: its inputs by our names, x, t and any condition, where they cannot be told by their ranks: x is the first input of
            numbers with as many axes as the first output, t the first with at most one. Other inputs are conditions to bind.
    """

    null_label: int | None = None

    def __init__(self, session: Any, names: Mapping[str, str]) -> None:
        self.session = session
        self.inputs = {i.name: i for i in session.get_inputs()}
        self.output = session.get_outputs()[0]
        if unknown := [name for name in names.values() if name not in self.inputs]:
            raise CheckpointError(f"the graph has no input {listed(unknown)}; it has {listed(list(self.inputs))}")
        if odd := [f"{i.name} of {i.type}" for i in self.inputs.values() if i.type not in DTYPES]:
            raise CheckpointError(f"the graph's input {listed(odd)} is not read; {', '.join(DTYPES)} are")
        rest = [i for i in self.inputs.values() if i.name not in names.values()]
        rank = max(2, len(self.output.shape or ()))
        x = names.get("x") or _first([i for i in rest if len(i.shape) == rank and _floats(i)])
        t = names.get("t") or _first(sorted((i for i in rest if len(i.shape) <= 1), key=lambda i: not _floats(i)))
        if x is None or t is None:
            shapes = [f"{i.name} {i.shape}" for i in self.inputs.values()]
            raise CheckpointError(
                f'which of its inputs is the sample and which the time cannot be told: {listed(shapes)}; say '
                '"inputs": {"x": ..., "t": ...}'
            )
        own = {name: ours for ours, name in names.items()} | {x: "x", t: "t"}
        self.names = {own.get(name, name): name for name in self.inputs}
        self.takes = {  # as diffusers_networks.Rows
            ours: tuple(side if isinstance(side, int) else None for side in self.inputs[name].shape[1:])
            for ours, name in self.names.items() if ours not in ("x", "t")
        }  # fmt: skip
        self.batch, *sides = self.inputs[x].shape
        self.shape: tuple[int | str, ...] = tuple(sides)  # of one sample; text where any length will do
        self.config = Labelled(None)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        given = {"x": x, "t": t, **cond}
        if set(given) != set(self.names):
            wanted = listed([name for name in self.names if name not in ("x", "t")])
            raise FastdiffError(f"this network is conditioned on {wanted or 'nothing'}; bound: {listed(list(cond)) or 'nothing'}")
        step = self.batch if isinstance(self.batch, int) else len(x)
        if len(x) % step:
            raise FastdiffError(f"this graph takes batches of {step} alone; given {len(x)} samples")
        parts = [self._run({ours: _rows(v, i, step, len(x)) for ours, v in given.items()}) for i in range(0, len(x), step)]
        return torch.cat(parts).to(x)

    def _run(self, given: Mapping[str, Tensor]) -> Tensor:
        feed = {}
        for ours, name in self.names.items():
            value, wanted = given[ours].detach().cpu(), self.inputs[name]
            if ours == "t" and wanted.shape in ([], [1]):
                if value.unique().numel() > 1:
                    raise FastdiffError("this graph takes one time for a whole batch; given several")
                value = value[:1].view(wanted.shape)
            value = value if _floats(wanted) or not value.is_floating_point() else value.round()
            feed[name] = value.to(DTYPES[wanted.type]).contiguous().numpy()
        try:
            return torch.from_numpy(self.session.run([self.output.name], feed)[0])
        except Exception as e:  # of ONNX Runtime's own classes: mostly a condition of another shape
            raise FastdiffError(f"the graph does not run on what is bound: {' '.join(str(e).split())[:300]}") from e


def _floats(declared: Any) -> bool:
    return DTYPES[declared.type].is_floating_point


def _first(found: Sequence[Any]) -> str | None:
    return found[0].name if found else None


def _rows(value: Any, first: int, count: int, batch: int) -> Tensor:
    """A condition's rows of one call; one of batch 1 serves every sample."""
    value = torch.as_tensor(value)
    if value.ndim and len(value) == 1 < batch:
        value = value.expand(batch, *value.shape[1:])
    return value[first : first + count] if value.ndim else value
