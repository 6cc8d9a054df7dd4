"""How many kernels one call of a U-Net launches, with torch's GroupNorm and with ours: counted on tensors without values.

    python benches/count_launches.py          # a table, and results/launches.json; no GPU

An operation of torch counts as one launch, though a convolution may take more; a view takes none, a GroupNorm three (moments,
factors, elements: torch 2.13's group_norm_kernel.cu). Ours is one kernel where a group is read once, else three. Networks in
bfloat16 at batch 1, patched as `fd.patch` does; attention is torch's, one launch.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_networks import NETWORKS, plain
from gpu_record import RESULTS, show
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import ops
from fastdiff.files import write_text
from fastdiff.kernels import group_norm as m
from fastdiff.kernels import group_norm_triton as kernels

NOTHING = {"aten._unsafe_view", "aten.empty", "aten.empty_like", "aten.new_empty", "aten.detach", "aten.lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts what is dispatched and launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name.startswith("fastdiff.group_norm"):
            self.seen[name] += of_ours(args[0], args[1])
        elif not view and name not in NOTHING:
            self.seen[name] += 3 if name == "aten.native_group_norm" else 1
        return func(*args, **(kwargs or {}))


def of_ours(x: torch.Tensor, groups: int) -> int:
    """Kernels of our GroupNorm; a tensor without values lies at address 0, aligned."""
    v = m.flat(x)
    return 1 if kernels.on_chip(v.shape[1] // groups, v.shape[2], v.stride(1) == 1, kernels.aligned(v)) else 3


def one_attention(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Torch's attention as one operation, as on a GPU."""
    return torch.neg(q)


def count(name: str) -> dict[str, Any]:
    make, shape = NETWORKS[name]
    row: dict[str, Any] = {"network": name}
    with torch.device("meta"), torch.no_grad(), patch.object(F, "scaled_dot_product_attention", one_attention):
        network = make().to("meta", torch.bfloat16).eval()
        x, t = torch.empty(1, *shape, dtype=torch.bfloat16), torch.empty(1)
        with plain(), Launches() as before:
            network(x, t)
        with patch.object(ops, "by_torch", lambda x: False):
            fd.patch(network)
            with Launches() as after:
                network(x, t)
    row |= {"before": before.seen.total(), "after": after.seen.total()}
    row["norms before"] = sum(before.seen[f"aten.{op}"] for op in ("native_group_norm", "silu", "silu_", "addcmul"))
    row["norms after"] = sum(n for op, n in after.seen.items() if op.startswith("fastdiff") or op in ("aten.silu", "aten.silu_"))
    return row


if __name__ == "__main__":
    rows = [count(name) for name in NETWORKS]
    show(rows)
    write_text(RESULTS / "launches.json", json.dumps(rows, indent=1) + "\n")
