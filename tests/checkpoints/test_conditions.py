"""`--condition`: networks without their text encoders, told by a file what a pipeline would have told them."""

import json

import diffusers
import hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdiff as fd
from fastdiff.bench import converged
from fastdiff.checkpoints.conditions import read_conditions
from fastdiff.errors import FastdiffError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside diffusers itself

DDIM = diffusers.DDIMScheduler(**hub.VPS)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
TEXT = {"encoder_hidden_states": (5, 16)}
XL = {"added_cond_kwargs.text_embeds": (12,), "added_cond_kwargs.time_ids": (6,)}
POOLED = {"pooled_projections": (12,)}
WIDE = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}
FOLDERS = {  # class, configuration, scheduler, shape of a row of each condition
    "text U-Net": ("UNet2DConditionModel", hub.TEXT_UNET, DDIM, TEXT),
    "SDXL's U-Net": ("UNet2DConditionModel", {**hub.TEXT_UNET, **hub.XL}, DDIM, {**TEXT, **XL}),
    "U-Net of timestep classes": ("UNet2DConditionModel", {**hub.TEXT_UNET, "class_embed_type": "timestep"}, DDIM,
                                  {**TEXT, "class_labels": ()}),
    "PixArt": ("PixArtTransformer2DModel", hub.PIXART, DDIM, {"encoder_hidden_states": (5, 12)}),
    "PixArt of 1024": ("PixArtTransformer2DModel", {**hub.PIXART, **WIDE}, DDIM,
                       {"encoder_hidden_states": (5, 12), "encoder_attention_mask": (5,), "added_cond_kwargs.resolution": (2,),
                        "added_cond_kwargs.aspect_ratio": (1,)}),
    "SD3": ("SD3Transformer2DModel", hub.SD3, FLOW, {**TEXT, **POOLED}),
    "Flux": ("FluxTransformer2DModel", {**hub.FLUX, "guidance_embeds": True}, FLOW, {**TEXT, **POOLED, "guidance": ()}),
}  # fmt: skip


def written(path, rows, shapes, negative=1):
    """A file of drawn conditions, negative ones in one row beside them; and its tensors."""
    generator = torch.Generator().manual_seed(0)
    file = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    file |= {f"negative.{name}": torch.randn(negative, *shape, generator=generator) for name, shape in shapes.items()}
    file |= {name: t.abs() for name, t in file.items() if name.endswith(("_ids", "_labels", "guidance"))}
    file |= {name: torch.ones_like(t) for name, t in file.items() if name.endswith("mask")}
    save_file(file, path)
    return file


def folder(place, name):
    kind, config, scheduler, _ = FOLDERS[name]
    return hub.save(place, hub.make(kind, **config), scheduler)


def bound(file, prefix=""):
    """What a person would bind by hand."""
    out = {}
    for name, t in file.items():
        if name.startswith("negative.") == bool(prefix):
            whole, _, part = name.removeprefix(prefix).partition(".")
            out = {**out, whole: {**out.get(whole, {}), part: t}} if part else {**out, whole: t}
    return out


def run(fastdiff, *args):
    code, out, err = fastdiff(*args)
    assert code == 0, err
    return out


def sampled(fastdiff, source, file, *how, den=None, seeds=(3, 7), scale=3.0):
    """The command's latents, and those of the same conditions bound by hand."""
    asked = ("--solver", "ddim", "--nfe", 2, "--seeds", ",".join(map(str, seeds)), "--guidance", scale, "--out", "o")
    out = run(fastdiff, "sample", source, "--condition", file, *asked, *how)
    den = den or fd.load(source)
    tensors = load_file(file)
    guided = fd.guide.cfg(den, scale, cond=bound(tensors), negative=bound(tensors, "negative."))
    return out, fd.sample(guided, fd.plan("ddim", den, nfe=2), seeds=list(seeds))


def test_a_text_network_alone(fastdiff, tmp_path, monkeypatch):
    """A row a seed whatever the batch, negative conditions for guidance; what no autoencoder decodes is kept as it is."""
    monkeypatch.setattr(converged, "FIRST_STEPS", 2)
    monkeypatch.setattr(converged, "MOST_STEPS", 4)
    source = folder(tmp_path / "m", "text U-Net")
    written(tmp_path / "c.safetensors", 2, TEXT)
    assert json.loads(run(fastdiff, "info", source, "--json"))["checkpoint"]["conditions"] == ["encoder_hidden_states"]
    out, wanted = sampled(fastdiff, source, tmp_path / "c.safetensors", "--batch", 1)
    found = load_file(fastdiff.folder / "o" / "latents.safetensors")
    assert found["seed"].tolist() == [3, 7] and "latents" in out and (fastdiff.folder / "o" / "grid.png").exists()
    assert (found["x"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (found["x"][0] - found["x"][1]).abs().max() > 0.1
    code, _, err = fastdiff("sample", source, "--condition", tmp_path / "c.safetensors", "-n", 2, "--out", "n")
    assert code == 2 and "leave out -n" in err and not (fastdiff.folder / "n").exists()
    asked = ("--solvers", "ddim", "--nfe", 2, "--n", 2, "--guidance", 3, "--out", "b")
    run(fastdiff, "bench", source, "--condition", tmp_path / "c.safetensors", *asked)
    assert (fastdiff.folder / "b" / "report.html").exists()


def test_a_benchmark_measures_what_is_bound(tmp_path):
    """Each seed meets its own row, in every batch; another file is another result."""
    from fastdiff.bench import Bench, Setup
    from fastdiff.bench.cells import cells

    den = fd.load(folder(tmp_path / "m", "SDXL's U-Net"))
    file = written(tmp_path / "c.safetensors", 3, FOLDERS["SDXL's U-Net"][3])
    conditions = read_conditions(tmp_path / "c.safetensors", den, 3)
    run = Bench(conditions.bound(den, [0]), Setup(3, 5, 2.0, 2, conditions), tmp_path / "b", None)
    (cell,) = cells(["ddim"], None, [2])
    guided = fd.guide.cfg(den, 2.0, cond=bound(file), negative=bound(file, "negative."))
    wanted = fd.sample(guided, cell.plan(den), seeds=[5, 6, 7])
    assert (run.samples(cell).float() - wanted).abs().max() < 2e-3 * wanted.abs().max()  # kept in float16
    file["encoder_hidden_states"][2] += 1.0
    save_file(file, tmp_path / "other.safetensors")
    other = read_conditions(tmp_path / "other.safetensors", den, 3)
    again = Bench(other.bound(den, [0]), Setup(3, 5, 2.0, 2, other), tmp_path / "b", None)
    changed = (again.samples(cell).float() - run.samples(cell).float()).flatten(1).abs().amax(dim=1)
    assert changed[2] > 0.01 and changed[:2].max() == 0


def test_samples_that_end_early_keep_their_rows(tmp_path):
    """Mappings of tensors are cut with the batch too."""
    den = fd.load(folder(tmp_path / "m", "SDXL's U-Net"))
    den = den.bind(**bound(written(tmp_path / "c.safetensors", 3, FOLDERS["SDXL's U-Net"][3])))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert (den.subset(torch.tensor([2]), 3)(x[2:], 400.0) - den(x, 400.0)[2:]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_every_conditioned_folder_alone(name, fastdiff, tmp_path, monkeypatch):
    monkeypatch.setattr(converged, "FIRST_STEPS", 2)
    monkeypatch.setattr(converged, "MOST_STEPS", 4)
    source, file = folder(tmp_path / "m", name), tmp_path / "c.safetensors"
    for rows in (1, 2):
        written(file, rows, FOLDERS[name][3])
        _, wanted = sampled(fastdiff, source, file)
        found = load_file(fastdiff.folder / "o" / "latents.safetensors")["x"]
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        run(fastdiff, "bench", source, "--condition", file, "--solvers", "ddim", "--nfe", 2, "--n", 2, "--out", f"b{rows}")
        assert (fastdiff.folder / f"b{rows}" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v1", "v2", "sdxl"])
def test_a_stable_diffusion_file(kind, fastdiff, tmp_path, monkeypatch):
    import test_ldm
    from PIL import Image

    from fastdiff import checkpoints

    monkeypatch.setattr(converged, "FIRST_STEPS", 1)
    monkeypatch.setattr(converged, "MOST_STEPS", 2)
    said = {"prediction": "v"} if kind == "v2" else {}
    _, path = test_ldm.written(tmp_path, kind, hub.make("AutoencoderKL", **test_ldm.KL), **said)
    read = checkpoints.load
    monkeypatch.setattr(checkpoints, "load", lambda path: read(path, shape=(4, 16, 16)))  # not 64 to 128 latents a side
    written(tmp_path / "c.safetensors", 2, {**TEXT, **(XL if kind == "sdxl" else {})})
    _, wanted = sampled(fastdiff, path, tmp_path / "c.safetensors", den=checkpoints.load(path))
    den = checkpoints.load(path)
    images = (den.images(wanted) * 255).round()
    for i, seed in enumerate((3, 7)):
        found = torch.tensor(list(Image.open(fastdiff.folder / "o" / f"seed{seed:06d}.png").tobytes())).view(32, 32, 3)
        assert (found.permute(2, 0, 1) - images[i]).abs().max() <= 1
    assert not (fastdiff.folder / "o" / "latents.safetensors").exists()
    how = (path, "--condition", tmp_path / "c.safetensors", "--nfe", 1)
    run(fastdiff, "sample", *how, "-n", 2, "--out", "n")
    run(fastdiff, "bench", *how, "--solvers", "ddim", "--n", 2, "--out", "b")


@pytest.fixture(scope="module")
def text_unet(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("text") / "m", "text U-Net")


GOOD = torch.ones(1, 5, 16)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"encoder": GOOD}, "hidden_states is missing; encoder is not known here; this network takes encoder_hidden_states"),
        ({"encoder_hidden_states": GOOD, "negative.text": GOOD}, "negative.text is not known here"),
        ({"negative.encoder_hidden_states": GOOD}, "encoder_hidden_states is missing"),
        ({"encoder_hidden_states": torch.ones(1, 5, 12)}, r"must have shape \(rows, any, 16\); given \(1, 5, 12\)"),
        ({"encoder_hidden_states": torch.ones(5, 16)}, r"given \(5, 16\)"),
        ({"encoder_hidden_states": torch.tensor(1.0)}, r"given \(\)"),
        ({"encoder_hidden_states": GOOD.expand(3, 5, 16)}, r"has 3 rows; give 1 for all, or one for each seed \(2\)"),
        ({"encoder_hidden_states": GOOD, "negative.encoder_hidden_states": torch.ones(4, 5, 16)}, "negative.* has 4 rows"),
        ({"encoder_hidden_states": GOOD / 0}, "finite real numbers"),
        ({"encoder_hidden_states": GOOD, "encoder_attention_mask": torch.ones(1, 5, 2)}, r"shape \(rows, any\)"),
    ],
)
def test_files_that_do_not_fit_are_one_line(file, words, text_unet, tmp_path):
    save_file({name: t.clone() for name, t in file.items()}, tmp_path / "c.safetensors")
    with pytest.raises(FastdiffError, match=words) as caught:
        read_conditions(tmp_path / "c.safetensors", fd.load(text_unet), 2)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_of_conditions_is_one_line(text_unet, fastdiff, tmp_path):
    good, damaged, code = (tmp_path / name for name in ("c.safetensors", "d.safetensors", "c.pt"))
    save_file({"encoder_hidden_states": GOOD}, good)
    damaged.write_bytes(good.read_bytes()[:-5])
    torch.save({"encoder_hidden_states": GOOD}, code)
    long = tmp_path / "mask.safetensors"
    save_file({"encoder_hidden_states": GOOD, "encoder_attention_mask": torch.ones(1, 7)}, long)
    plain = hub.save(tmp_path / "plain", hub.unet(), DDIM)
    for source, how, words in [
        (text_unet, ("--condition", code), ".safetensors alone"),
        (text_unet, ("--condition", damaged), "truncated or damaged"),
        (text_unet, ("--condition", tmp_path / "none.safetensors"), "there is no file"),
        (text_unet, ("--condition", long), "(4, 8, 8) under encoder_attention_mask, encoder_hidden_states: "),
        (text_unet, ("--condition", good, "--guidance", 3), "negative.NAME"),
        (text_unet, ("--condition", good, "--prompt", "a cat"), "leave out one of them"),
        (text_unet, (), "--condition FILE"),
        (plain, ("--condition", good), "takes no conditions from a file"),
    ]:
        status, _, err = fastdiff("sample", source, "--nfe", 1, "--seeds", 0, "--out", "x", *how)
        assert status == 2 and words in err and len(err.strip().splitlines()) == 1, err
        assert not (fastdiff.folder / "x").exists()
