"""What the launchers of attention, forward and backward, ask the compiler for."""

from cubins import Case

from fastdiff.kernels import attention_backward_triton as b
from fastdiff.kernels import attention_triton as m
from fastdiff.kernels.attention import BACKWARD

TENSORS = {"q", "k", "v", "residual", "out", "dout", "dq", "dk", "dv"}
FLOATS = {"sums", "deltas"}
SITE = {"queries", "keys"}  # known to be divisible by 16 at a U-Net's site
NUMBERS = {"scale": "fp32", "base_two": "fp32", "heads": "i32", "queries": "i32", "keys": "i32"}
HEADS = (8, 16, 24, 40, 48, 64, 72, 80, 96, 112, 128, 136, 160, 192, 200, 256)
SIZES = ((4096, 4096), (4097, 4097), (1024, 1024), (1000, 1000), (256, 256), (128, 128), (64, 64), (1024, 77), (1024, 72))


def case(kernel, cut, head, title, dtype="bf16", channels_first=False, elements=0, **constants):
    """The contiguous stride is the constant 1, as Triton specialises it: a head's elements, or, channels first, the positions.
    The launcher promises multiples of 8 in the others, of which Triton knows nothing: 40, from head to head, is none of 16."""
    options = cut.options(head, channels_first)
    steps = ("i32", "i32", "constexpr", "i32") if channels_first else ("i32", "i32", "i32", "constexpr")
    strides = [name for name in kernel.arg_names if name.endswith("_steps")]
    types = {name: f"*{dtype}" for name in kernel.arg_names if name in TENSORS}
    types |= {name: "*fp32" for name in kernel.arg_names if name in FLOATS and head <= BACKWARD}
    divisible = {*types, *(SITE if elements else ())}
    types |= {name: kind for name, kind in NUMBERS.items() if name in kernel.arg_names} | dict.fromkeys(strides, steps)
    constants |= {k: v for k, v in options.items() if k in kernel.arg_names} | {"UPCAST": False}
    constants |= {(name, steps.index("constexpr")): 1 for name in strides}
    title = f"{title} {dtype}{' channels first' if channels_first else ''}"
    maxnreg = options.get("maxnreg")
    return Case(title, kernel, types, constants, cut.warps, divisible, cut.stages, elements, maxnreg=maxnreg, read=True)


def forward(head, queries, keys, *how, **more):
    cut = m.Blocks.of(head, queries, keys)
    return case(m.attend, cut, head, f"attend {head} {queries}x{keys}", *how, **{"NEGATIVE": False, **more})


def at_site(head, positions):
    """As benches/gpu_attention.py launches it; a thread's scores in one turn of the loop are counted."""
    cut = m.Blocks.of(head, positions, positions)
    return forward(head, positions, positions, elements=cut.block_m * cut.block_n // (32 * cut.warps))


def backward(head, *how, **more):
    for kernel, cut in ((b.of_queries, b.OF_QUERIES), (b.of_keys, b.OF_KEYS)):
        yield case(kernel, cut, head, f"{kernel.fn.__name__} {head}", *how, **more)


def cases(everything):
    yield at_site(40, 4096)
    yield at_site(80, 1024)
    yield forward(80, 1024, 128)
    yield forward(160, 256, 256)
    yield forward(40, 256, 77, NEGATIVE=True)
    yield from backward(80)
    if everything:
        for head in HEADS:
            for channels_first in (False, True):
                for queries, keys in (n for n in SIZES if not channels_first or n[0] % 8 == n[1] % 8 == 0):
                    yield forward(head, queries, keys, channels_first=channels_first)
                    if not channels_first:
                        yield forward(head, queries, keys, "fp16")
                if head <= 128:
                    yield from backward(head, channels_first=channels_first)
