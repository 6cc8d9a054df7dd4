"""`fd.patch`: the ops of `fastdiff.ops` put into a network that somebody else wrote, with a report that can undo it.

`rules` finds the modules that are known, `forwards` holds what they compute instead, `report` what was done. A module's method is
replaced on the instance alone: no parameter, name or submodule changes, so state dicts, devices and dtypes stay what they are,
and a patched model can be copied and pickled. Everything else is left, and the report says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser, first_tensor
from ..errors import FastdiffError
from .report import Report, telling, why_refused
from .rules import Site, answer

__all__ = ["Report", "patch"]

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the output's largest value; 16-bit dtypes: 5e-2


def patch(
    model: nn.Module | Denoiser, *, example: Sequence[Any] | Mapping[str, Any] | None = None, strict: bool = False
) -> Report:
    """Puts fused kernels into a network: GroupNorm with SiLU, embedding and scale-shift; attention.

    Knows diffusers' UNet2DModel, UNet2DConditionModel, AutoencoderKL and what is built of their blocks; the blocks of
    guided-diffusion, improved-diffusion and latent-diffusion; any nn.GroupNorm, with the SiLU behind it in an nn.Sequential. Our
    own networks call the same ops unpatched. Where a kernel does not run, its op is torch's, and the report says why.

    Args:
        model: a module, or a Denoiser, whose network and decoder are then patched.
        example: arguments (a tuple, or a dict by name) of the model; it is called with them before and after, both times from
            the same state of torch's generators, so that dropout draws the same.
        strict: an error where a site was left, or where a kernel cannot run on the device and dtype of a site's own parameters.
            That torch computes attention because our kernel was not measured to be faster is no such case.

    Raises:
        FastdiffError: no module; with `example`, an output that is empty or not finite, or outputs too far apart; with `strict`,
            as above. Whatever is raised, everything is undone.
    """
    whole = _whole(model)
    before = None if example is None else _output(model, whole, example)
    if before is not None and not (before.numel() and before.isfinite().all()):
        raise FastdiffError("the output for example= is empty or not finite, so nothing can be compared: give other arguments")
    report = Report()
    try:
        _take(whole, report)
        if before is not None:
            report.error = _compare(before, _output(model, whole, example))
        if strict:
            _check_strictly(report)
    except BaseException:
        report.undo()
        raise
    return report


def _whole(model: Any) -> nn.Module:
    """One module of all that is to be patched."""
    parts = {"network": model.network, "decoder": model.decoder} if isinstance(model, Denoiser) else {}
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not modules and not isinstance(model, nn.Module):
        raise FastdiffError(f"fd.patch takes a torch module, or a Denoiser of one; given {type(model).__name__}")
    return nn.ModuleDict(modules) if modules else model


def _take(whole: nn.Module, report: Report) -> None:
    """Walks over a model from the outside in: a block that is taken whole takes the norms in it over."""
    within: set[nn.Module] = set()
    for name, module in whole.named_modules():
        found = None if module in within else answer(module)
        if isinstance(found, str):
            report.left[name] = f"{type(module).__name__}: {found}"
        if not isinstance(found, Site):
            continue
        within.update(found.within)
        (report.already if found.made else report.sites)[name] = found.kind
        place = found.replacements[0].module if found.replacements else module
        if why := why_refused(found.kind, telling(place, whole, name)):
            report.refused[name] = why
        for replacement in () if found.made else found.replacements:
            report.replace(*replacement)


def _output(model: Any, whole: nn.Module, example: Any) -> Tensor:
    """What the model makes of the example, leaving torch's generators as they are."""
    gpus = {p.device for p in whole.parameters() if p.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(gpus)):
        return first_tensor(model(**example) if isinstance(example, Mapping) else model(*example))


def _compare(before: Tensor, after: Tensor) -> float:
    error = ((after - before).abs().max() / before.abs().max().clamp_min(1e-12)).item()
    bound = TOLERANCE.get(before.dtype, 5e-2)
    if not error <= bound:
        raise FastdiffError(f"the patched model's output is {error:.1e} of its largest value away; allowed are {bound:g}: undone")
    return error


def _check_strictly(report: Report) -> None:
    reasons = [f"{name or 'the module itself'}: {why}" for name, why in (*report.left.items(), *report.refused.items())]
    if not (report.sites or report.already):
        reasons.append("nothing here is known")
    if reasons:
        more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
        raise FastdiffError(f"strict patch refused: {'; '.join(reasons[:3])}{more}: everything is undone")
