"""TensorRT engines from an export's ONNX files: one builder for TensorRT 10, TensorRT 11 and TensorRT for RTX.

What the three do differently is one table, FLAVOURS. Networks are strongly typed everywhere: the precision is the ONNX file's.
An engine serves the GPUs and versions it was built for and no others; `misfit` says which, before anything is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import files
from ..errors import FastdiffError
from .cache import cache_folder

FORMS = ("tensorrt", "tensorrt-rtx")
HARDWARE = ("own", "capability", "ampere")
Range = tuple[int, int, int]  # smallest, most usual and largest size
RANGES: Mapping[str, Range] = {"batch": (1, 4, 16), "rows": (1, 8, 64), "draws": (1, 8, 64)}


class NotHere(FastdiffError):
    """The package of a TensorRT is missing, or a GPU that building with it needs."""


@dataclass(frozen=True)
class Flavour:
    """A member of the family, by what it does differently."""

    name: str
    form: str  # what --format calls it
    module: str
    majors: tuple[int, ...]
    install: str
    typed_by_flag: bool = False  # strong typing is asked for; later versions know nothing else
    gpu_to_build: bool = True
    timing_cache: bool = True
    portable: bool = True  # knows engines for later versions and for other GPUs of a kind
    capabilities: tuple[str, ...] = ()  # GPUs that one engine can be built for without having them
    usual: tuple[str, ...] = ()  # those it is built for unless told; not Turing (SM75), which has no float32 matrix products
    own_graphs: bool = False  # captures CUDA graphs itself


FLAVOURS = (
    Flavour("TensorRT 10", "tensorrt", "tensorrt", (10,), "pip install 'tensorrt>=10,<11'", typed_by_flag=True),
    Flavour("TensorRT 11", "tensorrt", "tensorrt", (11,), "pip install 'tensorrt>=11'"),
    Flavour(
        "TensorRT for RTX", "tensorrt-rtx", "tensorrt_rtx", (1,), "pip install 'fastdiff[rtx]'", gpu_to_build=False,
        timing_cache=False, portable=False, capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"),
        usual=("SM80", "SM86", "SM89", "SM120", "SM121"), own_graphs=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """How engines are built.

    Args:
        ranges: for each size that may vary ("batch", ...) its smallest, most usual and largest value.
        hardware: "own": this GPU's; "capability": GPUs of the same compute capability; "ampere": Ampere and later.
        version_compatible: later versions of TensorRT can run it too (slower).
        refit: weights can be replaced without building again.
        level: 0 to 5, how long the builder looks for fast kernels; default its own choice.
        capabilities: for TensorRT for RTX, the GPUs to build for ("SM86", ...); default all from Ampere on.
    """

    ranges: Mapping[str, Range] = field(default_factory=lambda: dict(RANGES))
    hardware: str = "own"
    version_compatible: bool = False
    refit: bool = False
    level: int | None = None
    capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, sizes in self.ranges.items():
            if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
                given = ",".join(map(str, sizes))
                raise FastdiffError(f"the {name} profile is smallest,usual,largest, such as 1,4,16; given {given}")
        if self.hardware not in HARDWARE:
            raise FastdiffError(f"--hardware is {', '.join(HARDWARE)}; given {self.hardware!r}")

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Settings:
        """Settings from a manifest."""
        ranges = {name: tuple(map(int, sizes)) for name, sizes in data["ranges"].items()}
        return cls(**{**data, "ranges": ranges, "capabilities": tuple(data["capabilities"])})

    def check(self, flavour: Flavour) -> None:
        """Refuses what this member of the family cannot do."""
        if not flavour.portable and (self.version_compatible or self.hardware != "own"):
            raise FastdiffError(f"{flavour.name} takes no --version-compatible and no --hardware: it has --capabilities instead")
        if unknown := set(self.capabilities) - set(flavour.capabilities):
            known = ", ".join(flavour.capabilities) or "none: it builds for its own GPU"
            raise FastdiffError(f"{flavour.name} has capabilities {known}; given {', '.join(sorted(unknown))}")


def sized(settings: Settings, shape: tuple[int, ...], multiple: int) -> Settings:
    """The settings for heights and widths from one multiple to four times the shape's own."""
    sizes = {name: (multiple, v, 4 * v) for name, v in zip(("height", "width"), shape[-2:], strict=True)}
    return replace(settings, ranges={**settings.ranges, **sizes})


def flavour_of(form: str) -> tuple[Flavour, Any]:
    """The installed member of the family that a format names, and its module.

    Raises:
        NotHere: not installed, or a version that is not in FLAVOURS.
    """
    known = [f for f in FLAVOURS if f.form == form]
    try:
        trt = importlib.import_module(known[-1].module)
    except (ImportError, OSError) as e:
        raise NotHere(f"{form} is not installed: {known[-1].install} ({str(e).splitlines()[0]})") from e
    for flavour in known:
        if int(trt.__version__.split(".")[0]) in flavour.majors:
            return flavour, trt
    raise NotHere(f"{known[-1].module} {trt.__version__} is not one this version knows: {known[-1].install}")


def gpu() -> dict[str, Any] | None:
    """This machine's GPU as an engine remembers it, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}


def engine_key(onnx: str, precision: str, settings: Settings, flavour: Flavour, version: str, where: Any) -> str:
    """What an engine depends on, as one hash: the ONNX file's own (sha256), profile, precision, version and GPU."""
    parts = [onnx, precision, asdict(settings), flavour.name, version, where]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def misfit(made: Mapping[str, Any], version: str, here: Mapping[str, Any] | None) -> str | None:
    """Why an engine does not run under this version on this GPU, or None where it does. `made` is the manifest's record."""
    if here is None:
        return "it needs an NVIDIA GPU, and torch sees none"
    settings, built = Settings.read(made["settings"]), made["version"]
    newer = [int(v) for v in version.split(".")[:2]] >= [int(v) for v in built.split(".")[:2]]
    again = "export it again on this machine"
    if version != built and not (settings.version_compatible and newer):
        return f"it was built with {made['flavour']} {built}, here is {version}: {again}"
    name, (major, minor) = here["name"], here["capability"]
    if made["capabilities"]:
        fits, built = f"SM{major}{minor}" in made["capabilities"], ", ".join(made["capabilities"])
    elif settings.hardware == "ampere":
        fits, built = major >= 8, "Ampere and later"
    else:
        fits = made["gpu"]["capability"] == [major, minor] and (settings.hardware == "capability" or made["gpu"]["name"] == name)
        built = made["gpu"]["name"]
    return None if fits else f"it was built for {built}, here is {name} (SM{major}{minor}): {again}"


def build(path: Path, settings: Settings, flavour: Flavour, trt: Any) -> bytes:
    """The engine of an ONNX file.

    Raises:
        NotHere: this flavour builds with a GPU only, and there is none.
        FastdiffError: the file has something that TensorRT refuses (in its words), or settings it does not know.
    """
    settings.check(flavour)
    if gpu() is None and (flavour.gpu_to_build or settings.refit):
        what = "building with --refit" if not flavour.gpu_to_build else "building"
        raise NotHere(f"{flavour.name}: {what} needs an NVIDIA GPU, and torch sees none")
    log = log_of(flavour.module)
    log.said.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if flavour.typed_by_flag else 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        why = str(parser.get_error(0)) if parser.num_errors else log.last()
        raise FastdiffError(f"{flavour.name} cannot read {path.name}: {why}")
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, path, settings))
    _apply(config, settings, flavour, trt)
    if settings.refit:
        _mark_weights(network, config, path, trt)
    cache, kept = None, cache_folder("timing", f"{flavour.module}-{trt.__version__}.cache")
    if flavour.timing_cache:
        cache = config.create_timing_cache(kept.read_bytes() if kept.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise FastdiffError(f"{flavour.name} cannot build {path.name}: {log.last()}")
    if cache is not None:
        files.write_bytes(kept, bytes(cache.serialize()))
    return bytes(engine)


def _apply(config: Any, settings: Settings, flavour: Flavour, trt: Any) -> None:
    """The settings that are not shapes."""
    if settings.level is not None:
        config.builder_optimization_level = settings.level
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware != "own":
        level = trt.HardwareCompatibilityLevel
        both = {"capability": level.SAME_COMPUTE_CAPABILITY, "ampere": level.AMPERE_PLUS}
        config.hardware_compatibility_level = both[settings.hardware]
    if flavour.capabilities:
        chosen = settings.capabilities or flavour.usual
        config.num_compute_capabilities = len(chosen)
        for i, name in enumerate(chosen):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)


def _profile(builder: Any, path: Path, settings: Settings) -> Any:
    """One profile: every named size of every input within its range."""
    import onnx

    profile = builder.create_optimization_profile()
    for tensor in onnx.load(str(path), load_external_data=False).graph.input:
        dims = [d.dim_param or d.dim_value for d in tensor.type.tensor_type.shape.dim]
        if missing := {d for d in dims if isinstance(d, str)} - set(settings.ranges):
            raise FastdiffError(f"the profile says nothing about {', '.join(sorted(missing))} of {tensor.name}")
        if any(isinstance(d, str) for d in dims):
            shapes = [tuple(settings.ranges[d][k] if isinstance(d, str) else d for d in dims) for k in range(3)]
            profile.set_shape(tensor.name, *shapes)
    return profile


def _mark_weights(network: Any, config: Any, path: Path, trt: Any) -> None:
    """The network's own weights can be refitted; not its scalars, which the compiler folds into code."""
    config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
    for name in refittable(path):
        network.mark_weights_refittable(name)


def refittable(path: Path) -> list[str]:
    """The names of the network's weights of more than one dimension in an ONNX file, wherever in it they lie."""
    import onnx

    from .graph import graphs
    from .network import WEIGHTS

    model = onnx.load(str(path), load_external_data=False)
    return [t.name for g in graphs(model.graph) for t in g.initializer if t.name.startswith(WEIGHTS) and len(t.dims) > 1]


@functools.cache
def log_of(module: str) -> Any:
    """One logger a process, as TensorRT wants it; it keeps the errors, for the one line that a user reads."""
    trt = importlib.import_module(module)

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.said.append(text)

        def last(self) -> str:
            return self.said[-1] if self.said else "it gave no reason"

    return Log()


def build_engines(folder: Path, form: str, settings: Settings, precision: str) -> dict[str, Any]:
    """sampler.engine and network.engine beside the ONNX files; the manifest's record of them. Where TensorRT or its GPU is
    missing nothing is built, and the record says why and holds the settings, by which another machine builds."""
    record: dict[str, Any] = {"form": form, "settings": asdict(settings), "built": False, "executed": False}
    try:
        flavour, trt = flavour_of(form)
        record |= {"flavour": flavour.name, "version": trt.__version__, "gpu": gpu(), "keys": {}}
        record["capabilities"] = list(settings.capabilities or flavour.usual)
        for part in ("sampler", "network"):
            path = folder / f"{part}.onnx"
            files.write_bytes(path.with_suffix(".engine"), build(path, settings, flavour, trt))
            key = engine_key(files.sha256(path), precision, settings, flavour, trt.__version__, gpu())
            record["keys"][part] = key
    except NotHere as e:
        return {**record, "why": f"no engine was built: {e}; `fastdiff run --provider engine` builds it where both are"}
    return {**record, "built": True, "why": "built, and not run: that needs an NVIDIA GPU"}
