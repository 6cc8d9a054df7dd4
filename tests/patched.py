"""Small networks of diffusers for the tests of fd.patch, and what they ask of any network."""

import diffusers
import torch

from fastdiff import ops

BLOCKS = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def unconditional(**options):
    net = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, sample_size=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **BLOCKS, **options,
    )  # fmt: skip
    return net, (noise(2, 3, 8, 8), torch.tensor([1, 500]))


def conditional():
    net = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=4, **BLOCKS,
    )  # fmt: skip
    return net, (noise(2, 4, 8, 8), torch.tensor([1, 500]), noise(2, 5, 16))


def autoencoder():
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS
    )
    return net, (noise(1, 3, 16, 16),)


NETWORKS = {
    "unconditional": unconditional,
    "scale-shift, resampling in the blocks": lambda: unconditional(
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet"
    ),
    "conditional": conditional,
    "autoencoder": autoencoder,
}


def called(monkeypatch):
    """How often an output went through the ops, and how often beside them."""
    seen = {"group_norm_silu": 0, "attention": 0}
    for name in seen:
        whole = getattr(ops, name)

        def counted(*args, name=name, whole=whole, **options):
            seen[name] += 1
            return whole(*args, **options)

        monkeypatch.setattr(ops, name, counted)
    return seen


def clean(net):
    """Whether nothing of a patch is left."""
    return not any({"forward", "_forward"} & set(vars(m)) for m in net.modules())
