"""Real diffusers pipelines with a few thousand random parameters, built from config; prompts are given as embeddings."""

import diffusers
import torch

diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
TOKENS, WIDTH = 5, 16


def seeded(make):
    torch.manual_seed(0)
    return make().eval().requires_grad_(False)


def unet(channels=4, **more):
    return seeded(lambda: diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, **more,
    ))  # fmt: skip


def vae(channels=4, **more):
    return seeded(lambda: diffusers.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, sample_size=16, **more,
    ))  # fmt: skip


SD_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def sd_scheduler():
    """What Stable Diffusion 1.5 ships with."""
    return diffusers.PNDMScheduler(skip_prk_steps=True, **SD_SCHEDULER)


def sd(cls=diffusers.StableDiffusionPipeline, scheduler=None):
    pipe = cls(vae=vae(), text_encoder=None, tokenizer=None, unet=unet(), scheduler=scheduler or sd_scheduler(),
               safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip
    return quiet(pipe)


def ddpm():
    net = seeded(lambda: diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    ))  # fmt: skip
    return quiet(diffusers.DDPMPipeline(unet=net, scheduler=diffusers.DDPMScheduler()))


def sdxl():
    net = unet(addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=WIDTH + 6 * 4)
    return quiet(diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=net,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **SD_SCHEDULER),
    ))  # fmt: skip


def sd3():
    net = seeded(lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, caption_projection_dim=16, pooled_projection_dim=WIDTH, pos_embed_max_size=8,
    ))  # fmt: skip
    return quiet(diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(shift_factor=0.06),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    ))  # fmt: skip


def flux():
    net = seeded(lambda: diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=False, axes_dims_rope=(4, 4, 8),
    ))  # fmt: skip
    return quiet(diffusers.FluxPipeline(
        transformer=net, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.06), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    ))  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeddings(pipe, batch=2):
    """Prompts for a pipeline, each its own, the same whatever the batch."""
    def rows(key, *shape):
        return torch.cat([torch.randn(1, *shape, generator=torch.Generator().manual_seed(100 * key + i)) for i in range(batch)])

    name = type(pipe).__name__
    if name == "DDPMPipeline":
        return {"batch_size": batch}
    given = {"prompt_embeds": rows(1, TOKENS, WIDTH)}
    if name != "FluxPipeline":
        given["negative_prompt_embeds"] = rows(2, TOKENS, WIDTH)
    if "XL" in name or "3" in name or name == "FluxPipeline":
        given["pooled_prompt_embeds"] = rows(3, WIDTH)
        if name != "FluxPipeline":
            given["negative_pooled_prompt_embeds"] = rows(4, WIDTH)
    if name == "StableDiffusionInpaintPipeline" or "Img2Img" in name:
        given["image"] = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    if name == "StableDiffusionInpaintPipeline":
        mask = torch.zeros(batch, 1, 16, 16)
        mask[..., 8:] = 1
        given["mask_image"] = mask
    if "Img2Img" not in name:
        given |= {"height": 16, "width": 16}
    return given


def generators(batch):
    return [torch.Generator().manual_seed(i) for i in range(batch)]


def images(pipe, steps, batch=2, generator=None, **more):
    """(B, H, W, 3) images in [0, 1] from one generator a sample."""
    given = embeddings(pipe, batch)
    kind = "np" if type(pipe).__name__ == "DDPMPipeline" else "pt"
    out = pipe(num_inference_steps=steps, generator=generator or generators(batch), output_type=kind, **given, **more).images
    return torch.as_tensor(out)
