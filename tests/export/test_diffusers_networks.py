"""Networks of diffusers, small and random: a conditioned U-Net on latents guidance and a decoder behind it; an image U-Net."""

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff as fd

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
TABLE = fd.schedule.vp_from_alphas_cumprod(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
pytestmark = pytest.mark.slow  # a network of diffusers takes a quarter of a minute to trace
SMALL = {"layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8}


class Decode(nn.Module):
    """What a pipeline does after its last step."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        return self.vae.decode(z / self.vae.config.scaling_factor).sample


def test_latents_with_a_prompt_and_a_decoder(tmp_path):
    from fastdiff.export.folder import Wish, export
    from fastdiff.export.runtime import session

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, cross_attention_dim=12, attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **SMALL,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **SMALL
    ).eval()
    den = fd.Denoiser(unet, TABLE, "eps", shape=(4, 8, 8)).bind(encoder_hidden_states=torch.zeros(1, 5, 12))
    guided = fd.guide.cfg(den, 3.0, negative={"encoder_hidden_states": torch.zeros(1, 5, 12)})
    manifest = export(guided, fd.plan("dpmpp-2m", den, 4), tmp_path / "e", Wish(decoder=Decode(vae)))
    assert all(f["max"] < 1e-4 and f["images"] < 1e-4 for f in manifest["parity"]["sampler"])
    inputs, outputs = ({v["name"]: v["shape"] for v in manifest["sampler"][key]} for key in ("inputs", "outputs"))
    assert inputs["negative_encoder_hidden_states"] == inputs["encoder_hidden_states"] == ["batch", 5, 12]
    assert outputs == {"x": ["batch", 4, 8, 8], "images": ["batch", 3, 16, 16]}
    prompts = torch.randn(2, 2, 5, 12)
    run, _ = session(tmp_path / "e" / "sampler.onnx", "cpu", 1)
    noise = fd.noise.from_seeds([1, 2])(0, (2, 4, 8, 8), torch.device("cpu"))
    feed = {"encoder_hidden_states": prompts[0].numpy(), "negative_encoder_hidden_states": prompts[1].numpy(),
            "noise": noise.numpy(), "guidance_scale": np.array(2.0, np.float32)}  # fmt: skip
    bound = fd.guide.cfg(den.bind(encoder_hidden_states=prompts[0]), 2.0, negative={"encoder_hidden_states": prompts[1]})
    x = fd.sample(bound, fd.plan("dpmpp-2m", den, 4), noise=noise)
    with torch.no_grad():
        want = den.images(Decode(vae)(x)).numpy()
    np.testing.assert_allclose(run.run(["images"], feed)[0], want, atol=1e-4)


def test_an_image_network(tmp_path):
    from fastdiff.export.folder import export

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **SMALL,
    ).eval()  # fmt: skip
    den = fd.Denoiser(unet, TABLE, "eps", shape=(3, 8, 8))
    manifest = export(den, fd.plan("unipc-2", den, 4), tmp_path / "e")
    assert all(f["max"] < 1e-4 for part in ("sampler", "network") for f in manifest["parity"][part])
