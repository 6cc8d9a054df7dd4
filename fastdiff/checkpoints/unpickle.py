"""`python -m fastdiff.checkpoints.unpickle FILE OUT`: the tensors of a pickle -> safetensors. It may run the pickle's code.

Only `fastdiff convert --trust-pickle` starts it, as a process of its own. NVIDIA's pickles carry the source of their classes;
that source is not run: the objects are rebuilt as plain holders of their state, from which the weights are read.
"""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Holder:
    """An object of a class that is not here: its state."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def _held(meta: Mapping[str, Any]) -> Holder:
    """Stands for torch_utils.persistence._reconstruct_persistent_obj."""
    held = Holder()
    held.__dict__.update(meta["state"])
    held.__dict__["class_name"] = meta["class_name"]
    return held


class _Stub(types.ModuleType):
    """A module that is not installed; every name of it is a Holder."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Holder,), {})


class Lenient(pickle.Unpickler):
    """A full unpickler in which classes that cannot be imported become holders of their state."""

    def find_class(self, module: str, name: str) -> Any:
        if module.endswith("torch_utils.persistence") and name == "_reconstruct_persistent_obj":
            return _held
        if module.startswith("dnnlib") and name == "EasyDict":
            return dict
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return getattr(_Stub(module), name)


def load(path: Path) -> Any:
    """What the file holds, by torch's loader or, for a plain pickle, by pickle's own."""
    lenient = types.SimpleNamespace(Unpickler=Lenient, load=pickle.load, __name__="pickle")
    if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
        with open(path, "rb") as f:
            return Lenient(f).load()
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=lenient)


def tensors(value: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The named tensors in what a pickle held, and what it says of their network."""
    if isinstance(value, Mapping):
        for name in ("ema", "model_ema", "state_dict", "model", "net"):
            if name in value and not isinstance(value[name], Tensor):
                return tensors(value[name])
        return {str(k): v for k, v in value.items() if isinstance(v, Tensor)}, {}
    if isinstance(value, nn.Module):
        return dict(value.state_dict()), {"class_name": type(value).__name__}
    if isinstance(value, Holder):
        found: dict[str, Tensor] = {}
        _walk(vars(value), "", found)
        return found, {"class_name": str(vars(value).get("class_name", ""))}
    return {}, {}


def _walk(state: Mapping[str, Any], prefix: str, found: dict[str, Tensor]) -> None:
    """nn.Module's own dictionaries, wherever the class is not here to walk them."""
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + name: t for name, t in (state.get(kind) or {}).items() if isinstance(t, Tensor)}
    for name, child in (state.get("_modules") or {}).items():
        if child is not None:
            _walk(vars(child), f"{prefix}{name}.", found)


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    found, metadata = tensors(load(source))
    if not found:
        raise SystemExit("no named tensors in it")
    ready = {name: t.detach().cpu().clone().contiguous() for name, t in found.items()}
    save_file(ready, out, metadata={"converted_from": source.name, **metadata})
    print(json.dumps({"tensors": len(ready), **metadata}))


if __name__ == "__main__":
    main()
