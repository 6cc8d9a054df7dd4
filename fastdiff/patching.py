"""`fd.patch`: the ops of `fastdiff.ops` put into a network that somebody else wrote, with a report that can undo it.

A site is a module whose class is known here by name (diffusers need not be imported), and whose parts are those that the class
normally has. Its `forward`, or its attention processor, is replaced on the instance alone: no parameter, name or submodule
changes, so state dicts, devices and dtypes stay what they are. Everything else is left, and the report says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .denoiser import Denoiser, first_tensor
from .errors import FastdiffError

NORM, NORM_SILU, RESNET, ATTENTION = "GroupNorm", "GroupNorm + SiLU", "residual block: GroupNorm + SiLU twice", "attention"
OURS = ("fastdiff.Norm", "fastdiff.AttentionBlock")  # our U-Net calls the ops itself
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # of diffusers, without and with torch's attention
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the output's largest value; 16-bit dtypes: 5e-2
MISSING = object()


@dataclass(frozen=True)
class Swap:
    """One attribute of one instance, replaced."""

    module: nn.Module
    attribute: str
    after: Any
    before: Any

    @classmethod
    def make(cls, module: nn.Module, attribute: str, after: Any) -> Swap:
        swap = cls(module, attribute, after, module.__dict__.get(attribute, MISSING))
        setattr(module, attribute, after)
        return swap

    def undo(self) -> None:
        if self.module.__dict__.get(self.attribute) is not self.after:
            return  # somebody replaced it since
        if self.before is MISSING:
            delattr(self.module, self.attribute)
        else:
            setattr(self.module, self.attribute, self.before)


@dataclass
class Report:
    """What `patch` did. `sites` and `left` map a module's name to what it is, and to why it stayed as it was."""

    runs: str  # what the ops run on, on this model's device
    sites: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)  # call the ops without being patched, or were patched before
    error: float | None = None  # largest difference of the example's output, of its largest value
    swaps: list[Swap] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Puts everything back that `patch` replaced."""
        for swap in reversed(self.swaps):
            swap.undo()
        self.swaps.clear()

    @property
    def lines(self) -> tuple[str, ...]:
        counted = Counter(self.sites.values()).most_common()
        swapped = [f"patched: {n} x {kind}" for kind, n in counted] or ["patched: nothing"]
        again = [f"calls the ops already: {n} x {kind}" for kind, n in Counter(self.already.values()).most_common()]
        left = [f"left: {n} x {why}" for why, n in Counter(self.left.values()).most_common()]
        seen = "not compared: give example=" if self.error is None else f"example before and after: {self.error:.1e} apart"
        return (*swapped, *again, *left, f"runs on: {self.runs}", seen)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def patch(
    model: nn.Module | Denoiser, *, example: Sequence[Any] | Mapping[str, Any] | None = None, strict: bool = False
) -> Report:
    """Puts fused kernels into a network: GroupNorm with SiLU, embedding and scale-shift; attention.

    Knows diffusers' UNet2DModel, UNet2DConditionModel, AutoencoderKL and what is built of their blocks, and any nn.GroupNorm. Our
    own U-Net calls the same ops unpatched. On a device where the kernels do not run the ops are torch's, and the report says so.

    Args:
        model: a module, or a Denoiser, whose network and decoder are then patched.
        example: arguments (a tuple, or a dict by name) of the model; it is called with them before and after.
        strict: an error where a kernel cannot run on the model's device or a site was left.

    Raises:
        FastdiffError: no module; with `example`, outputs too far apart (everything is undone); with `strict`, as above.
    """
    parts = [model.network, model.decoder] if isinstance(model, Denoiser) else [model]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    if not modules:
        raise FastdiffError(f"fd.patch takes a torch module, or a Denoiser of one; given {type(model).__name__}")
    device = next((p.device for m in modules for p in m.parameters()), torch.device("cpu"))
    why = ops.why_torch(device)
    report = Report("triton" if why is None else f"torch ({why})")
    before = None if example is None else _output(model, example)
    for module in modules:
        _sites(module, report)
    try:
        if before is not None:
            report.error = _compare(before, _output(model, example))
        if strict and (why is not None or report.left or not (report.sites or report.already)):
            reasons = ([f"the kernels do not run: {why}"] if why else []) + [f"{n}: {r}" for n, r in report.left.items()]
            raise FastdiffError(f"strict patch refused: {'; '.join(reasons[:3]) or 'nothing here is known'}")
    except FastdiffError:
        report.undo()
        raise
    return report


def _output(model: Any, example: Any) -> Tensor:
    with torch.no_grad():
        given = model(**example) if isinstance(example, Mapping) else model(*example)
    return first_tensor(given)


def _compare(before: Tensor, after: Tensor) -> float:
    error = ((after - before).abs().max() / before.abs().max().clamp_min(1e-12)).item()
    bound = TOLERANCE.get(before.dtype, 5e-2)
    if not error <= bound:
        raise FastdiffError(f"the patched model's output is {error:.1e} of its largest value away; allowed are {bound:g}: undone")
    return error


def _sites(model: nn.Module, report: Report) -> None:
    """Walks over a model from the outside in: a block that is replaced whole covers the norms in it."""
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        rule = None if module in covered else _rule(module)
        if rule is None:
            continue
        if rule.kind in OURS or _patched(rule.of):
            report.already[name] = rule.kind.split(".")[-1]
            covered.update(rule.covers)
            continue
        found = rule.decide(module)
        if isinstance(found, str):
            report.left[name] = f"{type(module).__name__}: {found}"
            continue
        report.sites[name] = rule.kind
        covered.update(rule.covers)
        report.swaps += [Swap.make(*change) for change in found]


Change = tuple[nn.Module, str, Any]


@dataclass(frozen=True)
class Rule:
    """What a module is taken for; the modules that a replacement of it covers; what makes the changes, or says why not; and where
    one sees that they were made."""

    kind: str
    covers: tuple[nn.Module, ...]
    decide: Callable[[Any], list[Change] | str]
    of: nn.Module


def _rule(module: Any) -> Rule | None:
    """The rule for a module; None where there is nothing to fuse."""
    cls = type(module)
    name = f"{cls.__module__.split('.')[0]}.{cls.__name__}"
    if name in OURS:
        return Rule(name, tuple(module.modules()), lambda m: [], module)
    if name == "diffusers.ResnetBlock2D":
        return Rule(RESNET, (module.norm1, module.norm2), _resnet, module)
    if name == "diffusers.Attention":
        return Rule(ATTENTION, (module,), _attention, module)
    if isinstance(norm := getattr(module, "conv_norm_out", None), nn.GroupNorm) and hasattr(module, "conv_act"):
        return Rule(NORM_SILU, (norm, module.conv_act), _tail, norm)
    if isinstance(module, nn.GroupNorm):
        return Rule(NORM, (module,), _norm, module)
    if isinstance(module, nn.MultiheadAttention):
        return Rule(ATTENTION, (module,), lambda m: "torch's module, which fuses by itself", module)
    return None


def _patched(module: nn.Module) -> bool:
    forward = getattr(module.__dict__.get("forward"), "__func__", None)
    return forward in FORWARDS or isinstance(getattr(module, "processor", None), Processor)


def _taken(*modules: nn.Module) -> str | None:
    """Why modules that are no longer called must stay: somebody else watches or replaced them."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks:
            return "hooks are registered on it"
        if "forward" in m.__dict__:
            return "its forward was replaced already (offloading, another patch)"
    return None


def _resnet(block: Any) -> list[Change] | str:
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if not type(block.norm1) is type(block.norm2) is nn.GroupNorm:
        return f"its norms are {type(block.norm1).__name__} and {type(block.norm2).__name__}"
    if block.time_emb_proj is not None and block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its embedding enters by {block.time_embedding_norm}"
    return _taken(block, block.norm1, block.norm2, block.nonlinearity) or [(block, "forward", MethodType(resnet_forward, block))]


def _attention(module: Any) -> list[Change] | str:
    before = module.processor
    if type(before).__name__ not in PROCESSORS:
        return f"its processor is {type(before).__name__}"
    scale = None if type(before).__name__ == "AttnProcessor2_0" else float(module.scale)
    if scale is not None and (module.upcast_attention or module.upcast_softmax):
        return "it computes scores or softmax in float32 (upcast)"
    return [(module, "processor", Processor(before, scale))]


def _tail(module: Any) -> list[Change] | str:
    norm, act = module.conv_norm_out, module.conv_act
    if type(norm) is not nn.GroupNorm or type(act) is not nn.SiLU:
        return f"its end is {type(norm).__name__} and {type(act).__name__}"
    return _taken(norm, act) or [
        (norm, "forward", MethodType(norm_silu_forward, norm)), (act, "forward", MethodType(identity_forward, act)),
    ]  # fmt: skip


def _norm(norm: nn.GroupNorm) -> list[Change] | str:
    if type(norm) is not nn.GroupNorm:
        return "a class of its own, unknown here"
    return _taken(norm) or [(norm, "forward", MethodType(norm_forward, norm))]


# ---- what the sites do instead


def fused(norm: nn.GroupNorm, x: Tensor, silu: bool, residual: Tensor | None = None, **affine: Tensor | None) -> Tensor:
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, residual=residual, **affine)


def norm_forward(self: nn.GroupNorm, input: Tensor) -> Tensor:
    return fused(self, input, silu=False)


def norm_silu_forward(self: nn.GroupNorm, input: Tensor) -> Tensor:
    return fused(self, input, silu=True)


def identity_forward(self: nn.Module, input: Tensor) -> Tensor:
    return input


def resnet_forward(self: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' ResnetBlock2D with its norms, activations and embedding in two ops."""
    if args or kwargs or (temb is None) != (self.time_emb_proj is None):  # rare forms are the class's own matter
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)
    x, h = input_tensor, fused(self.norm1, input_tensor, silu=True)
    if (resample := self.upsample or self.downsample) is not None:
        if self.upsample is not None and len(h) >= 64:
            x, h = x.contiguous(), h.contiguous()  # torch's nearest upsampling fails on large channels-last batches
        x, h = resample(x), resample(h)
    h = self.conv1(h)
    scale = shift = added = None
    if temb is not None:
        e = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            scale, shift = e.chunk(2, dim=1)
        else:
            added = e[:, :, None, None]
    h = self.conv2(self.dropout(fused(self.norm2, h, silu=True, residual=added, scale=scale, shift=shift)))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x.contiguous() if self.training else x)
    return (x + h) / self.output_scale_factor


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * d) as (B, heads, S, d), a view."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class Processor:
    """diffusers' attention processor through `ops.attention`; calls with a mask or other extras go to the one before."""

    def __init__(self, before: Any, scale: float | None) -> None:
        self.before, self.scale = before, scale

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, temb: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or attn.spatial_norm is not None or args or kwargs:
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        image = hidden_states.ndim == 4
        x = hidden_states.flatten(2).transpose(1, 2) if image else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (heads_of(part, attn.heads) for part in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = ops.attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        out = out if out.dtype == q.dtype else out.to(q.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if image:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


FORWARDS = (norm_forward, norm_silu_forward, identity_forward, resnet_forward)
