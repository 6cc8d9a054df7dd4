"""Launches on a GPU that is not here: launchers run on the CPU's tensors, and each kernel is compiled as Triton would compile it
for these very arguments (which of them are 1, which are divisible by 16), but not run. Asked by test_launches.

    python tests/kernels/launches.py [--all]       # one JSON line a kernel and architecture
"""

import argparse
import json
import sys
import warnings

import torch
import triton
from cubins import ARCHITECTURES, measured
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastdiff.kernels import group_norm as m
from fastdiff.kernels.attention_backward_triton import backward as attention_backward
from fastdiff.kernels.attention_triton import forward as attention
from fastdiff.kernels.combine_triton import forward as combine
from fastdiff.kernels.group_norm_backward_triton import backward as group_norm_backward
from fastdiff.kernels.group_norm_triton import forward as group_norm


class Driver:
    """What Triton asks of the driver before it compiles."""

    def __init__(self, architecture):
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device):
        return 0


def norms():
    """Stable Diffusion's sites, an odd one, vectors, one channel a group, a video; what is read twice, in splits of several
    tiles too; and channels-last."""
    for shape, groups in (
        ((1, 1280, 16, 16), 32), ((2, 320, 64, 64), 32), ((1, 64, 7, 7), 32), ((3, 32), 32), ((3, 40), 2), ((1, 1, 1, 1), 1),
        ((1, 32, 2, 8, 8), 32), ((1, 6, 150, 151), 2), ((1, 64, 144, 144), 32),
    ):  # fmt: skip
        x = torch.ones(shape, dtype=torch.bfloat16)
        weight, scale = x.new_ones(shape[1]), x.new_ones(shape[0], 2 * shape[1])
        for v in (x, x.to(memory_format=torch.channels_last)) if x.ndim == 4 else (x,):
            yield v, m.Norm(groups, weight, weight, 1e-5, *scale.chunk(2, 1))


def launch(everything):
    """Name of a launch, once its kernels are compiled: every other one, unless everything is asked for."""
    for x, norm in list(norms())[:: 1 if everything else 2]:
        y, total, mean, rstd = group_norm(x, norm, x)
        if x.shape[0] == 2 or x.shape[1] == 1280:  # split, and read once
            group_norm(x, norm._replace(added=norm.scale))
        group_norm_backward(y, total, mean, rstd, norm, y)
        yield f"group_norm {tuple(x.shape)} {x.stride()}"
    for (batch, heads, queries, keys, head), back in (
        ((1, 8, 4096, 4096, 40), True), ((2, 8, 1024, 77, 80), False), ((1, 1, 1, 1, 8), True), ((1, 5, 64, 64, 40), False),
        ((1, 2, 49, 49, 24), True), ((2, 8, 256, 256, 160), False),
    )[:: 1 if everything else 2]:  # fmt: skip
        wide = torch.ones(batch, max(queries, keys), 3 * heads * head, dtype=torch.float16)
        rows = [x.unflatten(-1, (heads, head)).transpose(1, 2) for x in wide.chunk(3, -1)]
        for parts in (rows, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in rows]):
            q, k, v = parts[0][:, :, :queries], parts[1][:, :, :keys], parts[2][:, :, :keys]
            out, sums = attention(q, k, v, q, None)
            if back:
                attention_backward(out, q, k, v, out, sums, None)
            yield f"attention {tuple(q.shape)} {q.stride()} {keys}"
    for shape, inputs, noise in (((1, 4, 64, 64), 4, True), ((3, 1, 7, 9), 12, False), ((1, 1), 1, True)):
        seeds = torch.zeros(shape[0], dtype=torch.int64) if noise else None
        combine([torch.ones(shape)] * inputs, torch.ones(2, inputs + noise), seeds, 1)
        yield f"combine {shape} {inputs}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="every architecture; default: sm_90")
    compiled, options = [], parser.parse_args()
    warnings.filterwarnings("error", message="TRITON_DEFAULT_FP_FUSION")  # a launcher that leaves it to Triton's default
    run = JITFunction.run
    JITFunction.run = lambda self, *given, warmup, **more: compiled.append((self, run(self, *given, warmup=True, **more)))
    for architecture in ARCHITECTURES if options.all else (90,):
        triton.runtime.driver.set_active(Driver(architecture))
        for name in launch(options.all):
            for kernel, result in compiled:
                about = {"launch": name, "kernel": kernel.fn.__name__, "sm": architecture}
                print(json.dumps({**about, **measured(result, name.startswith("attention"))}), flush=True)
            compiled.clear()


if __name__ == "__main__":
    sys.exit(main())
