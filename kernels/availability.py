"""Which kernels can run here, and why not where they cannot. Nothing here imports triton."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

OLDEST = (8, 0)  # sm_80: bfloat16 and what the kernels are compiled for in the tests


@cache
def missing_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, the kernels run on NVIDIA GPUs"
    if torch.version.hip is not None:
        return "this torch is built for ROCm, the kernels are compiled for NVIDIA GPUs"
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'fastdiff[gpu]')"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"the GPU is sm_{capability[0]}{capability[1]}, the kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    return None
