"""A diffusers pipeline made fast and put back: `python tests/examples/accelerate_pipeline.py PIPELINE_FOLDER "a prompt"`.

The folder is one that diffusers wrote (save_pretrained) or downloaded; the image goes to fast.png.
"""

from __future__ import annotations

import sys
from typing import Any

import fastdiff as fd


def main(folder: str, prompt: str | None = None, nfe: int = 8, **given: Any) -> Any:
    """One image at `nfe` calls; `given` goes to the pipeline (prompt embeddings, seeds, sizes)."""
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    report = fd.accelerate(pipe, nfe=nfe)
    image = pipe(**({"prompt": prompt} if prompt else {}), num_inference_steps=report.steps, **given).images[0]
    report.undo()
    return image


if __name__ == "__main__":
    main(*sys.argv[1:3]).save("fast.png")
