"""A corpus of malformed checkpoints: `write(folder)` makes every one and returns their paths by name.

By hand: python tests/checkpoints/make_malformed.py FOLDER, then `fastdiff info` on any of them.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import hub
import peer_networks
import tiny
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from fastdiff.checkpoints import native

CORPUS: dict[str, Callable[[Path], Path]] = {}
DEEP = "[" * 100_000 + "]" * 100_000
BIG = 10**15


class Bomb:
    """Unpickling it makes a file: proof that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


def case(function: Callable[[Path], Path]) -> Callable[[Path], Path]:
    CORPUS[function.__name__] = function
    return function


def add(name: str, function: Callable[[Path], Path]) -> None:
    CORPUS[name] = function


# safetensors: the header's length (8 bytes), the header, the data


def raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(shape: Any, offsets: Any, dtype: str = "F32") -> bytes:
    return json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


HEADERS = {
    "empty_header": (b"", b"", None),
    "header_longer_than_the_file": (b"{}", b"", 90_000_000),
    "header_of_2_to_the_63": (b"{}", b"", 2**63),
    "header_no_json": (b"{wwww", b"", None),
    "header_a_list": (b"[1, 2]", b"", None),
    "header_deep": (DEEP.encode(), b"", None),
    "offsets_beyond_the_end": (entry([4], [0, 16]), b"\0" * 8, None),
    "offsets_falling": (entry([4], [16, 0]), b"\0" * 16, None),
    "huge_shape_small_data": (entry([2**40], [0, 16]), b"\0" * 16, None),
    "shape_that_overflows": (entry([2**40, 2**40], [0, 16]), b"\0" * 16, None),
    "negative_shape": (entry([-4], [0, 16]), b"\0" * 16, None),
    "unknown_dtype": (entry([4], [0, 16], "F99"), b"\0" * 16, None),
    "metadata_of_numbers": (b'{"__metadata__": {"fastdiff": 3}}', b"", None),
    "hole_between_tensors": (entry([2], [8, 16]), b"\0" * 16, None),
}
for name, parts in HEADERS.items():
    add(name, lambda folder, parts=parts: raw(folder, *parts))


@case
def empty_safetensors(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(b"")
    return folder / "model.safetensors"


@case
def truncated_data(folder: Path) -> Path:
    path = tiny.checkpoint(folder / "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    return path


@case
def flipped_bit_in_the_header(folder: Path) -> Path:
    path = tiny.checkpoint(folder / "model.safetensors")
    data = bytearray(path.read_bytes())
    at = data.index(b'"F32"') + 1
    data[at] ^= ord("F") ^ ord("I")  # floats declared as integers of the same size
    path.write_bytes(bytes(data))
    return path


@case
def flipped_bit_in_a_name(folder: Path) -> Path:
    path = tiny.checkpoint(folder / "model.safetensors")
    data = bytearray(path.read_bytes())
    data[data.index(b"middle_block")] ^= 1
    path.write_bytes(bytes(data))
    return path


# descriptions of our own format

DESCRIPTIONS = {
    "description_deep": DEEP,
    "description_a_list": "[]",
    "description_of_another_format": '{"format": 7}',
}
for name, text in DESCRIPTIONS.items():
    add(name, lambda folder, text=text: described(folder, text))


def described(folder: Path, text: str) -> Path:
    save_file(tiny.network().state_dict(), folder / "model.safetensors", metadata={"fastdiff": text})
    return folder / "model.safetensors"


FIELDS: dict[str, dict[str, Any]] = {
    "blocks_without_end": {"network": {**tiny.NETWORK, "num_res_blocks": 10**9}},
    "levels_without_end": {"network": {**tiny.NETWORK, "channel_mult": [1] * 50_000}},
    "channels_of_10_to_the_15": {"network": {**tiny.NETWORK, "model_channels": 32 * BIG}},
    "classes_of_10_to_the_15": {"network": {**tiny.NETWORK, "num_classes": BIG}},
    "network_a_string": {"network": "UNet"},
    "schedule_a_list": {"schedule": ["vp_cosine"]},
    "schedule_of_strings": {"schedule": {"name": "vp_from_alphas_cumprod", "alphas_cumprod": ["a", "b"]}},
    "prediction_a_list": {"prediction": ["v"]},
    "shape_of_strings": {"shape": ["1", "8", "8"]},
    "shape_negative": {"shape": [1, -8, 8]},
    "time_scale_a_list": {"time_scale": [1000]},
    "plan_a_number": {"plan": "7"},
    "plan_deep": {"plan": DEEP},
}
for name, change in FIELDS.items():
    add(name, lambda folder, change=change: tiny_with(folder, change))


def tiny_with(folder: Path, change: dict[str, Any]) -> Path:
    native.save(folder / "model.safetensors", tiny.network().state_dict(), tiny.description(**change))
    return folder / "model.safetensors"


# torch files

FLAGS = peer_networks.cases()["adm improved"]


def adm(folder: Path, value: Any, name: str = "model.pt", **how: Any) -> Path:
    torch.save(value, folder / name, **how)
    (folder / name).with_suffix(".json").write_text(json.dumps(FLAGS["config"]))
    return folder / name


def adm_weights(**changes: Any) -> dict[str, Any]:
    return {**peer_networks.weights(FLAGS["weights"]), **changes}


FIRST = "input_blocks.0.0.weight"
VALUES: dict[str, Callable[[], Any]] = {
    "a_list": lambda: [1, 2],
    "a_number": lambda: 3,
    "an_empty_dict": dict,
    "values_that_are_no_tensors": lambda: adm_weights(**{FIRST: {"a": 1}}),
    "names_that_are_no_strings": lambda: {**adm_weights(), 3: torch.zeros(1)},
    "a_view_of_4_terabytes": lambda: adm_weights(**{FIRST: torch.zeros(1).expand(2**40)}),
    "a_sparse_tensor": lambda: adm_weights(**{FIRST: torch.zeros(32, 3, 3, 3).to_sparse()}),
    "a_meta_tensor": lambda: adm_weights(**{FIRST: torch.empty(32, 3, 3, 3, device="meta")}),
    "integers_for_weights": lambda: adm_weights(**{FIRST: torch.zeros(32, 3, 3, 3, dtype=torch.int64)}),
    "complex_for_weights": lambda: adm_weights(**{FIRST: torch.zeros(32, 3, 3, 3, dtype=torch.complex64)}),
    "a_tensor_too_much": lambda: adm_weights(extra=torch.zeros(1)),
    "a_tensor_misshapen": lambda: adm_weights(**{FIRST: torch.zeros(32, 3, 5, 5)}),
    "a_scalar_for_a_convolution": lambda: adm_weights(**{FIRST: torch.zeros(())}),
    "a_tensor_missing": lambda: {k: v for k, v in adm_weights().items() if k != "out.2.bias"},
    "names_of_nobody": lambda: {"a": torch.zeros(1)},
}
for name, value in VALUES.items():
    add(name, lambda folder, value=value: adm(folder, value()))


@case
def a_dict_that_holds_itself(folder: Path) -> Path:
    value: dict[str, Any] = {}
    value["state_dict"] = value
    return adm(folder, value)


@case
def laughs_of_lists(folder: Path) -> Path:
    value: Any = ["ha"]
    for _ in range(60):
        value = [value, value]  # 2^60 leaves in a file of a kilobyte
    return adm(folder, {"state_dict": {"w": value}})


@case
def code_in_a_torch_file(folder: Path) -> Path:
    return adm(folder, {"w": torch.zeros(1), "x": Bomb(folder / "ran")})


@case
def code_in_a_torch_file_of_before_the_zip(folder: Path) -> Path:
    return adm(folder, {"x": Bomb(folder / "ran")}, _use_new_zipfile_serialization=False)


@case
def code_in_a_plain_pickle(folder: Path) -> Path:
    (folder / "model.ckpt").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    return folder / "model.ckpt"


@case
def code_in_an_edm_pickle(folder: Path) -> Path:
    (folder / "network.pkl").write_bytes(pickle.dumps({"ema": Bomb(folder / "ran")}))
    return folder / "network.pkl"


@case
def code_in_what_is_called_safetensors(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    return folder / "model.safetensors"


def zipped(folder: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w") as z:
        for name, data in entries.items():
            z.writestr(name, data)
    return folder / "model.pt"


@case
def a_zip_bomb(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        z.writestr("archive/data.pkl", b"\0" * (300 << 20))
    return folder / "model.pt"


@case
def a_zip_without_a_pickle(folder: Path) -> Path:
    return zipped(folder, {"archive/version": b"3\n"})


@case
def a_zip_with_paths_that_climb(folder: Path) -> Path:
    return zipped(folder, {"../../data.pkl": pickle.dumps({}), "../../version": b"3\n"})


@case
def a_zip_cut_short(folder: Path) -> Path:
    path = adm(folder, adm_weights())
    path.write_bytes(path.read_bytes()[:-500])
    return path


@case
def a_zip_with_a_flipped_bit_in_its_pickle(folder: Path) -> Path:
    path = adm(folder, adm_weights())
    data = bytearray(path.read_bytes())
    data[data.index(b"_rebuild_tensor_v2") + 3] ^= 4
    path.write_bytes(bytes(data))
    return path


@case
def an_old_torch_file_cut_short(folder: Path) -> Path:
    path = adm(folder, adm_weights(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-5000])
    return path


@case
def a_tar(folder: Path) -> Path:
    with tarfile.open(folder / "model.pt", "w") as tar:
        info = tarfile.TarInfo("storages")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"abcd"))
    return folder / "model.pt"


@case
def text(folder: Path) -> Path:
    (folder / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    return folder / "model.pt"


@case
def an_unknown_suffix(folder: Path) -> Path:
    (folder / "model.exe").write_bytes(b"MZ")
    return folder / "model.exe"


@case
def a_link_to_itself(folder: Path) -> Path:
    os.symlink(folder / "model.pt", folder / "model.pt")
    return folder / "model.pt"


@case
def a_folder_called_like_a_file(folder: Path) -> Path:
    (folder / "model.safetensors").mkdir()
    return folder


BESIDE = {
    "flags_deep": DEEP,
    "flags_a_list": "[]",
    "flags_of_lists": '{"num_channels": [1]}',
    "flags_huge": '{"num_channels": 999999999, "image_size": 16, "channel_mult": "1"}',
    "flags_of_blocks": '{"num_res_blocks": 999999999, "image_size": 16, "channel_mult": "1", "attention_resolutions": ""}',
}
for name, flags in BESIDE.items():
    add(name, lambda folder, flags=flags: (adm(folder, adm_weights()), (folder / "model.json").write_text(flags))[0])


# diffusers folders


def edited(folder: Path, file: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A good folder with one JSON file changed; what `change` returns is written."""
    hub.save(folder, hub.unet(), DDPMScheduler(), max_shard_size="40KB" if "index" in file else "10GB")
    value = change(json.loads((folder / file).read_text()))
    (folder / file).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def moved(where: str) -> Callable[[dict[str, Any]], Any]:
    """An index whose every tensor is said to lie there."""
    return lambda index: {"weight_map": dict.fromkeys(index["weight_map"], where)}


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "config_no_json": (CONFIG, lambda c: "{"),
    "config_a_list": (CONFIG, lambda c: [1]),
    "config_deep": (CONFIG, lambda c: DEEP),
    "config_deep_inside": (CONFIG, lambda c: json.dumps(c)[:-1] + f', "norm_num_groups": {DEEP}}}'),
    "config_of_20_megabytes": (CONFIG, lambda c: json.dumps({**c, "x": "a" * (20 << 20)})),
    "class_that_is_code": (CONFIG, lambda c: {**c, "_class_name": "os.system"}),
    "class_a_dict": (CONFIG, lambda c: {**c, "_class_name": {"a": 1}}),
    "class_of_another_kind": (CONFIG, lambda c: {**c, "_class_name": "AutoencoderKL"}),
    "sample_size_huge": (CONFIG, lambda c: {**c, "sample_size": BIG}),
    "sample_size_a_string": (CONFIG, lambda c: {**c, "sample_size": "64"}),
    "channels_huge": (CONFIG, lambda c: {**c, "block_out_channels": [800_000, 800_000]}),
    "channels_of_strings": (CONFIG, lambda c: {**c, "block_out_channels": ["16", "32"]}),
    "layers_huge": (CONFIG, lambda c: {**c, "layers_per_block": 900_000}),
    "groups_zero": (CONFIG, lambda c: {**c, "norm_num_groups": 0}),
    "blocks_unknown": (CONFIG, lambda c: {**c, "down_block_types": ["A", "B"]}),
    "levels_many": (CONFIG, lambda c: {**c, "block_out_channels": [8] * 20_000}),
    "a_setting_unknown": (CONFIG, lambda c: {**c, "secret_attention": 3}),
    "steps_huge": (SCHEDULER, lambda c: {**c, "num_train_timesteps": BIG}),
    "steps_a_string": (SCHEDULER, lambda c: {**c, "num_train_timesteps": "1000"}),
    "beta_nan": (SCHEDULER, lambda c: json.dumps({**c, "beta_end": float("nan")})),
    "beta_beyond_1": (SCHEDULER, lambda c: {**c, "beta_end": 2.0}),
    "betas_of_strings": (SCHEDULER, lambda c: {**c, "trained_betas": ["a"]}),
    "beta_schedule_unknown": (SCHEDULER, lambda c: {**c, "beta_schedule": "secret"}),
    "prediction_unknown": (SCHEDULER, lambda c: {**c, "prediction_type": "noise"}),
    "scheduler_unknown": (SCHEDULER, lambda c: {**c, "_class_name": "VQDiffusionScheduler"}),
    "scheduler_a_dict": (SCHEDULER, lambda c: {**c, "_class_name": {}}),
    "index_to_the_parent": (INDEX, moved("../../secret.safetensors")),
    "index_to_the_root": (INDEX, moved("/etc/passwd")),
    "index_with_a_backslash": (INDEX, moved("..\\secret.safetensors")),
    "index_to_itself": (INDEX, moved(INDEX)),
    "index_to_nothing": (INDEX, moved("none.safetensors")),
    "index_to_one_shard": (INDEX, lambda i: moved(next(iter(i["weight_map"].values())))(i)),
    "index_a_list": (INDEX, lambda i: {"weight_map": [1]}),
    "index_of_numbers": (INDEX, lambda i: {"weight_map": dict.fromkeys(i["weight_map"], 3)}),
}
for name, (file, change) in EDITS.items():
    add(name, lambda folder, file=file, change=change: edited(folder, file, change))


@case
def positions_beyond_memory(folder: Path) -> Path:
    """DiT's table of positions grows with the square of a number in the configuration and is in no file."""
    hub.save(folder, hub.make("DiTTransformer2DModel", **hub.DIT), DDPMScheduler())
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "sample_size": 900_000}))
    return folder


@case
def weights_missing(folder: Path) -> Path:
    hub.save(folder, hub.unet(), DDPMScheduler())
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    return folder


@case
def bytes_that_are_no_text(folder: Path) -> Path:
    hub.save(folder, hub.unet(), DDPMScheduler())
    (folder / CONFIG).write_bytes(b'{"_class_name": "\xff\xfe"}')
    return folder


def pipeline(folder: Path, change: dict[str, Any]) -> Path:
    hub.ddpm(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    return folder


PIPELINES: dict[str, dict[str, Any]] = {
    "a_part_that_is_the_parent": {"unet": None, "..": ["diffusers", "UNet2DModel"]},
    "a_part_that_is_not_there": {"unet": None, "other": ["diffusers", "UNet2DModel"]},
    "two_denoisers": {"transformer": ["diffusers", "DiTTransformer2DModel"]},
    "no_denoiser": {"unet": ["diffusers", "UNet3DConditionModel"]},
    "parts_of_numbers": {"unet": [1, {"a": 2}]},
}
for name, parts_changed in PIPELINES.items():
    add(name, lambda folder, change=parts_changed: pipeline(folder, change))


@case
def a_pipeline_inside_itself(folder: Path) -> Path:
    """The denoiser's folder is a link back to the pipeline's."""
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    os.symlink(folder, folder / "unet")
    return folder


def write(folder: Path) -> dict[str, Path]:
    """Every case in a folder of its own."""
    found = {}
    for name, make in CORPUS.items():
        (folder / name).mkdir(parents=True)
        found[name] = make(folder / name)
    return found


if __name__ == "__main__":
    for name, path in write(Path(sys.argv[1])).items():
        print(name, path)
