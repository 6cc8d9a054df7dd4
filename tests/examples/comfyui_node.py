"""A ComfyUI node: every fastdiff solver as a SAMPLER for "SamplerCustom". Copy this file into ComfyUI/custom_nodes/."""

from __future__ import annotations

from typing import Any

import fastdiff as fd


class FastdiffSampler:
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"solver": (sorted(fd.list_solvers()), {"default": "unipc-2"})}}

    def get_sampler(self, solver: str) -> tuple[Any]:
        import comfy.samplers

        return (comfy.samplers.KSAMPLER(fd.compat.kdiffusion.sampler(solver)),)


NODE_CLASS_MAPPINGS = {"FastdiffSampler": FastdiffSampler}
NODE_DISPLAY_NAME_MAPPINGS = {"FastdiffSampler": "fastdiff solver"}
