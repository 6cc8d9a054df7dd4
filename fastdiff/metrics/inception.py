"""FID's InceptionV3 (pool3, 2,048 features) as a plain torch module; weights come from a file that the user has.

Only Frechet distances in the features of this network, with the published weights, may be called FID. The weights are
`pt_inception-2015-12-05-6726825d.pth` of https://github.com/mseitzer/pytorch-fid (releases, `fid_weights`), a port of
TensorFlow's inception-2015-12-05. It is not torchvision's ImageNet network: its average pools leave out the padding,
and its last block takes a maximum where the paper has an average. Nothing is downloaded here.

    network = load_inception("pt_inception-2015-12-05-6726825d.pth")
    fid = frechet_distance(network(real), network(fake))       # uint8 images; 50,000 of each by custom

Checked against pytorch-fid 0.3.0 (torchvision 0.29.2, torch 2.13 on a CPU) by giving both one random state dict, batch
norms included: features equal to the last bit on 48x64 and on 400x320 images. Unverified with the published weights.
"""

import hashlib
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.errors import CheckpointError, FastdiffError

PUBLISHED = "6726825d"  # first digits of the sha256 of the published file; its name carries them
SIZE = 299
CLASSES = 1008  # of the TensorFlow network; torchvision's has 1,000

Kernel = int | tuple[int, int]
Spec = dict[str, tuple[int, Kernel, int]]  # convolution name -> width out, kernel, stride


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, width_in: int, width_out: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


def _half(kernel: Kernel) -> Kernel:
    return kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)


class _Mixed(nn.Module):
    """Parallel branches, concatenated in the order of the table, then the pooled branch.

    A name is `branch_step`; steps that share a number (`_2a`, `_2b`) are parallel. Strided convolutions have no
    padding.
    `pool`: "average" (padding not counted), "maximum", or "reduce" (stride 2, no convolution after it).
    """

    def __init__(self, width_in: int, spec: Spec, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.branches: dict[str, dict[str, list[str]]] = {}  # branch -> step -> names
        for name in spec:
            if name != "branch_pool":
                branch, _, step = name.partition("_")
                self.branches.setdefault(branch, {}).setdefault(step.rstrip("ab"), []).append(name)
        self.width_out = 0
        for steps in self.branches.values():
            width = width_in
            for names in steps.values():
                for name in names:
                    out, kernel, stride = spec[name]
                    self.add_module(name, _Conv(width, out, kernel, stride, _half(kernel) if stride == 1 else 0))
                width = sum(spec[name][0] for name in names)
            self.width_out += width
        if pool != "reduce":
            out, kernel, stride = spec["branch_pool"]
            self.add_module("branch_pool", _Conv(width_in, out, kernel, stride, 0))
        self.width_out += width_in if pool == "reduce" else spec["branch_pool"][0]

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for steps in self.branches.values():
            y = x
            for names in steps.values():
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "reduce":
            return torch.cat([*outputs, functional.max_pool2d(x, 3, 2)], 1)
        if self.pool == "average":
            pooled = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = functional.max_pool2d(x, 3, 1, 1)
        return torch.cat([*outputs, self.get_submodule("branch_pool")(pooled)], 1)


def _block_a(pool_width: int) -> Spec:
    return {
        "branch1x1": (64, 1, 1),
        "branch5x5_1": (48, 1, 1), "branch5x5_2": (64, 5, 1),
        "branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 1), "branch3x3dbl_3": (96, 3, 1),
        "branch_pool": (pool_width, 1, 1),
    }  # fmt: skip


def _block_c(width: int) -> Spec:
    row, column = (1, 7), (7, 1)
    return {
        "branch1x1": (192, 1, 1),
        "branch7x7_1": (width, 1, 1), "branch7x7_2": (width, row, 1), "branch7x7_3": (192, column, 1),
        "branch7x7dbl_1": (width, 1, 1), "branch7x7dbl_2": (width, column, 1), "branch7x7dbl_3": (width, row, 1),
        "branch7x7dbl_4": (width, column, 1), "branch7x7dbl_5": (192, row, 1),
        "branch_pool": (192, 1, 1),
    }  # fmt: skip


BLOCK_B: Spec = {
    "branch3x3": (384, 3, 2),
    "branch3x3dbl_1": (64, 1, 1), "branch3x3dbl_2": (96, 3, 1), "branch3x3dbl_3": (96, 3, 2),
}  # fmt: skip
BLOCK_D: Spec = {
    "branch3x3_1": (192, 1, 1), "branch3x3_2": (320, 3, 2),
    "branch7x7x3_1": (192, 1, 1), "branch7x7x3_2": (192, (1, 7), 1), "branch7x7x3_3": (192, (7, 1), 1),
    "branch7x7x3_4": (192, 3, 2),
}  # fmt: skip
BLOCK_E: Spec = {
    "branch1x1": (320, 1, 1),
    "branch3x3_1": (384, 1, 1), "branch3x3_2a": (384, (1, 3), 1), "branch3x3_2b": (384, (3, 1), 1),
    "branch3x3dbl_1": (448, 1, 1), "branch3x3dbl_2": (384, 3, 1),
    "branch3x3dbl_3a": (384, (1, 3), 1), "branch3x3dbl_3b": (384, (3, 1), 1),
    "branch_pool": (192, 1, 1),
}  # fmt: skip
MIXED: dict[str, tuple[Spec, str]] = {
    "Mixed_5b": (_block_a(32), "average"), "Mixed_5c": (_block_a(64), "average"), "Mixed_5d": (_block_a(64), "average"),
    "Mixed_6a": (BLOCK_B, "reduce"), "Mixed_6b": (_block_c(128), "average"), "Mixed_6c": (_block_c(160), "average"),
    "Mixed_6d": (_block_c(160), "average"), "Mixed_6e": (_block_c(192), "average"),
    "Mixed_7a": (BLOCK_D, "reduce"), "Mixed_7b": (BLOCK_E, "average"), "Mixed_7c": (BLOCK_E, "maximum"),
}  # fmt: skip


class InceptionNet(nn.Module):
    """(n, 3, h, w) in [0, 1] -> (n, 2048). Names of weights are those of the published state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, 1, 0)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 1, 0)
        width = 192
        for name, (spec, pool) in MIXED.items():
            block = _Mixed(width, spec, pool)
            self.add_module(name, block)
            width = block.width_out
        self.fc = nn.Linear(width, CLASSES)  # unused by pool3, but part of the file, and what tells it from others

    def forward(self, x: Tensor) -> Tensor:
        x = 2.0 * functional.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(functional.max_pool2d(x, 3, 2)))
        x = functional.max_pool2d(x, 3, 2)
        for name in MIXED:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))


class Inception:
    """A frozen InceptionNet. `published` says whether the file was byte for byte the published one (may say FID)."""

    def __init__(self, network: InceptionNet, published: bool = False) -> None:
        self.network = network.eval().requires_grad_(False)
        self.published = published

    def to(self, device: torch.device | str) -> "Inception":
        """Move the network; images follow it, features come back to the CPU."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, batch: int = 32) -> Tensor:
        """uint8 images (n, 1 or 3, h, w) -> float32 features (n, 2048); grey is repeated. FastdiffError otherwise."""
        if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8 or images.numel() == 0:
            raise FastdiffError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; allowed: uint8 (n, 1 or 3, h, w), "
                "the bytes as saved; convert from [-1, 1] by (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)"
            )
        if batch < 1:
            raise FastdiffError(f"batch={batch}; allowed: 1 or more")
        weight = self.network.fc.weight
        parts = []
        for chunk in images.split(batch):
            values = chunk.to(weight.device, weight.dtype) / 255.0
            parts.append(self.network(values.expand(-1, 3, -1, -1)).float().cpu())
        return torch.cat(parts)


def load_inception(path: str | Path) -> Inception:
    """The network with the weights at `path`: a .pth state dict (read with weights_only=True) or a .safetensors file.

    CheckpointError where the file cannot be read or is not this network's state dict.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(data)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path} as a state dict ({str(error).splitlines()[0]}); allowed: a .safetensors file or a "
            "plain state dict saved by torch"
        ) from error
    network = InceptionNet()
    _check_state(path, state, network)
    network.load_state_dict(state)
    return Inception(network, hashlib.sha256(data).hexdigest().startswith(PUBLISHED))


def _check_state(path: Path, state: object, network: InceptionNet) -> None:
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not a map of names to tensors; save a state dict")
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    counters = {name for name in wanted if name.endswith("num_batches_tracked")}  # absent from files of torch < 0.4.1
    missing = sorted(set(wanted) - set(state) - counters)
    unknown = sorted(set(state) - set(wanted))
    wrong = sorted(name for name in set(wanted) & set(state) if tuple(state[name].shape) != wanted[name])
    if missing or unknown or wrong:
        raise CheckpointError(
            f"{path} is not the state dict of FID's InceptionV3 (missing {missing[:2]}, unknown {unknown[:2]}, "
            f"of another shape {wrong[:2]}); get pt_inception-2015-12-05-6726825d.pth; torchvision's ImageNet weights "
            "are another network"
        )
