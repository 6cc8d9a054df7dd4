"""Which modules `fd.patch` knows, and why it leaves one alone.

A rule looks at one module and answers None (nothing for me), a `Site` (take it), or why a module that it knows stays as it is.
torch's classes are known by themselves, diffusers' by name and package (diffusers need not be imported). guided-diffusion's live
in anybody's code under any path: they are known by name and by being built of exactly the parts that the replacement computes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from ..models import classifier, edm, unet
from . import forwards
from .forwards import function_of, package

NORM, NORM_SILU, ADA_NORM = "GroupNorm", "GroupNorm + SiLU", "GroupNorm + scale and shift"
BLOCK, ATTENTION = "residual block: GroupNorm + SiLU twice", "attention"

MODULE, GROUP_NORM = frozenset(vars(nn.Module())), frozenset(vars(nn.GroupNorm(1, 1)))  # what their instances hold
RES_BLOCK_PARTS = {"in_layers", "emb_layers", "out_layers", "skip_connection", "h_upd", "x_upd"}
RES_BLOCK_OPTIONS = {
    "channels", "emb_channels", "out_channels", "dropout", "use_conv", "use_checkpoint", "use_scale_shift_norm", "updown",
}  # fmt: skip


class Replacement(NamedTuple):
    """A method of one instance, and the forward that takes its place."""

    module: Any
    method: str
    forward: partial[Any]


@dataclass(frozen=True)
class Site:
    """A place where an op goes in."""

    kind: str
    replacements: tuple[Replacement, ...] = ()  # none: the module calls the ops by itself
    within: tuple[Any, ...] = ()  # modules that the site takes over, so that no other rule looks at them

    @property
    def made(self) -> bool:
        """Whether all of it is in place already."""
        return all(function_of(vars(r.module).get(r.method)) is r.forward.func for r in self.replacements)


Answer = Site | str | None


def replace(module: Any, function: Callable[..., Any], *more: Any, method: str = "forward") -> Replacement:
    return Replacement(module, method, partial(function, module, *more))


def answer(module: nn.Module) -> Answer:
    """What the first rule that knows a module says of it."""
    if package(module) == "fastdiff":
        return ours(module)
    return next((found for rule in RULES if (found := rule(module)) is not None), None)


def ours(module: Any) -> Answer:
    if isinstance(module, unet.Norm | edm.Norm):
        return Site(NORM)
    attends = isinstance(module, unet.AttentionBlock | classifier.AttentionPool)
    return Site(ATTENTION) if attends or (isinstance(module, edm.Block) and module.heads) else None


# ---- what rules ask of a module


def known_class(module: Any, name: str, of: str | None = None) -> type | None:
    """The class of that name (and package) that a module is of, or inherits from."""
    for cls in type(module).__mro__:
        if cls.__name__ == name and (of is None or cls.__module__.split(".")[0] == of):
            return cls
    return None


def changed(module: Any, cls: type, method: str = "forward") -> str | None:
    """Why a subclass is not what it inherits from: it computes in its own way."""
    same = getattr(type(module), method) is getattr(cls, method)
    return None if same else f"a subclass of {cls.__name__} with a {method} of its own"


def watched(*modules: nn.Module) -> str | None:
    """Why modules that a site would call no more must be called: hooks, or a forward that somebody put there."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return f"hooks are registered on its {type(m).__name__}"
        if reason := replaced(m):
            return reason
    return None


def replaced(module: nn.Module, method: str = "forward") -> str | None:
    """Why a method of an instance cannot be replaced: somebody else did so before. Hooks still run around a replaced forward."""
    now = vars(module).get(method)
    return None if now is None or function_of(now) else "its forward was replaced already (offloading, another patch)"


def own_attributes(module: nn.Module, like: frozenset[str] = MODULE) -> set[str]:
    """Names that a module's instance holds beyond those of `like`, and beyond a method that we replaced."""
    return {name for name, value in vars(module).items() if name not in like and not function_of(value)}


def parameters_of(cls: type, method: str) -> int:
    """How many arguments a method takes, without self."""
    return len(inspect.signature(getattr(cls, method)).parameters) - 1


def is_silu(module: Any) -> bool:
    """torch's SiLU, or improved-diffusion's own of the same name."""
    return type(module) is nn.SiLU or (type(module).__name__ == "SiLU" and not own_attributes(module))


# ---- norms


def unlike_group_norm(norm: Any) -> str | None:
    """Why a module is no GroupNorm that the op can stand in for; None where it is one: torch's, or guided-diffusion's
    GroupNorm32, which computes in float32 what the op takes its statistics in."""
    if not isinstance(norm, nn.GroupNorm):
        return f"a {type(norm).__name__}, not GroupNorm"
    wide = known_class(norm, "GroupNorm32")
    if wide is not None and (own := own_attributes(norm, GROUP_NORM)):
        return f"a GroupNorm32 with attributes of its own: {', '.join(sorted(own))}"  # GLIDE's: swish
    return changed(norm, wide or nn.GroupNorm)


def group_norm(norm: Any) -> Answer:
    if not isinstance(norm, nn.GroupNorm):
        return None
    return replaced(norm) or unlike_group_norm(norm) or Site(NORM, (replace(norm, forwards.norm_forward),))


def ada_group_norm(norm: Any) -> Answer:
    cls = known_class(norm, "AdaGroupNorm", "diffusers")
    if cls is None:
        return None
    return replaced(norm) or changed(norm, cls) or Site(ADA_NORM, (replace(norm, forwards.ada_norm_forward),))


def sequential(layers: Any) -> Answer:
    """GroupNorm and SiLU side by side in an nn.Sequential. The norms get the op too, for who calls them one by one."""
    if not isinstance(layers, nn.Sequential) or type(layers).forward is not nn.Sequential.forward:
        return None
    places = tuple(i for i in range(len(layers) - 1) if not unlike_group_norm(layers[i]) and is_silu(layers[i + 1]))
    if not places:
        return None
    norms = tuple(layers[i] for i in places)
    if reason := replaced(layers) or watched(*norms, *(layers[i + 1] for i in places)):
        return reason
    each = tuple(replace(norm, forwards.norm_forward) for norm in norms)
    return Site(NORM_SILU, (replace(layers, forwards.sequential_forward, places), *each), norms)


def output_norm(model: Any) -> Answer:
    """conv_norm_out and conv_act, which diffusers' models call one after the other."""
    norm, act = getattr(model, "conv_norm_out", None), getattr(model, "conv_act", None)
    if package(model) != "diffusers" or not isinstance(norm, nn.GroupNorm) or act is None:
        return None
    if unlike_group_norm(norm) or not is_silu(act):
        return f"its end is {type(norm).__name__} and {type(act).__name__}"
    pair = replace(norm, forwards.norm_silu_forward), replace(act, forwards.identity_forward)
    return watched(norm, act) or Site(NORM_SILU, pair, (norm, act))


# ---- residual blocks


def resnet_block(block: Any) -> Answer:
    """diffusers' ResnetBlock2D."""
    cls = known_class(block, "ResnetBlock2D", "diffusers")
    if cls is None:
        return None
    if reason := replaced(block) or changed(block, cls):
        return reason
    if not is_silu(block.nonlinearity):
        return f"its activation is {type(block.nonlinearity).__name__}, not SiLU"
    if reason := unlike_group_norm(block.norm1) or unlike_group_norm(block.norm2):
        return f"its norm is {reason}"
    if block.time_emb_proj is not None and block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its embedding enters by {block.time_embedding_norm}"
    norms = (block.norm1, block.norm2)
    return watched(*norms, block.nonlinearity) or Site(BLOCK, (replace(block, forwards.resnet_forward),), norms)


def res_block(block: Any) -> Answer:
    """guided-diffusion's ResBlock. Its forward puts gradient checkpointing around `_forward`, which is replaced; forks without
    checkpointing have a forward alone."""
    cls = known_class(block, "ResBlock")
    if cls is None or not isinstance(getattr(block, "in_layers", None), nn.Sequential):
        return None
    method = "_forward" if hasattr(cls, "_forward") else "forward"
    if reason := replaced(block, method) or changed(block, cls, method) or unlike_res_block(block):
        return reason
    if parameters_of(cls, method) != 2:
        return f"its {method} takes {parameters_of(cls, method)} arguments, not x and emb"
    (norm1, act1, _), (norm2, act2, *_) = block.in_layers, block.out_layers
    within = (block.in_layers, block.out_layers, norm1, norm2)
    return watched(*within, act1, act2) or Site(BLOCK, (replace(block, forwards.res_block_forward, method=method),), within)


def unlike_res_block(block: Any) -> str | None:
    """What a ResBlock has that guided-diffusion's has not, or the other way round."""
    parts = set(block._modules)  # named_children leaves out x_upd where it is h_upd
    if parts != RES_BLOCK_PARTS and parts != RES_BLOCK_PARTS - {"h_upd", "x_upd"}:
        return f"its parts are {', '.join(sorted(parts))}"
    for name, wanted in (("in_layers", 3), ("out_layers", 4)):
        layers = list(getattr(block, name))
        if len(layers) != wanted or unlike_group_norm(layers[0]) or not is_silu(layers[1]):
            return f"its {name} are {', '.join(type(layer).__name__ for layer in layers)}"
    if not isinstance(block.out_layers[2], nn.Dropout):
        return f"its out_layers have {type(block.out_layers[2]).__name__} where Dropout stands"
    unknown = {name for name in own_attributes(block) - RES_BLOCK_OPTIONS if getattr(block, name)}
    if unknown or not isinstance(getattr(block, "use_scale_shift_norm", None), bool):
        return f"its options are not guided-diffusion's: {', '.join(sorted(unknown)) or 'no use_scale_shift_norm'}"
    return None


# ---- attention


def diffusers_attention(attn: Any) -> Answer:
    cls = known_class(attn, "Attention", "diffusers")
    if cls is None:
        return None
    return (
        replaced(attn) or changed(attn, cls) or forwards.other_processor(attn)
        or Site(ATTENTION, (replace(attn, forwards.attention_forward),))
    )  # fmt: skip


def qkv_attention(attention: Any) -> Answer:
    """guided-diffusion's QKVAttention and QKVAttentionLegacy; improved-diffusion's has no heads: they lie in the batch."""
    cls = known_class(attention, "QKVAttention") or known_class(attention, "QKVAttentionLegacy")
    if cls is None:
        return None
    if reason := replaced(attention) or changed(attention, cls):
        return reason
    legacy = cls.__name__ == "QKVAttentionLegacy"
    own = own_attributes(attention)
    if not (own == {"n_heads"} or (not own and not legacy)) or list(attention.children()) or list(attention.parameters()):
        return f"its attributes are not guided-diffusion's: {', '.join(sorted(own)) or 'no n_heads'}"
    if parameters_of(cls, "forward") != 1:  # GLIDE's: it takes the text's keys and values too
        return f"its forward takes {parameters_of(cls, 'forward')} arguments, not qkv alone"
    return Site(ATTENTION, (replace(attention, forwards.qkv_legacy_forward if legacy else forwards.qkv_forward),))


def torch_attention(attention: Any) -> Answer:
    return "torch's module, which fuses by itself" if isinstance(attention, nn.MultiheadAttention) else None


# ---- what only the name speaks of


def called_like(module: Any, *words: str) -> bool:
    name = type(module).__name__
    return any(word in name for word in words) and "Processor" not in name


def unknown(module: Any) -> Answer:
    """A class called like an attention or a GroupNorm, with none inside that a rule could look at."""
    for what, words in (("an attention", ("Attention", "Attn")), ("a normalisation", ("GroupNorm",))):
        if called_like(module, *words) and not any(called_like(m, *words) for m in module.modules() if m is not module):
            return f"{what} unknown here"
    return None


RULES: tuple[Callable[[Any], Answer], ...] = (
    resnet_block, res_block, diffusers_attention, qkv_attention, torch_attention, output_norm, sequential, ada_group_norm,
    group_norm, unknown,
)  # fmt: skip
