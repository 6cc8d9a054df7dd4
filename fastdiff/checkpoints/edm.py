"""EDM's networks from plain weights; NVIDIA's own pickles hold code: `fastdiff convert` turns them into these first."""

from __future__ import annotations

from torch import nn

from ..denoiser import Denoiser
from ..errors import CheckpointError
from ..models.edm import EDMUNet
from ..schedule import edm
from .build import build
from .options import Options
from .weights import Weights, listed

SETTINGS = ("sigma_min", "sigma_max", "sigma_data", "class_name")
LEVELS = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}  # Karras et al. 2022, table 1


def recognise(weights: Weights) -> bool:
    return {"model.map_layer0.weight", "model.map_layer1.weight"} <= set(weights.tensors)


def from_weights(weights: Weights, options: Options) -> Denoiser:
    """The denoiser of the state dict of an EDMPrecond.

    Raises:
        CheckpointError: another preconditioning (VP, VE, iDDPM), blocks that make no network.
    """
    path = weights.paths[0]
    said = {**options.described(path)}
    kind = str(said.pop("class_name", weights.metadata.get("class_name", "EDMPrecond")))
    if unknown := sorted(set(said) - set(SETTINGS)):
        raise CheckpointError(f"{path}: settings {listed(unknown)} are not known here; {', '.join(SETTINGS)} are")
    tensors = weights.below("model.")
    if kind != "EDMPrecond" or len(tensors) < len(weights.tensors):
        raise CheckpointError(f"{path}: preconditioning {kind if kind != 'EDMPrecond' else 'iDDPM'} is not read; EDMPrecond is")
    if not all(isinstance(v, int | float) for v in said.values()):
        raise CheckpointError(f"{path}: {', '.join(said)} must be numbers")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    network: nn.Module = build(lambda: EDMUNet(shapes), tensors, path, options.dtype)
    assert isinstance(network, EDMUNet)
    channels = next(shape[1] for name, shape in shapes.items() if name.endswith("_conv.weight") and name.startswith("enc."))
    shape = options.shape or (channels, network.side, network.side)
    denoiser = Denoiser(network, edm(**{**LEVELS, **said}), "edm", shape)
    denoiser.hash = weights.hash
    form = "ADM" if not network.song else "NCSN++" if hasattr(network, "map_noise") else "DDPM++"
    denoiser.info = {"format": f"EDM, {form}"}
    return denoiser
