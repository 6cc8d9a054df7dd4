"""The scheduler seat by hand, filled in three ways: `python tests/examples/diffusers_scheduler.py FOLDER "a prompt"`."""

from __future__ import annotations

import sys
from typing import Any

import fastdiff as fd


def seats(config: Any) -> dict[str, Any]:
    """A solver with a grid, a class of diffusers by its name, and a finished plan."""
    from_config = fd.compat.DiffusersScheduler.from_config
    schedule = from_config(config).seat.schedule()
    return {
        "solver": from_config(config, solver="unipc-2", grid="karras"),
        "class": from_config(config, solver="DPMSolverMultistepScheduler", use_karras_sigmas=True),
        "plan": from_config(config, plan=fd.plan("dpmpp-2m", schedule, nfe=8)),
    }


def main(folder: str, prompt: str | None = None, **given: Any) -> dict[str, Any]:
    """One image a seat, at 8 calls."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    images = {}
    for name, seat in seats(pipe.scheduler.config).items():
        pipe.scheduler = seat
        images[name] = pipe(**({"prompt": prompt} if prompt else {}), num_inference_steps=8, **given).images[0]
    return images


if __name__ == "__main__":
    for name, image in main(*sys.argv[1:3]).items():
        image.save(f"{name}.png")
