"""What `fd.patch` did, where each op runs, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import ops
from .rules import ATTENTION

MISSING = object()


@dataclass(frozen=True)
class Swap:
    """One attribute of one instance, replaced."""

    module: nn.Module
    attribute: str
    before: Any
    after: Any

    def undo(self) -> None:
        if vars(self.module).get(self.attribute) is not self.after:
            return  # somebody replaced it since
        if self.before is MISSING:
            delattr(self.module, self.attribute)
        else:
            setattr(self.module, self.attribute, self.before)


@dataclass
class Report:
    """What `patch` did. Every dict is by a module's name in the model."""

    sites: dict[str, str] = field(default_factory=dict)  # what was patched there
    already: dict[str, str] = field(default_factory=dict)  # what calls the ops without being patched, or was patched before
    left: dict[str, str] = field(default_factory=dict)  # why it stayed as it was
    refused: dict[str, str] = field(default_factory=dict)  # why the kernel cannot run at one of sites and already
    error: float | None = None  # largest difference of the example's output, of its largest value
    swaps: list[Swap] = field(default_factory=list, repr=False)

    def replace(self, module: nn.Module, attribute: str, after: Any) -> None:
        self.swaps.append(Swap(module, attribute, vars(module).get(attribute, MISSING), after))  # known before it is done
        setattr(module, attribute, after)

    def undo(self) -> None:
        """Puts everything back that `patch` replaced."""
        for swap in reversed(self.swaps):
            swap.undo()
        self.swaps.clear()

    @property
    def runs(self) -> dict[str, str]:
        """What the op of each site runs on: "triton", or "torch" and why."""
        chosen = ops.backends()["attention"]  # by measurement, so it may be torch where the kernel could run
        able = {name: chosen if kind == ATTENTION else "triton" for name, kind in {**self.sites, **self.already}.items()}
        return {**able, **{name: f"torch ({why})" for name, why in self.refused.items()}}

    @property
    def lines(self) -> tuple[str, ...]:
        patched = counted("patched", self.sites.values()) or ("patched: nothing",)
        runs = self.runs
        places = (f"runs on {where}: {n} of {len(runs)}" for where, n in Counter(runs.values()).most_common())
        seen = "not compared: give example=" if self.error is None else f"example before and after: {self.error:.1e} apart"
        others = *counted("calls the ops already", self.already.values()), *counted("left", self.left.values())
        return (*patched, *others, *places, seen)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def counted(head: str, what: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{head}: {n} x {each}" for each, n in Counter(what).most_common())


def why_refused(kind: str, parameter: Tensor | None) -> str | None:
    """Why a site's kernel cannot run on what its parameter is like; None where it can."""
    if parameter is None:
        return "no parameter tells its device"
    if why := ops.why_torch(parameter.device):
        return why
    if parameter.dtype not in (taken := ops.dtypes("attention" if kind == ATTENTION else "group_norm_silu")):
        return f"the kernel takes {', '.join(str(d).removeprefix('torch.') for d in taken)}; given {parameter.dtype}"
    return None


def telling(module: nn.Module, whole: nn.Module, name: str) -> Tensor | None:
    """The parameter that tells device and dtype of what a module is given: of the module, else of what it lies in, the first
    matrix or convolution (guided-diffusion keeps the norms of a float16 network in float32), else the first vector."""
    while not (floating := [p for p in module.parameters() if p.is_floating_point()]) and name:
        name = name.rpartition(".")[0]
        module = whole.get_submodule(name)
    return max(floating, key=lambda p: min(p.ndim, 2), default=None)
