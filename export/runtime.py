"""Engines under ONNX Runtime: a checked folder, a session on a provider that is the one asked for, and what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FastdiffError
from ..noise import normal_numpy
from . import manifest as manifests
from .need import need

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider", "cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider",
}  # fmt: skip  in the order `auto` tries them


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
        self.notes: list[str] = []  # what a user should know of how it runs
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

    def sample(self, seeds: Sequence[int], labels: Sequence[int] | None = None, guidance: float | None = None) -> np.ndarray:
        """Samples (B, *shape) float32 in the model's data range; one seed, and one label, a sample. Noise is made here.

        Raises:
            FastdiffError: labels missing, not wanted or out of range; guidance for an engine without it.
        """
        return self._run("x", seeds, labels, guidance)

    def images(self, seeds: Sequence[int], labels: Sequence[int] | None = None, guidance: float | None = None) -> np.ndarray:
        """As `sample`, but images (B, *shape) in [0, 1]."""
        return self._run("images", seeds, labels, guidance)

    def _run(self, output: str, seeds: Sequence[int], labels: Sequence[int] | None, guidance: float | None) -> np.ndarray:
        shape = self.manifest["source"]["shape"]
        count = int(np.prod(shape))
        draws = [normal_numpy(seeds, k, count).reshape(-1, *shape) for k in range(self.manifest["plan"]["draws"] + 1)]
        feed = {"noise": draws[0]}
        if draws[1:]:
            feed["noises"] = np.stack(draws[1:])
        self._add_labels(feed, len(seeds), labels)
        if "guidance_scale" in self.inputs:
            default = self.manifest["guidance"]["default"]
            feed["guidance_scale"] = np.array(default if guidance is None else guidance, np.float32)
        elif guidance not in (None, 1.0):
            raise FastdiffError(f"this engine was exported without guidance; given {guidance:g}: export again with --guidance")
        if missing := set(self.inputs) - set(feed):
            raise FastdiffError(f"this engine asks for {', '.join(sorted(missing))}, which seeds and labels do not give")
        return np.asarray(self.session.run([output], feed)[0])

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
    full = [PROVIDERS[name] for name in dict.fromkeys([*chosen, "cpu"])]
    try:
        made = ort.InferenceSession(str(path), options, providers=full)
    except Exception as e:
        raise FastdiffError(f"onnxruntime cannot open {path}: {str(e).splitlines()[0]}") from e
    # a provider that fails to start is replaced by the next without a word: what the session has is asked, and told
    used = next(name for name, f in PROVIDERS.items() if f == made.get_providers()[0])
    if provider != "auto" and used != provider:
        raise FastdiffError(f"provider {provider} did not start (onnxruntime took {used}): check its libraries and driver")
    return made, used
