"""Running a TensorRT engine on torch's current stream. It has the face of an ONNX Runtime session: run(outputs, feed)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import FastdiffError
from ..files import sha256
from ..graph import Loop, record_cuda
from .cache import cache_folder
from .tensorrt import NotHere, Settings, build, engine_key, flavour_of, gpu, log_of, misfit

DTYPES = {  # TensorRT's names of what an export's inputs and outputs may be
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64, "INT32": torch.int32,
    "BOOL": torch.bool,
}  # fmt: skip


class Native:
    """A TensorRT engine ready to run.

    Args:
        data: the engine's bytes.
        form: "tensorrt" or "tensorrt-rtx".
        graphs: replay a CUDA graph for every set of shapes; not for engines with a Loop, whose length the host has to read.

    Raises:
        FastdiffError: no GPU, or TensorRT cannot load the engine (in its words).
    """

    def __init__(self, data: bytes, form: str, graphs: bool = False) -> None:
        flavour, trt = flavour_of(form)
        if gpu() is None:
            raise NotHere(f"{flavour.name}: running an engine needs an NVIDIA GPU, and torch sees none")
        self.trt, self.log = trt, log_of(flavour.module)
        runtime = trt.Runtime(self.log)
        engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise FastdiffError(f"{flavour.name} {trt.__version__} cannot load this engine: {self.log.last()}")
        self.engine, self.captures = engine, graphs and not flavour.own_graphs
        self.context = _context(engine, trt, graphs and flavour.own_graphs)
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.dtypes = {name: DTYPES[engine.get_tensor_dtype(name).name] for name in self.names}
        self.feeds = [name for name in self.names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._graphs: dict[tuple[Any, ...], tuple[dict[str, Tensor], dict[str, Tensor], Loop]] = {}

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.feeds]

    def run(self, outputs: Sequence[str], feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Arrays of the named outputs; `feed` is cast to what the engine takes."""
        given = {name: torch.from_numpy(np.asarray(feed[name])).to("cuda", self.dtypes[name]) for name in self.feeds}
        made = self.replay(given) if self.captures else self.call(given)
        return [made[name].cpu().numpy() for name in outputs]

    def call(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output (on the GPU) for these inputs (there too, contiguous), enqueued on torch's current stream."""
        context = self.context
        for name, v in given.items():
            if not context.set_input_shape(name, tuple(v.shape)):
                low, _, high = self.engine.get_tensor_profile_shape(name, 0)
                raise FastdiffError(f"{name} has shape {tuple(v.shape)}; this engine takes {tuple(low)} to {tuple(high)}")
            context.set_tensor_address(name, v.data_ptr())
        made = {}
        for name in self.names:
            if name not in given:
                made[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=self.dtypes[name], device="cuda")
                context.set_tensor_address(name, made[name].data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise FastdiffError(f"TensorRT failed: {self.log.last()}")
        return made

    def replay(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `call`, by the CUDA graph of these shapes, captured the first time; its outputs are overwritten by the next call."""
        key = tuple(tuple(given[name].shape) for name in self.feeds)
        if key not in self._graphs:
            own = {name: v.clone() for name, v in given.items()}
            made: dict[str, Tensor] = {}
            replay = record_cuda(lambda: made.update(self.call(own)))
            self._graphs[key] = own, made, replay
        own, made, replay = self._graphs[key]
        for name, v in given.items():
            own[name].copy_(v)
        replay()
        return made

    def refit(self, onnx: str | Path) -> None:
        """Replaces the weights by those of another export of the same network; the engine was built with `refit`."""
        refitter = self.trt.Refitter(self.engine, self.log)
        parser = self.trt.OnnxParserRefitter(refitter, self.log)
        if not (parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
            raise FastdiffError(f"TensorRT cannot refit this engine with {onnx}: {self.log.last()}")
        self._graphs.clear()


def _context(engine: Any, trt: Any, own_graphs: bool) -> Any:
    """TensorRT for RTX captures graphs itself when its runtime configuration says so."""
    if not own_graphs:
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)


def open_engine(folder: Path, manifest: Mapping[str, Any], part: str) -> Native:
    """The folder's engine for this machine: the one in it, or, where it holds none, one built here once and kept in the cache.

    Raises:
        FastdiffError: the folder was not exported for TensorRT, its engine is of another version or GPU, no TensorRT, no GPU.
    """
    made = manifest.get("tensorrt")
    if made is None:
        raise FastdiffError(f"{folder} holds no TensorRT engine: export with --format tensorrt or tensorrt-rtx")
    flavour, trt = flavour_of(made["form"])
    if made["built"]:
        if why := misfit(made, trt.__version__, gpu()):
            raise FastdiffError(f"{folder}: this engine cannot run here: {why}")
        data = (folder / f"{part}.engine").read_bytes()
    else:
        settings, path = Settings.read(made["settings"]), folder / f"{part}.onnx"
        key = engine_key(sha256(path), manifest["precision"], settings, flavour, trt.__version__, gpu())
        kept = cache_folder("engines", f"{key}.engine")
        if not kept.is_file():
            files.write_bytes(kept, build(path, settings, flavour, trt))
        data = kept.read_bytes()
    return Native(data, made["form"], graphs=part == "network" or manifest["form"] == "unrolled")
