"""What tuning a plan for a Stable-Diffusion-sized network needs in memory: bytes counted, nothing allocated.

    python benches/tuning_memory.py     # results/tuning-memory.json; two minutes, needs diffusers

The network is the U-Net of Stable Diffusion 1.5 (diffusers' UNet2DConditionModel as it is by default, sample size 64, context
of 768) in float16, without data (torch's fake tensors). Counted: its parameters, and what autograd keeps of one call for the
backward pass to its input. With `--checkpointing` one call's share is alive at a time, without it those of all calls.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff import files
from fastdiff.bench.results import versions

OUT = Path(__file__).parent / "results" / "tuning-memory.json"
NFE, LATENT, CONTEXT = 8, (4, 64, 64), (77, 768)
GIB = 2**30


def kept_by_one_call(network: torch.nn.Module, batch: int) -> int:
    """Bytes of distinct storages, parameters aside, that autograd keeps of one call."""
    known = {p.untyped_storage()._cdata for p in network.parameters()}
    alive: list[Tensor] = []  # so that no storage is freed and its address given to another
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(x)
        return x

    x = torch.zeros(batch, *LATENT, dtype=torch.float16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(x, torch.zeros(batch), torch.zeros(batch, *CONTEXT, dtype=torch.float16))
    return sum(sizes.values())


def main() -> None:
    from diffusers import UNet2DConditionModel

    rows: list[dict[str, Any]] = []
    with FakeTensorMode():
        torch.set_default_dtype(torch.float16)  # fake parameters cannot be cast afterwards
        network = UNet2DConditionModel(sample_size=LATENT[-1], cross_attention_dim=CONTEXT[-1]).requires_grad_(False)
        parameters = sum(p.numel() * p.element_size() for p in network.parameters())
        for batch in (1, 2, 4, 8):
            call = kept_by_one_call(network, batch)
            rows.append({
                "batch": batch, "one_call_gib": call / GIB, "checkpointing_gib": (parameters + call) / GIB,
                "without_gib": (parameters + NFE * call) / GIB,
            })  # fmt: skip
            print({k: round(v, 2) for k, v in rows[-1].items()})
    record = {"network": "UNet2DConditionModel, SD 1.5", "dtype": "float16", "nfe": NFE, "parameters_gib": parameters / GIB,
              "versions": versions(), "rows": rows}  # fmt: skip
    files.write_text(OUT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
