"""What the launcher of combine asks the compiler for."""

from itertools import product

from cubins import Case

from fastdiff.kernels import combine_triton as m
from fastdiff.kernels.combine import INPUTS, OUTPUTS


def case(inputs, outputs, dtype, noise, aligned=True):
    types = {
        "inputs": ("*fp32", *(f"*{dtype}",) * (inputs - 1)), "strides": ("i32",) * inputs, "outputs": ("*fp32",) * outputs,
        "weights": "*fp32", "size": "i32", "draw": "i32", **({"seeds": "*i64"} if noise else {}),
    }  # fmt: skip
    divisible = {"inputs", "strides", "outputs", "size", *(["seeds"] if noise else [])} if aligned else set()
    title = f"rows {inputs}x{outputs} {dtype}{' noise' if noise else ''}{' aligned' if aligned else ''}"
    return Case(title, m.rows, types, {"BLOCK": m.block(inputs)}, m.WARPS, divisible)


def cases(everything):
    yield case(INPUTS, OUTPUTS, "bf16", True)
    yield case(4, 2, "fp32", True)
    yield case(1, 1, "fp32", False, aligned=False)
    if everything:
        for inputs, outputs, dtype, noise, aligned in product(
            (1, 4, 12, INPUTS), (1, 3, OUTPUTS), ("fp32", "fp16", "bf16"), (False, True), (False, True)
        ):
            yield case(inputs, outputs, dtype, noise, aligned)
