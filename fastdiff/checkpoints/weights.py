"""Weights on disk <-> named tensors: memory-mapped where the file allows it, no code run, nothing dropped.

Files come from strangers. Everything a file declares (sizes, shapes, names of other files) is checked before it is used, so a
malformed one costs one line of message, not memory or time.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..files import atomic, sha256

LARGEST_JSON = 16 << 20  # bytes: the index of the largest sharded model known has 0.2 MB
LARGEST_PICKLE = 64 << 20  # bytes of structure (names, shapes) inside a torch file; Stable Diffusion's has 0.4 MB
ZIP, BEFORE_ZIP = b"PK\x03\x04", b"\x80\x02"  # how torch's files begin: since 1.6, and before (pickles and raw storages)
LARGEST_NUMBER = 1_000_000  # in a configuration: sizes and counts; the largest in use are vocabularies of 250,000
MOST_TENSORS = 100_000
TRAINING = "fastdiff_training"  # in a file's metadata
CONVERT = "`fastdiff convert FILE --trust-pickle` reads it in a process of its own, if you trust where it comes from"


@dataclass
class Weights:
    """The tensors of a checkpoint by name, the metadata stored with them, and the files they came from."""

    tensors: dict[str, Tensor]
    paths: tuple[Path, ...]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """sha256 of the file; of the files' digests where there are several."""
        digests = [sha256(path) for path in self.paths]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    @property
    def training(self) -> dict[str, Any]:
        """{"training": what `fastdiff train` wrote of its run into the file}; empty for any other file."""
        if TRAINING not in self.metadata:
            return {}
        try:
            found = json.loads(self.metadata[TRAINING])
            shape = found["shape"]
            known = len(shape) == 3 and all(isinstance(side, int) and side > 0 for side in shape)
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise CheckpointError(f"{self.paths[0]}: what it says of its training is damaged")
        check_values(shape, self.paths[0], "shape")
        return {"training": found}

    @property
    def trained_shape(self) -> tuple[int, ...] | None:
        """Of one sample that `fastdiff train` trained on; None where it did not."""
        training = self.training
        return tuple(training["training"]["shape"]) if training else None

    def below(self, *prefixes: str) -> dict[str, Tensor]:
        """The tensors whose names begin with the first of these prefixes that any name begins with, without it."""
        for prefix in prefixes:
            if found := {name[len(prefix) :]: t for name, t in self.tensors.items() if name.startswith(prefix)}:
                return found
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: no such file, too large, too deep, not JSON, or not an object.
    """
    try:
        with open(path, "rb") as f:
            data = f.read(LARGEST_JSON + 1)
        found = json.loads(data) if len(data) <= LARGEST_JSON else None
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not readable JSON: {str(e)[:200]}") from e
    if len(data) > LARGEST_JSON:
        raise CheckpointError(f"{path} has more than {LARGEST_JSON:,} bytes; that is no description of a network")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object (names and values); it holds a {type(found).__name__}")
    return found


def check_values(value: Any, where: Path, name: str = "") -> None:
    """Refuses sizes that no network has, before a class computes a table of that size."""
    if isinstance(value, dict | list):
        if len(value) > 10_000:
            raise CheckpointError(f"{where}: {name[:60]} has {len(value):,} entries")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_values(inner, where, str(key) if isinstance(value, dict) else name)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        raise CheckpointError(f"{where}: {name[:60]} = {value} is beyond any network's size")


def read(path: Path) -> Weights:
    """The weights of a .safetensors file, a torch file, or an index of shards (`*.index.json`).

    Raises:
        CheckpointError: damaged, unsafe, or larger than it can be.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    tensors, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if len(tensors) > MOST_TENSORS:
        raise CheckpointError(f"{path} holds {len(tensors):,} tensors; at most {MOST_TENSORS:,} are read")
    for name, t in tensors.items():
        _check_tensor(path, name, t)
    return Weights(tensors, (path,), metadata)


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, which appears whole or not at all; the same content is the same bytes."""
    with atomic(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)
        if len(metadata) > 1:  # the library writes them in the order of a hash table, another one each time
            _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    with open(path, "rb+") as f:
        size = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # as compact as the library's own, but for what a stranger may have put into it
            f.seek(8)
            f.write(text.ljust(size))


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{path} is not a readable safetensors file (truncated or damaged?): {why}") from e


def _read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What torch.save wrote, by torch's loader that knows tensors and containers only; k-diffusion's has its "config" beside."""
    zipped = _check_container(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)
    except pickle.UnpicklingError as e:
        named = re.search(r"GLOBAL ([\w.]+)", str(e))
        what = f"it asks for {named[1]}" if named else "its structure is damaged, or holds more than tensors"
        raise CheckpointError(f"{path} is a pickle that could run code or is damaged ({what}): not opened; {CONVERT}") from e
    except (OSError, RuntimeError, EOFError, TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError,
            OverflowError, RecursionError, MemoryError, struct.error) as e:  # fmt: skip
        why = " ".join(str(e).split())[:200]
        raise CheckpointError(f"{path} is not a readable torch file (truncated or damaged?): {why}") from e
    config = found.get("config") if isinstance(found, Mapping) else None
    try:
        metadata = {"config": json.dumps(config)} if isinstance(config, dict) else {}
    except (TypeError, ValueError, RecursionError):  # another program's, which nothing here reads
        metadata = {}
    return _flat(path, found), metadata


def _check_container(path: Path) -> bool:
    """Whether it is torch's zip format; a zip whose entries could unpack to more than the file is refused."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(4)
        entries = []
        if start == ZIP:
            with zipfile.ZipFile(path) as z:
                entries = z.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as e:
        raise CheckpointError(f"{path} is not a readable torch file (truncated or damaged?): {str(e)[:200]}") from e
    if start[:2] == BEFORE_ZIP:
        return False
    if start != ZIP:
        raise CheckpointError(f"{path} is no torch file: it begins with {start!r}; other pickles are not opened ({CONVERT})")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} is a zip that unpacks to more than its size: not opened (torch stores uncompressed)")
    if any(e.filename.endswith(".pkl") and e.file_size > LARGEST_PICKLE for e in entries):
        raise CheckpointError(f"{path} has a structure of more than {LARGEST_PICKLE:,} bytes; that is no checkpoint")
    return True


def _flat(path: Path, found: Any) -> dict[str, Tensor]:
    """The state dict in what was saved: itself, or under the names that trainers give it."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            break
        for name in ("ema", "model_ema", "state_dict", "model", "module", "params_ema", "params"):
            if isinstance(found.get(name), Mapping):
                found = found[name]
                break
        else:
            break
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not a state dict of named tensors")
    if len(found) > MOST_TENSORS:
        raise CheckpointError(f"{path} holds {len(found):,} entries; at most {MOST_TENSORS:,} are read")
    other = [str(name)[:60] for name, value in found.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if other:
        raise CheckpointError(f"{path}: {len(other)} entries of its state dict are no named tensors: {listed(other)}")
    return dict(found)


def _check_tensor(path: Path, name: str, t: Tensor) -> None:
    """A tensor must be what its storage holds: no view that repeats few bytes as terabytes, no exotic layout."""
    plain = t.layout == torch.strided and t.device.type == "cpu" and not t.is_quantized
    if not plain or t.numel() * t.element_size() > t.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: tensor {name[:80]} {tuple(t.shape)} is not plain data in this file; save it anew")


def _read_shards(index: Path) -> Weights:
    """All shards that an index names; each must be a plain file name beside the index, and hold what the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    paths = []
    for name in sorted(set(places.values())):
        if name != Path(name).name or "\\" in name or name.endswith(".json") or name in ("", ".", ".."):
            raise CheckpointError(f"{index} points to {name[:120]!r}: a shard is a file beside its index")
        path = index.parent / name
        if not path.is_file():
            raise CheckpointError(f"{index} names {name}, which is not there: fetch all shards")
        shard = read(path)
        misplaced = sorted(set(shard.tensors) ^ {k for k, v in places.items() if v == name})
        if misplaced:
            raise CheckpointError(f"{index} and {name} disagree about {len(misplaced)} tensors: {listed(misplaced)}")
        tensors |= shard.tensors
        paths.append(path)
    return Weights(tensors, tuple(paths))


def listed(names: Sequence[str]) -> str:
    """The first ten of a list, as text."""
    shown = ", ".join(str(n)[:120] for n in names[:10])
    return f"{shown}, ..." if len(names) > 10 else shown
