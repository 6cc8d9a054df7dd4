"""int8 by static calibration: a network's ONNX model with quantised convolutions and matrix products (Q/DQ, per channel), their
ranges measured on the sampler's own trajectory."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from ..denoiser import Denoiser
from ..errors import FastdiffError
from ..plans import Plan
from ..sampling import sample
from .graph import IR, clean
from .need import need
from .network import Traced

KINDS = ("Conv", "Gemm", "MatMul")
SEEDS = range(2**32, 2**32 + 8)  # none that anyone samples


def quantised(traced: Traced, denoiser: Denoiser, plan: Plan) -> Traced:
    """The traced network in int8. `denoiser` is what the engine samples with, guided or not, bound for `len(SEEDS)` samples.

    Weights take 7 of the 8 bits: processors without VNNI add two products in 16 bits, where 8 saturate, and an engine may run on
    any (with 8 the error on a tiny network is 0.065 on such a processor, beyond the gate's 0.05).

    Raises:
        FastdiffError: a network that is no nn.Module, whose calls cannot be watched.
    """
    tools = need("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as name:
        plain, prepared, made = (Path(name) / f"{stem}.onnx" for stem in ("plain", "prepared", "made"))
        onnx.save_model(traced.model, str(plain))
        tools.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        tools.quantize_static(
            str(prepared), str(made), _reader(tools, _calls(traced, denoiser, plan)), quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=list(KINDS), per_channel=True, activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8, reduce_range=True,
        )  # fmt: skip
        model = onnx.load(str(made))
    model.ir_version = IR
    return replace(traced, model=clean(model))


def _reader(tools: Any, feeds: list[dict[str, np.ndarray]]) -> Any:
    """What the calibration reads: feeds, one after the other, then None."""

    class Reader(tools.CalibrationDataReader):
        left = iter(feeds)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    return Reader()


def _calls(traced: Traced, denoiser: Denoiser, plan: Plan) -> list[dict[str, np.ndarray]]:
    """What the network is given at every call of the plan, under the model's names of its inputs."""
    network = denoiser.network
    if not isinstance(network, nn.Module):
        raise FastdiffError(f"int8 needs a network that is an nn.Module; given {type(network).__name__}")
    names = [i.name for i in traced.model.graph.input]
    feeds: list[dict[str, np.ndarray]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *(kwargs[c.name] for c in traced.conditions)]
        feeds.append({n: torch.as_tensor(v).cpu().numpy() for n, v in zip(names, given, strict=True)})

    handle = network.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        sample(denoiser, plan, seeds=SEEDS, device="cpu")
    finally:
        handle.remove()
    return feeds
