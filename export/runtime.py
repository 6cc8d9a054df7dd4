"""Engines under ONNX Runtime: a checked folder, a session on a provider that is the one asked for, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FastdiffError
from ..noise import normal_numpy
from ..plans import Plan
from ..schedule import from_config
from . import manifest as manifests
from .cache import cache_folder
from .need import need

if TYPE_CHECKING:
    from torch import Tensor

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider",
}  # fmt: skip  in the order `auto` tries them


@dataclass(frozen=True)
class Ask:
    """What may be asked of an engine beside seeds and labels, where it was exported for it; None is the engine's own."""

    guidance: float | None = None
    plan: Plan | None = None
    size: tuple[int, int] | None = None
    rtol: float | None = None
    atol: float | None = None


class Engine:
    """One ONNX file of an engine's folder, ready to run.

    Args:
        folder: what `fastdiff export` wrote; every file's hash is checked.
        part: "sampler" or "network".
        provider: "engine" for the folder's own TensorRT engine, or ONNX Runtime's "tensorrt", "cuda" or "cpu"; "auto" takes the
            first of these three that is here, and the engine before them where it runs. What runs is in `provider`.
        threads: of the CPU provider; default ONNX Runtime's own choice.

    Raises:
        CheckpointError: no engine there, or a damaged one.
        FastdiffError: onnxruntime is missing, an unknown provider, or one that this installation does not have.
    """

    def __init__(self, folder: str | Path, part: str = "sampler", provider: str = "auto", threads: int | None = None) -> None:
        self.manifest = manifests.read(folder)
        self.folder = Path(folder)
        self.notes: list[str] = []  # what a user should know of how it runs
        if not self.manifest.get("verified", True):
            self.notes.append(f"this engine was never compared with the eager sampler: {self.manifest.get('why')}")
        self.evaluations: int | None = None  # of each sample in the last run, where step size is adaptive
        self.session, self.provider = self._open(Path(folder), part, provider, threads)
        self.inputs = [i.name for i in self.session.get_inputs()]

    def _open(self, folder: Path, part: str, provider: str, threads: int | None) -> tuple[Any, str]:
        if provider == "engine" or (provider == "auto" and self.manifest.get("tensorrt", {}).get("built")):
            from .native import open_engine

            try:
                return open_engine(folder, self.manifest, part), "engine"
            except FastdiffError as e:
                if provider == "engine":
                    raise
                self.notes.append(f"not the engine: {e}")
        return session(folder / f"{part}.onnx", provider, threads)

    def sample(self, seeds: Sequence[int], labels: Sequence[int] | None = None, ask: Ask | None = None) -> np.ndarray:
        """Samples (B, *shape) float32 in the model's data range; one seed, and one label, a sample. Noise is made here.

        Raises:
            FastdiffError: labels missing, not wanted or out of range; something asked for that the engine was not exported with.
        """
        return self._run("x", seeds, labels, ask or Ask())

    def images(self, seeds: Sequence[int], labels: Sequence[int] | None = None, ask: Ask | None = None) -> np.ndarray:
        """As `sample`, but images (B, *shape) in [0, 1]."""
        return self._run("images", seeds, labels, ask or Ask())

    def evaluate(self, feed: Mapping[str, Tensor], shape: Sequence[int]) -> Tensor:
        """x0 of network.onnx, float32 of this shape, by IO binding: tensors stay where the provider computes."""
        import torch

        if self.provider == "engine":
            return self.session.call({n: v.to("cuda", self.session.dtypes[n]).contiguous() for n, v in feed.items()})["x0"]
        given = {name: v.to(self.device).contiguous() for name, v in feed.items()}
        out = torch.empty(tuple(shape), dtype=torch.float32, device=self.device)
        binding = self.session.io_binding()
        kind = np.dtype
        for name, v in given.items():
            binding.bind_input(name, v.device.type, v.device.index or 0, kind(str(v.dtype)[6:]), tuple(v.shape), v.data_ptr())
        binding.bind_output("x0", out.device.type, out.device.index or 0, np.float32, tuple(out.shape), out.data_ptr())
        if out.is_cuda:
            torch.cuda.current_stream().synchronize()  # ONNX Runtime computes on a stream of its own
        self.session.run_with_iobinding(binding)
        return out

    @property
    def device(self) -> str:
        """Where the provider keeps its tensors."""
        return "cpu" if self.provider == "cpu" else "cuda"

    def _run(self, output: str, seeds: Sequence[int], labels: Sequence[int] | None, ask: Ask) -> np.ndarray:
        shape = self._shape(ask.size)
        made = self.manifest["plan"]["draws"] if ask.plan is None else ask.plan.draws
        draws = [normal_numpy(seeds, k, int(np.prod(shape))).reshape(-1, *shape) for k in range(made + 1)]
        feed = {"noise": draws[0], **self._plan_inputs(ask.plan)}
        if "noises" in self.inputs:
            feed["noises"] = np.stack(draws[1:]) if made else np.zeros((1, *draws[0].shape), np.float32)
        self._add_labels(feed, len(seeds), labels)
        self._add_numbers(feed, ask)
        if missing := set(self.inputs) - set(feed):
            raise FastdiffError(f"this engine asks for {', '.join(sorted(missing))}, which seeds and labels do not give")
        wanted = [output, *(("nfe",) if "control" in self.manifest else ())]
        found, *counted = self.session.run(wanted, feed)
        self.evaluations = int(counted[0]) if counted else None
        return np.asarray(found)

    def _shape(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        own, multiple = tuple(self.manifest["source"]["shape"]), self.manifest.get("multiple", 0)
        if size is None or size == own[-2:]:
            return own
        if not multiple:
            given = f"given {size[0]}x{size[1]}: export with --dynamic-size"
            raise FastdiffError(f"this engine makes {own[-2]}x{own[-1]} alone; {given}")
        if any(v < 1 or v % multiple for v in size):
            raise FastdiffError(f"this engine's height and width are multiples of {multiple}; given {size[0]}x{size[1]}")
        return (*own[:-2], *size)

    def _plan_inputs(self, plan: Plan | None) -> dict[str, np.ndarray]:
        """The arrays that say which plan: the exported one's, or another's."""
        from .columns import acts_at
        from .planinput import Layout

        layout = self.manifest.get("plan_input")
        if layout is None:
            if plan is not None:
                raise FastdiffError("this engine holds one plan; export with --plan-input to give it others")
            return {}
        if plan is None:
            with np.load(self.folder / "plan.npz", allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        times = np.array([row.t for row in plan.rows if row.calls])
        levels, _ = session(self.folder / "levels.onnx", "cpu")
        scalars = np.stack(levels.run(None, {"t": times}), axis=1).astype(np.float64)
        low, high = (self.manifest["guidance"] or {}).get("interval", (0.0, None))
        schedule = from_config(self.manifest["source"]["schedule"])
        acts = acts_at(schedule, times, low, float("inf") if high is None else high)
        return Layout(**layout).arrays(plan, scalars, acts)

    def _add_numbers(self, feed: dict[str, Any], ask: Ask) -> None:
        """Scale and tolerances: given, or the engine's own."""
        guidance, control = self.manifest["guidance"] or {}, self.manifest.get("control") or {}
        asked = {"guidance_scale": (ask.guidance, guidance.get("default")), "rtol": (ask.rtol, control.get("rtol")),
                 "atol": (ask.atol, control.get("atol"))}  # fmt: skip
        for name, (given, default) in asked.items():
            if name in self.inputs:
                feed[name] = np.array(default if given is None else given, np.float32)
            elif given is not None and (name, given) != ("guidance_scale", 1.0):
                how = "guidance: export again with --guidance" if name == "guidance_scale" else f"{name}: export with --adaptive"
                raise FastdiffError(f"given {name} {given:g}; this engine was exported without {how}")

    def _add_labels(self, feed: dict[str, Any], count: int, labels: Sequence[int] | None) -> None:
        wanted = "class_labels" in self.inputs
        if wanted != (labels is not None) or (labels is not None and len(labels) != count):
            raise FastdiffError(f"this engine takes {'one class label a sample' if wanted else 'no class labels'}")
        if labels is None:
            return
        low, high = next(i.get("range", (0, 2**31)) for i in self.manifest["sampler"]["inputs"] if i["name"] == "class_labels")
        if not all(low <= label <= high for label in labels):
            raise FastdiffError(f"class labels are {low} to {high} for this engine; given {min(labels)} to {max(labels)}")
        feed["class_labels"] = np.array(labels, np.int64)


def session(path: Path, provider: str = "auto", threads: int | None = None) -> tuple[Any, str]:
    """An ONNX Runtime session and the name of the provider it really has.

    Raises:
        FastdiffError: onnxruntime is missing, an unknown provider, one that is not here or did not start.
    """
    ort = need("onnxruntime")
    if provider not in ("auto", *PROVIDERS):
        raise FastdiffError(f"--provider is auto, {', '.join(PROVIDERS)}; given {provider!r}")
    here = [name for name, full in PROVIDERS.items() if full in ort.get_available_providers()]
    chosen = here if provider == "auto" else [provider]
    if not set(chosen) <= set(here):
        raise FastdiffError(f"provider {provider} is not in this onnxruntime; it has {', '.join(here)}")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    full = [(PROVIDERS[name], _options(name)) for name in dict.fromkeys([*chosen, "cpu"])]
    try:
        made = ort.InferenceSession(str(path), options, providers=full)
    except Exception as e:
        raise FastdiffError(f"onnxruntime cannot open {path}: {str(e).splitlines()[0]}") from e
    # a provider that fails to start is replaced by the next without a word: what the session has is asked, and told
    used = next(name for name, f in PROVIDERS.items() if f == made.get_providers()[0])
    if provider != "auto" and used != provider:
        raise FastdiffError(f"provider {provider} did not start (onnxruntime took {used}): check its libraries and driver")
    return made, used


def _options(provider: str) -> dict[str, Any]:
    """TensorRT's engines and timings are kept; it names them by the model's content, its own version and the GPU."""
    if provider != "tensorrt":
        return {}
    kept = cache_folder("onnxruntime")
    kept.mkdir(parents=True, exist_ok=True)
    return {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(kept), "trt_timing_cache_enable": True,
            "trt_timing_cache_path": str(kept)}  # fmt: skip
