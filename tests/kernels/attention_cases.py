"""What the launcher of attention asks the compiler for."""

from cubins import Case

from fastdiff.kernels import attention_triton as m

TENSORS = ("q", "k", "v", "residual", "out")
STEPS = ("q_steps", "k_steps", "v_steps", "residual_steps", "out_steps")


def case(head, queries, keys, dtype="bf16", channels_first=False, aligned=True):
    """The contiguous stride is the constant 1, as Triton specialises it: a head's elements, or, channels first, the positions."""
    cut = m.Blocks.of(head, queries, keys)
    options = cut.options(head)
    steps = ("i32", "i32", "constexpr", "i32") if channels_first else ("i32", "i32", "i32", "constexpr")
    types = {**dict.fromkeys(TENSORS, f"*{dtype}"), "scale": "fp32", **dict.fromkeys(("heads", "queries", "keys"), "i32")}
    types |= dict.fromkeys(STEPS, steps)
    constants = {k: v for k, v in options.items() if not k.startswith("num_")} | {"UPCAST": False}
    constants |= {(name, steps.index("constexpr")): 1 for name in STEPS}
    title = f"attend {head} {queries}x{keys} {dtype}{' channels first' if channels_first else ''}{' aligned' if aligned else ''}"
    divisible = {*TENSORS, *STEPS} if aligned else set()
    return Case(title, m.attend, types, constants, cut.warps, divisible, cut.stages)


def cases(everything):
    yield case(40, 4096, 4096)
    yield case(80, 1024, 128)
    yield case(160, 256, 256)
    if everything:
        for head in (8, 16, 24, 40, 48, 64, 72, 80, 96, 112, 128, 136, 160, 192, 200, 256):
            for queries, keys in ((4096, 4096), (1024, 1024), (256, 256), (128, 128), (64, 64), (1024, 77)):
                for channels_first in (False, True):
                    yield case(head, queries, keys, channels_first=channels_first)
        yield case(40, 1024, 1024, "fp16", aligned=False)
        yield case(80, 1001, 77, "fp16", aligned=False)
