"""The ADM U-Net (Dhariwal and Nichol 2021) under guided-diffusion's state-dict names, so its checkpoints load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..errors import FastdiffError
from .dropout import Dropout


@dataclass(frozen=True)
class UNetConfig:
    """The shape of a U-Net. `attention` holds downsampling factors (2 = half the input's resolution), as in ADM.

    Attention has heads of `head_channels`, or `num_heads` of them at every level where that is given (improved-diffusion).
    `num_classes` counts the embedding's rows; with `null_class` the last of them is the class "none" of label dropout.
    `guidance_range` (lowest, highest) gives the network the scale of guidance as an input: one call then does what
    classifier-free guidance does in two (Meng et al. 2023).
    `step_counts`, such as (1, 2, 4), gives it the number of calls that make a sample: one student for each of these (Zhou et al.
    2024, SFD-v).
    """

    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2)
    num_res_blocks: int = 2
    attention: tuple[int, ...] = (2, 4)
    head_channels: int = 64
    num_classes: int | None = None
    null_class: bool = False
    dropout: float = 0.0
    resblock_updown: bool = False
    use_scale_shift_norm: bool = True
    new_attention_order: bool = False
    learned_variance: bool = False
    num_heads: int | None = None
    guidance_range: tuple[float, float] | None = None
    step_counts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("in_channels", "out_channels", "model_channels", "num_res_blocks", "head_channels"):
            if not (isinstance(value := getattr(self, name), int) and value > 0):
                raise FastdiffError(f"{name} must be a positive whole number; given {value!r}")
        if self.num_heads is not None and not (isinstance(self.num_heads, int) and self.num_heads > 0):
            raise FastdiffError(f"num_heads must be a positive whole number or None; given {self.num_heads!r}")
        if self.guidance_range is not None:
            object.__setattr__(self, "guidance_range", _range(self.guidance_range))
        if self.step_counts is not None:
            object.__setattr__(self, "step_counts", check_counts(self.step_counts))
        if not self.channel_mult or any(mult <= 0 for mult in self.channel_mult):
            raise FastdiffError(f"channel_mult must hold one positive number a level; given {self.channel_mult}")
        for mult in self.channel_mult:
            if int(mult * self.model_channels) % 32:
                raise FastdiffError(
                    f"every level's channels must be a multiple of 32 (GroupNorm has 32 groups); given "
                    f"{self.model_channels} x {mult}"
                )

    @property
    def emb_channels(self) -> int:
        """Features of the embedded time, 4 per channel as in ADM."""
        return 4 * self.model_channels

    def asdict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def _range(given: Sequence[float]) -> tuple[float, float]:
    low, high = (float(v) for v in given) if len(given) == 2 else (1.0, 0.0)
    if not 0 <= low < high < math.inf:
        raise FastdiffError(f"guidance scales are a range such as 1,5, from at least 0 upwards; given {tuple(given)}")
    return low, high


def check_counts(given: Sequence[int]) -> tuple[int, ...]:
    """The numbers of calls that one student is for, in rising order.

    Raises:
        FastdiffError: none, one twice, or one below 1.
    """
    counts = tuple(sorted(given))
    if not counts or len(set(counts)) < len(counts) or not all(isinstance(n, int) and n >= 1 for n in counts):
        raise FastdiffError(f"step counts are different whole numbers of at least 1, such as 1,2,4; given {tuple(given)}")
    return counts


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features (B, dim), cosines first, of times (B,) (Vaswani et al. 2017; Ho et al. 2020)."""
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    args = t.float()[:, None] * freqs
    return F.pad(torch.cat([args.cos(), args.sin()], dim=-1), (0, dim % 2))


class Norm(nn.GroupNorm):
    """GroupNorm with 32 groups, optionally of x and an embedding, and followed by scale, shift and SiLU, in one operation."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = False, added: Tensor | None = None
    ) -> Tensor:
        return ops.group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, scale, shift, silu, added)


def zero_(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a block that starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class Upsample(nn.Module):
    def __init__(self, channels: int, conv: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if self.conv is not None else x


class Downsample(nn.Module):
    def __init__(self, channels: int, conv: bool = True) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the embedding is added, or scales and shifts the second normalisation."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, c: UNetConfig, resample: str = "") -> None:
        super().__init__()
        self.scale_shift = c.use_scale_shift_norm
        # Sequential only for its names (in_layers.0 is the norm, .2 the convolution): forward fuses norm and SiLU
        self.in_layers = nn.Sequential(Norm(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        emb_out = 2 * out_channels if self.scale_shift else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, emb_out))
        self.out_layers = nn.Sequential(
            Norm(out_channels),
            nn.SiLU(),
            Dropout(c.dropout),
            zero_(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)
        choices = {"up": Upsample(channels, False), "down": Downsample(channels, False)}
        self.resample = choices.get(resample, nn.Identity())

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[0](x, silu=True)
        h, x = self.resample(h), self.resample(x)
        h = self.in_layers[2](h)
        e = self.emb_layers(emb).to(h.dtype)
        norm, _, dropout, conv = self.out_layers
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = norm(h, scale, shift, silu=True)
        else:
            h = norm(h, silu=True, added=e[:, :, None, None])
        return self.skip_connection(x) + conv(dropout(h))


class AttentionBlock(nn.Module):
    """Self-attention over all positions; channels split into heads of `head_channels`, or into `num_heads` where given."""

    def __init__(self, channels: int, head_channels: int, new_order: bool, num_heads: int | None = None) -> None:
        super().__init__()
        if channels % (num_heads or head_channels):
            raise FastdiffError(
                f"channels with attention must be a multiple of head_channels, or of num_heads; given {channels}, "
                f"{num_heads or head_channels}"
            )
        self.heads = num_heads or channels // head_channels
        self.new_order = new_order  # ADM split q, k, v before the heads in later checkpoints, after them in the first
        self.norm = Norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_(nn.Conv1d(channels, channels, 1))
        self.identity_map = False  # every position keeps its own value: what perturbed-attention guidance leads away from

    def forward(self, x: Tensor) -> Tensor:
        b, c, *spatial = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        length = flat.shape[-1]
        if self.new_order:
            q, k, v = qkv.view(b, 3, self.heads, c // self.heads, length).unbind(1)
        else:
            q, k, v = qkv.view(b, self.heads, 3, c // self.heads, length).unbind(2)
        if not self.identity_map:
            v = ops.attention(q.transpose(-1, -2), k.transpose(-1, -2), v.transpose(-1, -2)).transpose(-1, -2)
        h = v.reshape(b, c, length)
        return (flat + self.proj_out(h)).view(b, c, *spatial)


class EmbedSequential(nn.Sequential):
    """A Sequential that hands the embedding to the blocks that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


def time_embedding(c: UNetConfig) -> nn.Sequential:
    return nn.Sequential(nn.Linear(c.model_channels, c.emb_channels), nn.SiLU(), nn.Linear(c.emb_channels, c.emb_channels))


def attention_of(channels: int, c: UNetConfig) -> AttentionBlock:
    return AttentionBlock(channels, c.head_channels, c.new_attention_order, c.num_heads)


def stage_of(ch: int, out: int, level: int, c: UNetConfig) -> EmbedSequential:
    """A residual block, and attention where the level has it."""
    stage = EmbedSequential(ResBlock(ch, c.emb_channels, out, c))
    if 2**level in c.attention:
        stage.append(attention_of(out, c))
    return stage


def encoder(c: UNetConfig) -> tuple[nn.ModuleList, EmbedSequential, list[int]]:
    """The way down and the middle; and the channels that each block hands to the way up, the last of them the middle's."""
    ch = int(c.channel_mult[0] * c.model_channels)
    skips = [ch]
    blocks = nn.ModuleList([EmbedSequential(nn.Conv2d(c.in_channels, ch, 3, padding=1))])
    for level, mult in enumerate(c.channel_mult):
        out = int(mult * c.model_channels)
        for _ in range(c.num_res_blocks):
            blocks.append(stage_of(ch, out, level, c))
            ch = out
            skips.append(ch)
        if level < len(c.channel_mult) - 1:
            down = ResBlock(ch, c.emb_channels, ch, c, "down") if c.resblock_updown else Downsample(ch)
            blocks.append(EmbedSequential(down))
            skips.append(ch)
    middle = EmbedSequential(ResBlock(ch, c.emb_channels, ch, c), attention_of(ch, c), ResBlock(ch, c.emb_channels, ch, c))
    return blocks, middle, skips


class UNet(nn.Module):
    """(x, t, class_labels) -> prediction of x's shape, or of 2x its channels with learned variance.

    Shapes: x (B, in_channels, H, W), H and W divisible by 2**(levels-1); t (B,) float; class_labels (B,) int64.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        self.checkpointing = False
        self.time_embed = time_embedding(c)
        self.label_emb = nn.Embedding(c.num_classes, c.emb_channels) if c.num_classes else None
        self.guidance_embed: nn.Sequential | None = None
        if c.guidance_range is not None:  # zero at its end: a student that has it begins as its teacher
            self.guidance_embed = time_embedding(c)
            zero_(self.guidance_embed[-1])
        self.steps_embed = zero_(nn.Embedding(len(c.step_counts), c.emb_channels)) if c.step_counts else None
        self.input_blocks, self.middle_block, skips = encoder(c)
        ch = skips[-1]
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(c.channel_mult))):
            out = int(mult * c.model_channels)
            for i in range(c.num_res_blocks + 1):
                stage = stage_of(ch + skips.pop(), out, level, c)
                ch = out
                if level and i == c.num_res_blocks:
                    stage.append(ResBlock(ch, c.emb_channels, ch, c, "up") if c.resblock_updown else Upsample(ch))
                self.output_blocks.append(stage)
        out_channels = c.out_channels * (2 if c.learned_variance else 1)
        self.out = nn.Sequential(Norm(ch), nn.SiLU(), zero_(nn.Conv2d(ch, out_channels, 3, padding=1)))

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no class", or None where the network has none."""
        c = self.config
        return c.num_classes - 1 if c.num_classes and c.null_class else None

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The guidance scales that the network takes as an input, or None where it has no such input."""
        return self.config.guidance_range

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The numbers of calls that the network takes as an input, `steps`; empty where it has no such input."""
        return self.config.step_counts or ()

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, guidance: Tensor | float | None = None,
        steps: int | None = None,
    ) -> Tensor:  # fmt: skip
        multiple = 2 ** (len(self.config.channel_mult) - 1)
        if x.shape[-1] % multiple or x.shape[-2] % multiple:
            raise FastdiffError(
                f"{len(self.config.channel_mult)} levels need a height and width divisible by {multiple}; given "
                f"{tuple(x.shape[-2:])}"
            )
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if self.label_emb is not None:
            if class_labels is None:
                raise FastdiffError("this network is class-conditional: bind class_labels=... (one integer a sample)")
            emb = emb + self.label_emb(class_labels).to(emb.dtype)
        if guidance is not None or self.guidance_embed is not None:
            emb = emb + self._embed_guidance(1.0 if guidance is None else guidance, t).to(emb.dtype)
        if steps is not None or self.steps_embed is not None:
            emb = emb + self._embed_steps(steps, t).to(emb.dtype)
        h, skips = x, []
        for block in self.input_blocks:
            h = self._run(block, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for block in self.output_blocks:
            h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb)
        return self.out[2](self.out[0](h, silu=True))

    def _embed_guidance(self, guidance: Tensor | float, t: Tensor) -> Tensor:
        """The embedding (B, *) of one scale, or of one a sample; none bound means 1, no guidance."""
        if self.guidance_embed is None or self.config.guidance_range is None:
            raise FastdiffError("this network has no guidance input: use fd.guide.cfg")
        low, high = self.config.guidance_range
        if not isinstance(guidance, Tensor):
            if not low <= guidance <= high:
                raise FastdiffError(f"this student knows guidance scales {low:g} to {high:g}; given {guidance:g}")
            guidance = t.new_full(t.shape, guidance)
        # the range becomes 0 to 10: features from smooth over the whole range to a period of two thirds of it
        features = timestep_embedding((guidance - low) * (10 / (high - low)), self.config.model_channels)
        return self.guidance_embed(features.to(next(self.guidance_embed.parameters()).dtype))

    def _embed_steps(self, steps: int | None, t: Tensor) -> Tensor:
        """The embedding (1, *) of a number of calls; none bound means the largest."""
        if self.steps_embed is None:
            raise FastdiffError("this network takes no number of calls: leave out steps=")
        steps = self.step_counts[-1] if steps is None else steps
        if steps not in self.step_counts:
            raise FastdiffError(f"this network knows {', '.join(map(str, self.step_counts))} calls; given steps={steps}")
        return self.steps_embed(t.new_full((1,), self.step_counts.index(steps), dtype=torch.long))

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, emb, use_reentrant=False)
        return block(h, emb)


def count_parameters(modules: Sequence[nn.Module]) -> int:
    """The number of trainable and frozen parameters together."""
    return sum(p.numel() for m in modules for p in m.parameters())
