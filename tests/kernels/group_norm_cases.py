"""What the launchers of the GroupNorm family ask the compiler for."""

from itertools import product

from cubins import Case

from fastdiff.kernels import group_norm_backward_triton as backward
from fastdiff.kernels import group_norm_triton as forward
from fastdiff.kernels.tile_triton import registers

POINTERS = {
    "x", "residual", "added", "weight", "bias", "scale", "shift", "y", "total", "dy", "dtotal", "dx",
}  # of the tensors' own dtype
FLOATS = {
    "mean_out", "rstd_out", "mean_in", "rstd_in", "means", "squares", "p_out", "q_out", "p_in", "q_in", "group_p", "group_q",
    "center", "factor", "offset", "offset_out",
}  # fmt: skip
STRIDES = {"xb", "xc", "xs", "rb", "rc", "rs", "yb", "yc", "ys"}
OPTIONAL = {"residual", "added", "weight", "bias", "scale", "shift", "total", "dtotal"}
AT_A_SITE = {"residual", "added", "scale", "shift", "total"}  # what benches/gpu_ops.py leaves out
SIZES = {"positions", "channels"}
SPLIT = {"moments": forward.moments, "apply": forward.apply, "sums": backward.sums, "apply_backward": backward.apply_backward}


def case(name, kernel, dtype, channels_last, blocks, aligned=True, without=(), most=0.0, known=()):
    """A kernel with everything switched on but what it goes without. Aligned, the length of the contiguous axis is known to be
    divisible by 16, and at a U-Net's site, where an element may take `most` instructions, the other one's too.

    The contiguous stride is the constant 1, as Triton specialises it, and so are the `known` arguments.
    """
    constants = {k: v for k, v in {"SILU": True, **blocks}.items() if k in kernel.arg_names}
    types = {}
    for argument in kernel.arg_names:
        if argument in without:
            constants[argument] = None
        elif argument in known:
            constants[argument] = 1
        elif argument in FLOATS and not (argument == "offset" and kernel is not forward.apply):
            types[argument] = "*fp32"
        elif argument in POINTERS:
            types[argument] = f"*{dtype}"
        elif argument == "eps":
            types[argument] = "fp32"
        elif argument in (("xc", "rc", "yc") if channels_last else ("xs", "rs", "ys")):
            constants[argument] = 1
        elif argument not in constants:
            types[argument] = "i32"
    even = STRIDES | (SIZES if most else {"channels"} if channels_last else {"positions"})
    divisible = {n for n, kind in types.items() if aligned and (kind.startswith("*") or n in even)}
    channels = blocks["C0"] + blocks["C1"] if "C0" in blocks else blocks.get("BLOCK_C", 1)
    positions = blocks.get("BLOCK_S", blocks.get("BLOCK", 1))
    warps = blocks.get("num_warps", 4)
    words = (
        name, dtype, "nhwc" if channels_last else "nchw", f"{channels}x{positions}", "aligned" * aligned,
        "whole" * blocks.get("ALL_S", False), *(f"{k}=1" for k in known if k != "tiles"), "site" * bool(most),
        "bare" * (without == OPTIONAL), "added" * ("residual" in without and "added" not in without),
    )  # fmt: skip
    elements = channels * positions // (32 * warps) if most else 0
    return Case(" ".join(filter(None, words)), kernel, types, constants, warps, divisible, elements=elements, most=most,
                maxnreg=blocks.get("maxnreg"), read=bool(most))  # fmt: skip


def largest(on_chip, per_group, *how):
    """The largest group that is read once, and the largest that does not fill its tile."""
    for ragged in (0, 1):
        yield [blocks for blocks in (on_chip(per_group, 2**k - ragged, *how) for k in range(1, 16)) if blocks][-1]


def sites():
    """What benches/gpu_ops.py times, as it is launched there. In the time in which an H200 moves an element of bfloat16 at 4.3e12
    bytes a second it issues 14 instructions for one that is only read, 28 for one that is written too (30e12 a second: 132 SMs,
    4 a cycle, 32 threads, 1.755 GHz)."""
    for per_group, positions, channels_last in (
        (40, 256, False), (80, 64, False), (20, 1024, False), (8, 256, False), (4, 1024, False), (40, 256, True), (80, 64, True),
    ):  # fmt: skip
        blocks = forward.on_chip(per_group, positions, channels_last, True)
        yield case("one_read", forward.one_read, "bf16", channels_last, blocks, without=AT_A_SITE, most=20)
        if per_group == 40:
            blocks = forward.on_chip(per_group, positions, channels_last, True, added=True)
            yield case("one_read", forward.one_read, "bf16", channels_last, blocks, without=AT_A_SITE - {"added"}, most=22)
    for channels, positions, channels_last, most in (
        (320, 4096, False, (9, 13)), (1280, 1024, False, (12, 13)), (320, 4096, True, (13.5, 13.5)),
    ):  # fmt: skip
        cut = forward.Split.of(channels, positions, channels_last)
        for name, limit in zip(("moments", "apply"), most, strict=True):
            blocks = cut.blocks(True, all_registers=name == "moments")
            yield case(name, SPLIT[name], "bf16", channels_last, blocks, without=AT_A_SITE, most=limit, known=("tiles",))


def cases(everything):
    yield from sites()
    dtypes = ("fp32", "fp16", "bf16") if everything else ("bf16",)
    groups = (1, 4, 5, 10, 16, 20, 30, 40, 64, 80) if everything else (20,)
    for dtype, channels_last in product(dtypes, (False, True) if everything else (False,)):
        for aligned, per_group in product((True, False), groups):
            for added in (False, True) if everything else (False,):  # a residual or an embedding, never both
                more = {"aligned": aligned, "without": {"residual", "total"} if added else {"added"}}
                for blocks in largest(forward.on_chip, per_group, channels_last, aligned, added):
                    yield case("one_read", forward.one_read, dtype, channels_last, blocks, **more)
            limit = backward.ONE_READ_BACKWARD if aligned and not channels_last else backward.ONE_READ_BACKWARD // 2
            for blocks in largest(backward.on_chip, per_group, limit):
                yield case("one_read_backward", backward.one_read_backward, dtype, channels_last, blocks, aligned=aligned)
        bare = {"without": OPTIONAL}
        yield case("one_read", forward.one_read, dtype, channels_last, forward.on_chip(4, 1024, channels_last, True), **bare)
        blocks = backward.on_chip(4, 1024, backward.ONE_READ_BACKWARD)
        yield case("one_read_backward", backward.one_read_backward, dtype, channels_last, blocks, **bare)
        shapes = [(320, 4096)] + ([(3, 70), (321, 4095), (1280, 1024)] if everything else [])
        for (name, kernel), (channels, positions) in product(SPLIT.items(), shapes):
            cut = forward.Split.of(channels, positions, channels_last)
            wide, narrow = (cut.blocks(w, kernel is not forward.apply) for w in (True, False))
            yield case(name, kernel, dtype, channels_last, wide, known=("tiles",))
            if everything:
                yield case(name, kernel, dtype, channels_last, wide)
                yield case(name, kernel, dtype, channels_last, narrow, aligned=False)
                yield case(name, kernel, dtype, channels_last, wide, without=OPTIONAL)
    for per_group in (1, 20):  # an image of one pixel, or no image
        known = ("positions", "xb", "xc", "xs", "groups")[: 1 if per_group > 1 else 5]
        blocks = forward.on_chip(per_group, 1, True, False)
        yield case("one_read", forward.one_read, "bf16", True, blocks, aligned=False, known=known, without={"added"})
        known = (*known, "per_group") if per_group == 1 else known
        blocks = backward.on_chip(per_group, 1, backward.ONE_READ_BACKWARD)
        yield case("one_read_backward", backward.one_read_backward, "bf16", True, blocks, aligned=False, known=known)
    yield case("join", forward.join, "bf16", False, {"BLOCK": 1024, "BLOCK_C": 128})
    for splits in (1, 8, 64) if everything else (64,):
        blocks = {"BLOCK_C": 8, "BLOCK": splits, "num_warps": 4, "maxnreg": registers(4)}
        yield case("totals", backward.totals, "bf16", False, blocks)
