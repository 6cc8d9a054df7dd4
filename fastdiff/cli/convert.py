"""`fastdiff convert`: a checkpoint that is a pickle -> safetensors, which everything here reads without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import say


def convert(
    file: Annotated[Path, typer.Argument(help="a .pt, .ckpt, .pth, .bin or .pkl file")],
    out: Annotated[Path | None, typer.Option(help="the .safetensors file; default: beside it, under its name")] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="let the file run its code, in a process of its own, with your rights")
    ] = False,
) -> None:
    """Rewrite the weights of a pickle as safetensors."""
    import subprocess
    import sys

    from safetensors.torch import save_file

    from ..checkpoints.weights import read
    from ..errors import CheckpointError, FastdiffError
    from ..files import atomic

    out = out or file.with_suffix(".safetensors")
    if not file.is_file():
        raise FastdiffError(f"no file at {file}")
    if out.suffix != ".safetensors" or out.exists():
        raise FastdiffError(f"--out {out} must be a new .safetensors file; choose another name")
    if not trust_pickle and file.suffix == ".pkl":
        raise CheckpointError(f"{file} is a pickle and could run code: add --trust-pickle if you trust where it comes from")
    with atomic(out) as temporary:
        if trust_pickle:
            command = [sys.executable, "-m", "fastdiff.checkpoints.unpickle", str(file.resolve()), str(temporary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                why = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1][:300]
                raise CheckpointError(f"{file} could not be unpickled: {why}")
        else:
            weights = read(file)
            copies = {k: t.clone().contiguous() for k, t in weights.tensors.items()}
            save_file(copies, temporary, metadata={**weights.metadata, "converted_from": file.name})
    say(f"{file} -> {out}")
