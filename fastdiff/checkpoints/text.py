"""Prompts -> the conditions to bind, by the text encoders and the code of the pipeline that the folder belongs to."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import CheckpointError
from .options import needed

Conditions = dict[str, Any]
ENCODERS = (
    "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel", "CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer",
    "T5TokenizerFast",
)  # fmt: skip
FLUX_GUIDANCE = 3.5  # FluxPipeline's default, told to a guidance-distilled network; bind guidance=... for another


def encoder(folder: Path, index: dict[str, Any], denoiser: Denoiser) -> Callable[[Sequence[str]], Conditions] | None:
    """A function from prompts to conditions of that many samples, or None where the pipeline has no text.

    The encoders are read at its first call and kept; they run on the CPU.
    """
    name = str(index.get("_class_name"))
    if name not in PIPELINES or not any(key.startswith("text_encoder") and entry[0] for key, entry in index.items()):
        return None
    pipeline = functools.cache(lambda: _pipeline(folder, name, index, denoiser))

    @functools.lru_cache(maxsize=8)  # a command asks for the same prompt batch after batch
    @torch.no_grad()
    def encoded(prompts: tuple[str, ...]) -> Conditions:
        return PIPELINES[name](pipeline(), list(prompts), denoiser)

    return lambda prompts: encoded((prompts,) if isinstance(prompts, str) else tuple(prompts))


def _pipeline(folder: Path, name: str, index: dict[str, Any], denoiser: Denoiser) -> Any:
    """The pipeline with its tokenizers and text encoders, and its transformer where it has one."""
    import inspect

    needed("transformers", "text encoders")
    import diffusers

    cls = getattr(diffusers, name)
    parts: dict[str, Any] = {p: None for p in inspect.signature(cls.__init__).parameters if p != "self"}
    for key, entry in index.items():
        if key in parts and not isinstance(entry, list):
            parts[key] = entry
        elif key == "transformer" and key in parts:  # SD3 without T5 asks for its width
            parts[key] = denoiser.network.model  # type: ignore[attr-defined]
        elif key.startswith(("tokenizer", "text_encoder")) and key in parts and entry[1] is not None:
            parts[key] = _part(folder / key, str(entry[1]))
    parts |= {"requires_safety_checker": False} if "requires_safety_checker" in parts else {}
    parts |= {"add_watermarker": False} if "add_watermarker" in parts else {}
    return cls(**parts)


def _part(place: Path, name: str) -> Any:
    import transformers

    if name not in ENCODERS:
        raise CheckpointError(f"{place}: text encoder {name[:60]!r} is not read here; {', '.join(ENCODERS)} are")
    safe = {} if "Tokenizer" in name else {"use_safetensors": True}
    try:
        return getattr(transformers, name).from_pretrained(place, local_files_only=True, **safe)
    except Exception as e:  # a library's own reading of a stranger's files
        raise CheckpointError(f"{place} cannot be read as {name}: {' '.join(str(e).split())[:300]}") from e


def _pixels(denoiser: Denoiser) -> Tensor:
    """(height, width) of the images that samples decode to."""
    factor = getattr(denoiser.decoder, "factor", 8)
    assert denoiser.shape is not None
    return torch.tensor(denoiser.shape[-2:]) * float(factor)


def _stable_diffusion(pipe: Any, prompts: list[str], denoiser: Denoiser) -> Conditions:
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, "cpu", 1, False)[0]}


def _sdxl(pipe: Any, prompts: list[str], denoiser: Denoiser) -> Conditions:
    states, _, pooled, _ = pipe.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:  # SDXL's "no prompt" is zero, not the encoding of ""
        said = torch.tensor([p != "" for p in prompts]).to(states)
        states, pooled = states * said[:, None, None], pooled * said[:, None]
    size = _pixels(denoiser)
    times = torch.cat([size, torch.zeros(2), size]).expand(len(prompts), 6)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}


def _sd3(pipe: Any, prompts: list[str], denoiser: Denoiser) -> Conditions:
    states, _, pooled, _ = pipe.encode_prompt(prompts, None, None, device="cpu", do_classifier_free_guidance=False)
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def _flux(pipe: Any, prompts: list[str], denoiser: Denoiser) -> Conditions:
    states, pooled, places = pipe.encode_prompt(prompts, None, device="cpu")
    guided = "guidance" in getattr(denoiser.network, "conditions", ())
    return {
        "encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": places,
        **({"guidance": torch.full((len(prompts),), FLUX_GUIDANCE)} if guided else {}),
    }  # fmt: skip


def _pixart(pipe: Any, prompts: list[str], denoiser: Denoiser) -> Conditions:
    states, mask, _, _ = pipe.encode_prompt(prompts, False, device="cpu")
    size = _pixels(denoiser).expand(len(prompts), 2)
    added = "added_cond_kwargs" in getattr(denoiser.network, "conditions", ())
    sizes = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]} if added else {}
    return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}


PIPELINES: dict[str, Callable[[Any, list[str], Denoiser], Conditions]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _sdxl,
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": _pixart,
    "PixArtSigmaPipeline": _pixart,
}
