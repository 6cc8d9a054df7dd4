"""LoRA students (Hu et al. 2021) by peft: the teacher's weights stay as they are, a term of low rank beside each layer learns."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from ..errors import FastdiffError
from ..files import write_bytes

FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's own format: PeftModel.from_pretrained(unet, folder)
ADDED = ("guidance_embed", "steps_embed")  # inputs that the teacher has not: there is nothing to adapt, they are trained whole


def check_rank(rank: int) -> None:
    """
    Raises:
        FastdiffError: a rank below 1, or no peft.
    """
    if rank < 1:
        raise FastdiffError(f"a LoRA student's rank must be at least 1; given {rank}")
    if importlib.util.find_spec("peft") is None:
        raise FastdiffError("a LoRA student needs peft: pip install 'fastdiff[lora]'")


def adapt(network: nn.Module, rank: int) -> nn.Module:
    """The network as peft's model: beside every linear layer and convolution W a trainable term B A of `rank`, B = 0 at first.

    The term is added unscaled (lora_alpha = rank). peft has the same for convolutions: A has the layer's kernel, B is 1x1; it
    cannot merge the term of a grouped one, and a weight that two layers share would get both terms: those stay as they are.
    """
    from peft import LoraConfig, get_peft_model

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    weights = Counter(id(m.weight) for m in network.modules() if isinstance(getattr(m, "weight", None), nn.Parameter))
    layers = [
        name for name, m in network.named_modules()
        if isinstance(m, kinds) and not name.startswith(ADDED) and weights[id(m.weight)] == 1 and getattr(m, "groups", 1) == 1
    ]  # fmt: skip
    added = [name for name in ADDED if getattr(network, name, None) is not None] or None
    if not layers:
        raise FastdiffError(f"a LoRA student needs linear layers or convolutions to adapt; a {type(network).__name__} has none")
    with torch.random.fork_rng(devices=[]):  # A is drawn: the same in every run
        torch.manual_seed(0)
        adapted = get_peft_model(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, modules_to_save=added))
    return adapted.eval()


def merged(adapted: nn.Module) -> nn.Module:
    """An ordinary network with the same output: W + B A in place of both."""
    return copy.deepcopy(adapted).merge_and_unload()  # type: ignore[operator]


def write(adapted: nn.Module, folder: Path) -> None:
    """The adapter alone, without the teacher's weights, in peft's own format."""
    with tempfile.TemporaryDirectory() as temporary:
        adapted.save_pretrained(temporary)  # type: ignore[operator]
        for name in FILES:
            write_bytes(folder / name, (Path(temporary) / name).read_bytes())
