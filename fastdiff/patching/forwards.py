"""What a patched module computes instead of its class's forward.

Each function takes the module, then what the forward that it replaces takes. functools.partial(function, module) is then the
forward of that one instance: it can be pickled, as these functions stand at module level, and a copy of the module holds one of
the copy.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .. import ops

PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")  # diffusers' plain two: by hand, and by torch's attention


def function_of(forward: Any) -> Any:
    """Which function of this file a forward is a partial of; None of any other forward."""
    return forward.func if isinstance(forward, partial) and forward.func.__module__ == __name__ else None


def package(thing: Any) -> str:
    """The package that defines a thing's class: "torch", "diffusers", ..., without importing it."""
    return type(thing).__module__.split(".")[0]


def fused(norm: Any, x: Tensor, silu: bool, residual: Tensor | None = None, **affine: Tensor | None) -> Tensor:
    """GroupNorm of x + residual by one op, with SiLU, scale and shift where asked."""
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, residual=residual, **affine)


# ---- torch's modules


def norm_forward(norm: Any, input: Tensor) -> Tensor:
    return fused(norm, input, silu=False)


def norm_silu_forward(norm: Any, input: Tensor) -> Tensor:
    return fused(norm, input, silu=True)


def identity_forward(module: nn.Module, input: Tensor) -> Tensor:
    return input


def sequential_forward(layers: nn.Sequential, norms: tuple[int, ...], input: Tensor) -> Tensor:
    """nn.Sequential; the SiLU behind each of `norms` goes into its op. Who takes the layers out one by one (guided-diffusion
    scales and shifts between them) finds each as it was."""
    x = input
    for i, layer in enumerate(layers):
        if i in norms:
            x = fused(layer, x, silu=True)
        elif i - 1 not in norms:
            x = layer(x)
    return x


# ---- diffusers


def ada_norm_forward(norm: Any, x: Tensor, emb: Tensor) -> Tensor:
    """diffusers' AdaGroupNorm: a GroupNorm without weights, scaled and shifted by the embedding."""
    scale, shift = norm.linear(emb if norm.act is None else norm.act(emb)).chunk(2, dim=1)
    return ops.group_norm_silu(x, norm.num_groups, None, None, norm.eps, scale, shift, silu=False)


def resnet_forward(block: Any, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
    """diffusers' ResnetBlock2D with its norms, activations and embedding in two ops."""
    if args or kwargs or (temb is None) != (block.time_emb_proj is None):  # rare forms are the class's own matter
        return type(block).forward(block, input_tensor, temb, *args, **kwargs)
    x, h = input_tensor, fused(block.norm1, input_tensor, silu=True)
    if (resample := block.upsample or block.downsample) is not None:
        if block.upsample is not None and len(h) >= 64:
            x, h = x.contiguous(), h.contiguous()  # torch's nearest upsampling fails on large channels-last batches
        x, h = resample(x), resample(h)
    h = block.conv1(h)
    scale = shift = added = None
    if temb is not None:
        e = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
        if block.time_embedding_norm == "scale_shift":
            scale, shift = e.chunk(2, dim=1)
        else:
            added = e[:, :, None, None]
    h = block.conv2(block.dropout(fused(block.norm2, h, silu=True, residual=added, scale=scale, shift=shift)))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x.contiguous() if block.training else x)
    return (x + h) / block.output_scale_factor


def other_processor(attn: Any) -> str | None:
    """Why diffusers' Attention computes something else than plain attention now; None where it does not."""
    processor = type(attn.processor)
    if package(attn.processor) != "diffusers" or processor.__name__ not in PROCESSORS:
        return f"its processor is {processor.__name__}"
    if attn.spatial_norm is not None:
        return "it has a spatial norm"
    if processor.__name__ == "AttnProcessor" and (attn.upcast_attention or attn.upcast_softmax):
        return "it computes scores or softmax in float32 (upcast)"
    return None


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * d) as (B, heads, S, d), a view."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def attention_forward(
    attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """diffusers' Attention through `ops.attention`.

    The forward is replaced, not the processor, which diffusers compares with its own classes. So it looks at every call what
    the processor is: one that was set after the patch (IP-Adapter, sliced, ...) is called, as it is with a mask or more options.
    """
    if attention_mask is not None or any(name != "temb" for name in options) or other_processor(attn) is not None:
        return type(attn).forward(attn, hidden_states, encoder_hidden_states, attention_mask, **options)
    by_hand = type(attn.processor).__name__ == "AttnProcessor"  # it scales by attn.scale, and leaves out norm_q and norm_k
    image = hidden_states.ndim == 4
    x = hidden_states.flatten(2).transpose(1, 2) if image else hidden_states
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    context = x if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        context = attn.norm_encoder_hidden_states(context)
    q, k, v = (heads_of(part, attn.heads) for part in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
    q = q if by_hand or attn.norm_q is None else attn.norm_q(q)
    k = k if by_hand or attn.norm_k is None else attn.norm_k(k)
    out = ops.attention(q, k, v, scale=float(attn.scale) if by_hand else None).transpose(1, 2).flatten(2).to(q.dtype)
    out = attn.to_out[1](attn.to_out[0](out))
    if image:
        out = out.transpose(1, 2).reshape(hidden_states.shape)
    if attn.residual_connection:
        out = out + hidden_states
    return out / attn.rescale_output_factor


# ---- guided-diffusion, and what took its classes over: improved-diffusion before it, latent-diffusion after it


def res_block_forward(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    """ResBlock with its norms, activations and embedding in two ops; gradient checkpointing stays around it."""
    norm, _, conv = block.in_layers
    h = fused(norm, x, silu=True)
    if getattr(block, "updown", False):
        h, x = block.h_upd(h), block.x_upd(x)
    h = conv(h)
    e = block.emb_layers(emb).type(h.dtype)
    scale = shift = added = None
    if block.use_scale_shift_norm:
        scale, shift = e.chunk(2, dim=1)
    else:
        added = e.reshape(*e.shape, *(1,) * (h.ndim - 2))
    norm, _, dropout, conv = block.out_layers
    return block.skip_connection(x) + conv(dropout(fused(norm, h, silu=True, residual=added, scale=scale, shift=shift)))


def qkv_forward(attention: Any, qkv: Tensor) -> Tensor:
    """QKVAttention: (N, 3 H C, T), q, k and v before the heads, to (N, H C, T)."""
    return attend(qkv.reshape(len(qkv), 3, getattr(attention, "n_heads", 1), -1, qkv.shape[-1]).transpose(1, 2))


def qkv_legacy_forward(attention: Any, qkv: Tensor) -> Tensor:
    """QKVAttentionLegacy: (N, H 3 C, T), the heads before q, k and v, to (N, H C, T)."""
    return attend(qkv.reshape(len(qkv), attention.n_heads, 3, -1, qkv.shape[-1]))


def attend(qkv: Tensor) -> Tensor:
    """Attention of (N, H, 3, C, T), read in place."""
    q, k, v = qkv.transpose(-1, -2).unbind(2)
    out = ops.attention(q, k, v).transpose(-1, -2)
    return out.reshape(len(qkv), -1, qkv.shape[-1])
