"""What the launchers of the GroupNorm family ask the compiler for: (kernel, argument types, constants, warps)."""

from itertools import product

from cubins import Case

from fastdiff.kernels import group_norm_backward_triton as backward
from fastdiff.kernels import group_norm_triton as forward

POINTERS = {
    "x", "residual", "weight", "bias", "scale", "shift", "y", "total", "dy", "dtotal", "dx",
}  # of the tensors' own dtype
FLOATS = {
    "mean_out", "rstd_out", "mean_in", "rstd_in", "means", "squares", "p_out", "q_out", "p_in", "q_in", "group_p", "group_q",
}  # fmt: skip
STRIDES = {"xb", "xc", "xs", "rb", "rc", "rs", "yb", "yc", "ys"}
OPTIONAL = {"residual", "weight", "bias", "scale", "shift", "total", "dtotal"}
ONE_READ = {"one_read": forward.one_read, "one_read_backward": backward.one_read_backward}
SPLIT = {"moments": forward.moments, "apply": forward.apply, "sums": backward.sums, "apply_backward": backward.apply_backward}


def case(name, kernel, dtype, channels_last, blocks, aligned=True, bare=False):
    """A kernel with everything switched on, or bare: without what may be left out.

    The contiguous stride is the constant 1, as Triton specialises it.
    """
    constants = {"SILU": True, **{k: v for k, v in blocks.items() if k != "num_warps"}}
    types = {}
    for argument in kernel.arg_names:
        if bare and argument in OPTIONAL:
            constants[argument] = None
        elif argument in POINTERS:
            types[argument] = f"*{dtype}"
        elif argument in FLOATS:
            types[argument] = "*fp32"
        elif argument == "eps":
            types[argument] = "fp32"
        elif argument in (("xc", "rc", "yc") if channels_last else ("xs", "rs", "ys")):
            constants[argument] = 1
        elif argument not in constants:
            types[argument] = "i32"
    layout = "nhwc" if channels_last else "nchw"
    divisible = {n for n, kind in types.items() if aligned and (kind.startswith("*") or n in STRIDES)}
    size = f"{blocks.get('BLOCK_C', 1)}x{blocks.get('BLOCK_S', blocks.get('BLOCK', 1))}"
    title = f"{name} {dtype} {layout} {size}{' aligned' if aligned else ''}{' bare' if bare else ''}"
    return Case(title, kernel, types, constants, blocks.get("num_warps", 4), divisible)


def cases(everything):
    dtypes = ("fp32", "bf16") if everything else ("bf16",)
    for dtype, channels_last in product(dtypes, (False, True) if everything else (False,)):
        for name, kernel in ONE_READ.items():
            limit = forward.ONE_READ if name == "one_read" else forward.ONE_READ_BACKWARD
            shapes = [(16, limit // 16), (16, limit // 32)]
            if everything:
                shapes += [(c, size // c) for size in (256, limit) for c in (1, 4, 64)]
            for per_group, positions in dict.fromkeys(shapes):
                blocks = forward.on_chip(per_group, positions, limit)
                yield case(name, kernel, dtype, channels_last, blocks)
                if per_group * positions < limit:
                    yield case(name, kernel, dtype, channels_last, blocks, aligned=False)
        shapes = [(320, 4096)] + ([(3, 70), (1280, 64)] if everything else [])
        for name, kernel in SPLIT.items():
            for channels, positions in shapes:
                blocks = forward.Split.of(channels, positions, channels_last).blocks
                yield case(name, kernel, dtype, channels_last, blocks)
        for name, kernel in {**ONE_READ, **(SPLIT if everything else {})}.items():
            yield case(name, kernel, dtype, channels_last, {"BLOCK_C": 4, "BLOCK_S": 1024, "num_warps": 4}, bare=True)
    yield case("combine", forward.combine, "fp32", False, {"BLOCK": 1024})
    for splits in (1, 8, 64) if everything else (64,):
        yield case("totals", backward.totals, "bf16", False, {"BLOCK_C": 16, "BLOCK_SPLITS": splits})
