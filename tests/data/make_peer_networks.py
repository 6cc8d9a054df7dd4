"""Write peer_networks.json: what other people's code of a network computes, so that our own can be held against it.

The peers are no dependencies of a test run. To make the file again, in a throw-away environment with torch and numpy:

    pip download --no-deps azula==0.11.1 nvidia-physicsnemo==2.2.2 einops && unzip the wheels into one folder PEERS
    PYTHONPATH=PEERS OMP_NUM_THREADS=1 python tests/data/make_peer_networks.py PEERS

- adm, classifier: azula/plugins/adm/_src/unet.py, guided-diffusion's network (MIT) as azula carries it;
- edm: physicsnemo's SongUNet and DhariwalUNet (Apache-2.0), NVIDIA's own later edition of EDM's networks.

A case holds the peer's parameter names and shapes (weights follow from them by tests/peer_networks.py), the call and 96 numbers
of the output, evenly over it.
"""

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import peer_networks as rule

ADM = {
    "guided": (
        {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
         "attention_resolutions": (2,), "channel_mult": (1, 2), "num_classes": 7, "num_head_channels": 16,
         "use_scale_shift_norm": True, "resblock_updown": True},
        {"flags": "--image_size 16 --num_channels 32 --learn_sigma True --class_cond True --num_res_blocks 1 "
                  "--attention_resolutions 8 --channel_mult 1,2 --num_head_channels 16 --use_scale_shift_norm True "
                  "--resblock_updown True --use_fp16 False --diffusion_steps 1000 --noise_schedule linear"},
    ),
    "improved": (
        {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 2,
         "attention_resolutions": (1, 2), "channel_mult": (1, 2), "num_heads": 4, "use_scale_shift_norm": False},
        {"image_size": 16, "num_channels": 32, "num_res_blocks": 2, "num_heads": 4, "attention_resolutions": "16,8",
         "channel_mult": "1,2", "use_scale_shift_norm": False, "diffusion_steps": 4000, "noise_schedule": "cosine",
         "rescale_timesteps": True},
    ),
    "new-order": (
        {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1,
         "attention_resolutions": (2,), "channel_mult": (1, 1, 2), "num_head_channels": 8, "use_scale_shift_norm": True,
         "use_new_attention_order": True},
        {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "num_head_channels": 8, "attention_resolutions": [8],
         "channel_mult": "1,1,2", "use_new_attention_order": "True", "predict_xstart": True},
    ),
}  # fmt: skip
CLASSIFIER = (
    {"image_size": 64, "in_channels": 3, "model_channels": 32, "out_channels": 1000, "num_res_blocks": 1,
     "attention_resolutions": (2, 8), "channel_mult": (1, 2, 3, 4), "num_head_channels": 64, "use_scale_shift_norm": True,
     "resblock_updown": True, "pool": "attention"},
    {"image_size": 64, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "32,8"},
)  # fmt: skip


def frozen(network, call, config, renamed=()):
    computed = [] if config.get("embedding_type") == "fourier" else ["map_noise.freqs"]  # a table that EDM's files do not hold
    own = {name: name for name in network.state_dict() if name not in computed}
    for name in own:
        for old, new in dict(renamed).items():
            own[name] = own[name].replace(old, new)
    shapes = {own[name]: list(p.shape) for name, p in network.state_dict().items() if name in own}
    made = rule.weights(shapes)
    network.load_state_dict({name: made[own[name]] for name in own}, strict=not computed)
    with torch.no_grad():
        out = call(network.train(mode=bool(renamed)))
    return {"config": config, "weights": shapes, "shape": list(out.shape), "output": rule.shown(out)}


def package(name, folder):
    """A folder as an importable package, without running the __init__ of what it lies in."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def adm(peers):
    package("adm_src", peers / "azula" / "plugins" / "adm" / "_src")
    unet = importlib.import_module("adm_src.unet")
    x, t = rule.image([2, 3, 16, 16]), torch.tensor([3.0, 250.5])
    found = {}
    for name, (config, flags) in ADM.items():
        labels = {"y": torch.tensor([1, 6])} if "num_classes" in config else {}
        found[f"adm {name}"] = frozen(unet.UNetModel(**config), lambda net, labels=labels: net(x, t, **labels), flags)
    config, flags = CLASSIFIER
    image = rule.image([1, 3, 64, 64])
    found["classifier"] = frozen(unet.EncoderUNetModel(**config), lambda net: net(image, t[:1]), flags)
    return found


# physicsnemo's GroupNorm divides by n - 1 in eval mode, EDM's by n always; in training mode both do, and without dropout nothing
# else differs
SMALL = {"dropout": 0.0, "img_resolution": 8, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_blocks": 1}
EDM = {
    "ddpm++": ("SongUNet", {"channel_mult": [1, 2], "attn_resolutions": [4], "augment_dim": 9}),
    "ddpm++ of classes": ("SongUNet", {"channel_mult": [1, 1], "attn_resolutions": [8], "label_dim": 5}),
    "ncsn++": (
        "SongUNet",
        {"channel_mult": [1, 2], "attn_resolutions": [4], "embedding_type": "fourier", "channel_mult_noise": 2,
         "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
    ),
    "adm": ("DhariwalUNet", {"model_channels": 64, "channel_mult": [1, 2], "attn_resolutions": [4], "label_dim": 5}),
}  # fmt: skip
EDM_NAMES = {".attn.norm.": ".norm2.", ".attn.qkv.": ".qkv.", ".attn.proj.": ".proj."}  # the later edition's -> EDM's own


def edm(peers):
    """physicsnemo's two files of networks, and the layers they use, without the packages that its own imports ask for."""
    root = peers / "physicsnemo"
    for name, folder in {"physicsnemo": root, "physicsnemo.nn": root / "nn", "physicsnemo.nn.module": root / "nn" / "module",
                         "physicsnemo.models": root / "models", "physicsnemo.core": root / "core",
                         "physicsnemo.models.diffusion_unets": root / "models" / "diffusion_unets"}.items():  # fmt: skip
        package(name, folder)

    class Module(torch.nn.Module):
        def __init__(self, meta=None):
            super().__init__()

    class Shape:
        def __class_getitem__(cls, key):
            return torch.Tensor

    Meta = type("ModelMetaData", (), {"__init__": lambda self, **k: None})
    sys.modules["physicsnemo.core"].Module = Module
    sys.modules["physicsnemo.core.module"] = types.SimpleNamespace(Module=Module)
    sys.modules["physicsnemo.core.meta"] = types.SimpleNamespace(ModelMetaData=dataclasses.dataclass(Meta))
    sys.modules["physicsnemo.nn.functional"] = mock.MagicMock()  # kernels that these networks do not call
    sys.modules["nvtx"] = types.SimpleNamespace(annotate=None)
    sys.modules["jaxtyping"] = types.SimpleNamespace(Float=Shape)
    face = sys.modules["physicsnemo.nn"]
    for file in ("conv_layers", "embedding_layers", "fully_connected_layers", "unet_layers", "group_norm"):
        layer = importlib.import_module(f"physicsnemo.nn.module.{file}")
        vars(face).update({k: v for k, v in vars(layer).items() if not k.startswith("__")})
    found, x, t = {}, rule.image([2, 3, 8, 8]), torch.tensor([-0.7, 0.9])
    for name, (cls, config) in EDM.items():
        file = "song_unet" if cls == "SongUNet" else "dhariwal_unet"
        network = getattr(importlib.import_module(f"physicsnemo.models.diffusion_unets.{file}"), cls)(**{**SMALL, **config})
        labels = torch.eye(5)[[1, 4]] if "label_dim" in config else None
        found[f"edm {name}"] = frozen(network, lambda net, labels=labels: net(x, t, labels), config, EDM_NAMES)
    return found


if __name__ == "__main__":
    cases = adm(Path(sys.argv[1])) | edm(Path(sys.argv[1]))
    origin = {"origin": "tests/data/make_peer_networks.py", "torch": torch.__version__}
    rule.FILE.write_text(json.dumps({**origin, "cases": cases}) + "\n")
