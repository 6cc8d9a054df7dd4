"""Tiny instances of diffusers' own classes, every weight drawn: what our loader is held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

VPS = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip
TEXT_UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 8,
}  # fmt: skip
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 36,
      "use_linear_projection": True}  # fmt: skip
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
DIT = {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 5}
PIXART = {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "cross_attention_dim": 16,
          "caption_channels": 12}  # fmt: skip
SD3 = {**HEADS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
       "caption_projection_dim": 16, "pooled_projection_dim": 12, "pos_embed_max_size": 8}  # fmt: skip
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)}  # fmt: skip
KL = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
      "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}  # fmt: skip
VQ = {**{k: v for k, v in KL.items() if k != "sample_size"}, "latent_channels": 3, "num_vq_embeddings": 16}


def make(name: str, **config: Any) -> Any:
    """A model of diffusers with every weight drawn, the zeros it would start from among them."""
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval().requires_grad_(False)


def save(folder: Path, model: Any, scheduler: Any, **how: Any) -> Path:
    """A model's folder with its scheduler's configuration in it."""
    model.save_pretrained(folder, **how)
    scheduler.save_pretrained(folder)
    return folder


def unet(**changes: Any) -> Any:
    return make("UNet2DModel", **{**UNET, **changes})


def ddpm(folder: Path, model: Any = None, **scheduler: Any) -> Path:
    """A DDPM pipeline's folder."""
    pipe = diffusers.DDPMPipeline(model or unet(), diffusers.DDPMScheduler(**scheduler))
    pipe.save_pretrained(folder)
    return folder


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def clip(kind: str = "CLIPTextModel") -> tuple[Any, Any]:
    """A text encoder of a class of CLIP's, 16 features wide, and a tokenizer that knows letters and a few words."""
    import transformers

    tokens = [*LETTERS, *(f"{c}</w>" for c in LETTERS), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocabulary, [("c", "a"), ("ca", "t</w>")], model_max_length=8)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=8,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1, pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    torch.manual_seed(len(kind))
    return getattr(transformers, kind)(config).eval(), tokenizer


def t5(width: int = 16) -> tuple[Any, Any]:
    """A text encoder of T5's class and a tokenizer that knows letters."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((c, -3.0) for c in LETTERS)]
    tokenizer = T5Tokenizer(pieces, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    return T5EncoderModel(config).eval(), tokenizer
