"""The U-Nets of EDM (Karras et al. 2022): DDPM++ and NCSN++ (Song et al. 2021) and ADM in EDM's form, under EDM's names.

Nothing is configured: names and shapes of the weights say which blocks there are, so the network is built from them.
Layouts follow the papers' appendices (Song et al. 2021, H; Dhariwal and Nichol 2021, A; Karras et al. 2022, F.1).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import FastdiffError
from .labelled import Labelled

Shapes = Mapping[str, tuple[int, ...]]
ENCODER = ("conv", "down", "aux_down", "aux_skip", "aux_residual", "block")
DECODER = ("in", "up", "block", "aux_up", "aux_norm", "aux_conv")
HEAD_CHANNELS = 64  # of ADM's form; DDPM++ and NCSN++ have one head


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def parameter(shape: tuple[int, ...] | None) -> nn.Parameter | None:
    return None if shape is None else nn.Parameter(torch.empty(shape))


class Linear(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(shapes["weight"])), parameter(shapes.get("bias"))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    """A convolution, a resampling by `resample_filter`, or both; fused: the filter comes last and pads once."""

    resample_filter: Tensor

    def __init__(self, shapes: Shapes, resample: str = "", fused: bool = False) -> None:
        super().__init__()
        self.resample, self.fused = resample, fused
        self.weight, self.bias = parameter(shapes.get("weight")), parameter(shapes.get("bias"))
        if "resample_filter" in shapes:
            self.register_buffer("resample_filter", torch.empty(shapes["resample_filter"]))

    def _resampled(self, x: Tensor, padding: int) -> Tensor:
        f = self.resample_filter.to(x.dtype).tile(x.shape[1], 1, 1, 1)
        if self.resample == "up":
            return F.conv_transpose2d(x, 4 * f, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, f, groups=x.shape[1], stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        edge = (self.resample_filter.shape[-1] - 1) // 2 if self.resample else 0
        if self.fused and self.weight is not None:
            x = self._resampled(F.conv2d(x, self.weight, padding=pad + edge), 0)
            return x if self.bias is None else x + self.bias[:, None, None]
        if self.resample:
            x = self._resampled(x, edge)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=pad)


class Norm(nn.Module):
    """GroupNorm with at most 32 groups of at least 4 channels; in the same operation a sum before it, scale, shift and SiLU."""

    def __init__(self, shapes: Shapes, eps: float) -> None:
        super().__init__()
        self.eps, self.groups = eps, max(1, min(32, shapes["weight"][0] // 4))
        self.weight, self.bias = parameter(shapes["weight"]), parameter(shapes["bias"])

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return ops.group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, scale, shift, silu, residual)


class Block(nn.Module):
    """A residual block with resampling, the embedding added or as scale and shift, and attention where it has a `qkv`."""

    def __init__(self, shapes: Shapes, song: bool, resample: str) -> None:
        super().__init__()
        eps = 1e-6 if song else 1e-5
        self.scale = math.sqrt(0.5) if song else 1.0  # Song et al. 2021 halve the variance of every sum
        self.norm0 = Norm(below(shapes, "norm0."), eps)
        self.conv0 = Conv(below(shapes, "conv0."), resample)
        self.affine = Linear(below(shapes, "affine."))
        self.norm1 = Norm(below(shapes, "norm1."), eps)
        self.conv1 = Conv(below(shapes, "conv1."))
        skip = below(shapes, "skip.")
        self.skip = Conv(skip, resample) if skip else nn.Identity()
        self.in_channels, channels = shapes["conv0.weight"][1], shapes["conv0.weight"][0]
        self.heads = (1 if song else channels // HEAD_CHANNELS) if "qkv.weight" in shapes else 0
        self.adaptive = shapes["affine.weight"][0] == 2 * channels
        if "qkv.weight" in shapes:
            self.norm2 = Norm(below(shapes, "norm2."), eps)
            self.qkv, self.proj = Conv(below(shapes, "qkv.")), Conv(below(shapes, "proj."))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(self.norm0(x))
        e = self.affine(emb)
        h = self.norm1(h, *e.chunk(2, dim=1)) if self.adaptive else self.norm1(h, residual=e[:, :, None, None])
        h = (self.conv1(h) + self.skip(x)) * self.scale
        if not self.heads:
            return h
        b, c, height, width = h.shape
        qkv = self.qkv(self.norm2(h, silu=False)).view(b, self.heads, c // self.heads, 3, height * width).unbind(3)
        a = ops.attention(*(part.transpose(-1, -2) for part in qkv)).transpose(-1, -2).reshape(h.shape)
        return (self.proj(a) + h) * self.scale


class EDMUNet(nn.Module):
    """(x, c_noise, class_labels) -> F; labels (B,) int64, None = no class (a vector of zeros)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.song = "out_conv.weight" not in shapes
        first = shapes["map_layer0.weight"]
        self.noise_channels = first[1]
        self.map_layer0, self.map_layer1 = (Linear(below(shapes, f"map_layer{i}.")) for i in (0, 1))
        self.map_label = Linear(below(shapes, "map_label.")) if "map_label.weight" in shapes else None
        if "map_augment.weight" in shapes:  # of training with augmentation; sampling leaves it unused
            self.map_augment = Linear(below(shapes, "map_augment."))
        if "map_noise.freqs" in shapes:
            self.map_noise = nn.Module()
            self.map_noise.register_buffer("freqs", torch.empty(shapes["map_noise.freqs"]))
        self.enc, self.dec = (self._half(below(shapes, f"{half}."), kinds, sign)
                              for half, kinds, sign in (("enc", ENCODER, -1), ("dec", DECODER, 1)))  # fmt: skip
        if not self.song:
            self.out_norm, self.out_conv = Norm(below(shapes, "out_norm."), 1e-5), Conv(below(shapes, "out_conv."))
        self.side = max(int(name.split("x")[0]) for name in self.enc)
        classes = shapes["map_label.weight"][1] if self.map_label is not None else None
        self.config = Labelled(classes)

    def _half(self, shapes: Shapes, kinds: tuple[str, ...], sign: int) -> nn.ModuleDict:
        """The blocks of one half in the order they run: by resolution, then kind, then number."""

        def place(name: str) -> tuple[int, int, int]:
            match = re.fullmatch(rf"(\d+)x\1_({'|'.join(kinds)})(\d*)", name)
            if match is None:
                raise FastdiffError(f"an EDM network has no block called {name[:60]!r}")
            return sign * int(match[1]), kinds.index(match[2]), int(match[3] or 0)

        out = nn.ModuleDict()
        for name in sorted({key.split(".")[0] for key in shapes}, key=place):
            own, kind = below(shapes, f"{name}."), name.split("_", 1)[1]
            resample = kind if kind in ("up", "down") else ""
            if "norm0.weight" in own:
                out[name] = Block(own, self.song, resample)
            elif kind == "aux_norm":
                out[name] = Norm(own, 1e-6)
            else:
                aux = {"aux_up": "up", "aux_down": "down", "aux_residual": "down"}.get(kind, "")
                out[name] = Conv(own, aux, fused=kind == "aux_residual")
        return out

    def _embedding(self, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """Features of noise level and class. DDPM++'s frequencies reach 1/10,000; NCSN++'s are drawn; ADM's stop one short."""
        if hasattr(self, "map_noise"):
            freqs = self.map_noise.freqs
            assert isinstance(freqs, Tensor)
            args = t[:, None] * (2 * math.pi * freqs)
        else:
            half = self.noise_channels // 2
            args = t[:, None] * 10_000.0 ** (-torch.arange(half, device=t.device) / (half - int(self.song)))
        parts = (args.sin(), args.cos()) if self.song else (args.cos(), args.sin())
        emb = torch.cat(parts, dim=1)
        label = None
        if self.map_label is not None and class_labels is not None:
            classes = self.map_label.weight.shape[1]
            hot = F.one_hot(class_labels, classes).to(emb.dtype)
            label = self.map_label(hot * math.sqrt(classes) if self.song else hot)
        elif self.map_label is not None and self.song and self.map_label.bias is not None:
            label = self.map_label.bias
        if self.song:
            emb = emb if label is None else emb + label
            return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        return F.silu(emb if label is None else emb + label)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = self._embedding(t.to(x.dtype), class_labels)
        skips: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if "aux_down" in name:
                aux = block(aux)
            elif "aux_skip" in name:
                x = skips[-1] = x + block(aux)
            elif "aux_residual" in name:
                x = skips[-1] = aux = (x + block(aux)) * math.sqrt(0.5)
            else:
                x = block(x, emb) if isinstance(block, Block) else block(x)
                skips.append(x)
        return self._decode(x, emb, skips)

    def _decode(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        out: Tensor | None = None
        normed = x
        for name, block in self.dec.items():
            if isinstance(block, Block):
                x = block(x if x.shape[1] == block.in_channels else torch.cat([x, skips.pop()], dim=1), emb)
            elif "aux_up" in name:
                out = block(out)
            elif "aux_norm" in name:
                normed = block(x)
            else:
                found = block(normed)
                out = found if out is None else out + found
        return self.out_conv(self.out_norm(x)) if out is None else out
