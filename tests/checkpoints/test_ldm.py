"""Stable Diffusion files: our key maps and configurations against diffusers' own conversion of single files."""

import itertools
import json

import hub
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import save_file

import fastdiff as fd
from fastdiff.checkpoints import ldm
from fastdiff.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

BASE = {**hub.TEXT_UNET, "block_out_channels": (32, 64), "norm_num_groups": 32}
KINDS = {
    "v1": {**BASE, "attention_head_dim": 8},
    "v2": {**BASE, "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True},
    "sdxl": {
        **BASE, "block_out_channels": (64, 128), "attention_head_dim": (1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1548,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
    },
}  # fmt: skip
KL = {**hub.KL, "block_out_channels": (32, 64), "norm_num_groups": 32, "layers_per_block": 2}
TEXT = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def candidates(state, places, stems):
    """Every name that a CompVis module of this size could have; the peer's map says which are names of theirs."""
    tails = {name.split(".", 4)[-1] for name in state} | {name.split(".", 3)[-1] for name in state}
    yield from (f"{stem}.{end}" for stem in stems for end in ("weight", "bias"))
    yield from (f"{place}.{tail}" for place in places for tail in tails | {f"{s}.{e}" for s in STEMS for e in ("weight", "bias")})


STEMS = (*ldm.RESNET, "op", "conv", "conv1", "conv2", "norm1", "norm2", "nin_shortcut", *ldm.ATTENTION)
BLOCKS = [f"{side}_blocks.{i}.{j}" for side in ("input", "output") for i in range(6) for j in range(3)]
PARTS = [f"{half}.mid.{name}" for half in ("encoder", "decoder") for name in ("block_1", "block_2", "attn_1")]
PARTS += [f"{side}.{i}.block.{j}" for side in ("encoder.down", "decoder.up") for i, j in itertools.product(range(2), range(3))]
PARTS += [f"{side}.{i}.{word}sample" for side, word in (("encoder.down", "down"), ("decoder.up", "up")) for i in range(2)]
VAE_STEMS = [f"{half}.{name}" for half in ("encoder", "decoder") for name in ("conv_in", "norm_out", "conv_out")]


def compvis_unet(model):
    state, found = model.state_dict(), {}
    for name in candidates(state, [*BLOCKS, *(f"middle_block.{j}" for j in range(3))], ldm.FIXED):
        parts, place = name.split("."), ldm.unet_name(name, 1)
        if "resnets" in place and parts[-2] in ldm.RESNET.values():
            continue  # diffusers' own name, which is left as it is
        if parts[0] == "output_blocks" and parts[3] == "conv":  # the last of its block: .1 without attention there, .2 with it
            attended = f"up_blocks.{int(parts[1]) // 2}.attentions.0.norm.weight" in state
            place = place if parts[2] == ("2" if attended else "1") else ""
        if place in state:
            found[ldm.UNET + name] = state[place]
    assert len(found) == len(state)
    return found


def compvis_vae(model):
    state = model.state_dict()
    found = {}
    for name in candidates(state, PARTS, [*VAE_STEMS, "quant_conv", "post_quant_conv"]):
        own = any(word in name for word in ("conv_shortcut", "group_norm", ".to_"))  # diffusers' names stay as they are
        if not own and (value := state.get(ldm.vae_name(name, 2))) is not None:
            found[ldm.VAE + name] = value[:, :, None, None] if ".attn_1." in name and value.ndim == 2 else value
    assert len(found) == len(state)
    return found


@pytest.fixture(scope="module")
def vae():
    return hub.make("AutoencoderKL", **KL)


def written(folder, kind, vae, suffix=".safetensors", **said):
    """A model of diffusers and the file that CompVis' code would have written of it."""
    model = hub.make("UNet2DConditionModel", **KINDS[kind])
    tensors = {**compvis_unet(model), **compvis_vae(vae), "cond_stage_model.transformer.x": torch.zeros(1)}
    path = folder / f"sd{suffix}"
    if suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    if said:
        path.with_suffix(".json").write_text(json.dumps(said))
    return model, path


@pytest.mark.parametrize("kind", KINDS)
def test_names_are_those_of_diffusers_conversion(kind, vae):
    """The peer turns our CompVis file back into the very state dict: so the names are CompVis', and our map is theirs."""
    model = hub.make("UNet2DConditionModel", **KINDS[kind])
    file = compvis_unet(model)
    theirs = convert_ldm_unet_checkpoint(dict(file), dict(model.config))
    mine = {ldm.unet_name(name.removeprefix(ldm.UNET), 1): value for name, value in file.items()}
    assert set(theirs) == set(mine) == set(model.state_dict())
    assert all(torch.equal(theirs[name], mine[name]) for name in mine)
    file = compvis_vae(vae)
    theirs = convert_ldm_vae_checkpoint(dict(file), dict(vae.config))
    assert set(theirs) == set(vae.state_dict())
    assert all(torch.equal(theirs[name], value) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_predicts_and_decodes_what_the_library_does(kind, vae, tmp_path):
    model, path = written(tmp_path, kind, vae, **({"prediction": "v"} if kind == "v2" else {}))
    den = fd.load(path, shape=(4, 8, 8))
    added = {"text_embeds": torch.ones(2, 12), "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    cond = {"encoder_hidden_states": TEXT, **({"added_cond_kwargs": added} if kind == "sdxl" else {})}
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    f = model(x, torch.tensor([300, 300]), **cond).sample
    found = den.network(x, torch.full((2,), 300.0), **cond)
    assert (found - f).abs().max() <= 1e-5 * f.abs().max()
    assert den.prediction == ("v" if kind == "v2" else "eps")
    factor = 0.13025 if kind == "sdxl" else 0.18215
    wanted = (vae.decode(x / factor).sample / 2 + 0.5).clamp(0, 1)
    assert (den.images(x) - wanted).abs().max() < 1e-5
    assert fd.load(path).shape == (4, *{"v1": (64, 64), "v2": (96, 96), "sdxl": (128, 128)}[kind])


def test_the_schedule_is_diffusers_and_a_ckpt_is_read(vae, tmp_path):
    import diffusers

    _, path = written(tmp_path, "v1", vae, ".ckpt")
    den = fd.load(path)
    theirs = diffusers.DDIMScheduler(**hub.VPS).alphas_cumprod.double()
    assert (den.schedule.alpha(torch.arange(1000.0)) ** 2 - theirs).abs().max() < 1e-6


def test_what_is_missing_or_too_much_is_said(vae, tmp_path):
    _, path = written(tmp_path, "v2", vae)
    with pytest.raises(CheckpointError, match="Stable Diffusion 2"):
        fd.load(path)
    with pytest.raises(CheckpointError, match="predicton"):
        fd.load(path, config={"predicton": "v"})
    with pytest.raises(fd.errors.FastdiffError, match="velocity"):
        fd.load(path, config={"prediction": "velocity"})
    _, path = written(tmp_path, "v1", vae, ".ckpt")
    state = torch.load(path)["state_dict"]
    for change, words in [
        ({"control_model.x": torch.zeros(1)}, r"control_model\.x"),
        ({ldm.UNET + "extra.weight": torch.zeros(1)}, r"1 unexpected \(extra\.weight\)"),
        ({ldm.UNET + "out.2.bias": None}, r"1 missing \(conv_out\.bias\)"),
        ({ldm.UNET + "out.2.bias": torch.zeros(3)}, "misshapen"),
        ({ldm.UNET + "out.2.bias": torch.zeros(4, dtype=torch.int64)}, "dtype"),
    ]:
        changed = {k: v for k, v in {**state, **change}.items() if v is not None}
        torch.save(changed, tmp_path / "b.ckpt")
        with pytest.raises(CheckpointError, match=words):
            fd.load(tmp_path / "b.ckpt")
