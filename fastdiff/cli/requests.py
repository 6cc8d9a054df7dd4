"""What `fastdiff sample` was asked for: seeds, classes and device, from the words on the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FastdiffError
from ..parallel import World
from ..streaming import Request
from .console import say

if TYPE_CHECKING:
    import torch

    from ..checkpoints.conditions import Conditions
    from ..denoiser import Denoiser

MOST = 100_000  # all images of a sheet are held in memory, and a range is easily mistyped; -n streams any number


def parse_seeds(text: str) -> list[int]:
    """ "0-15", "1,2,7" or both mixed -> seeds in the order given.

    Raises:
        FastdiffError: not such a list, a falling range, a seed twice, beyond 64 bits, or more than fit in memory.
    """
    out: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+))?\s*", part)
        if match is None:
            raise FastdiffError(f"--seeds takes whole numbers and ranges such as 0-15 or 1,2,7; given {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= 2**64:
            raise FastdiffError(f"--seeds ranges rise, within 0 to 2^64 - 1; given {part.strip()!r}")
        if len(out) + last - first >= MOST:
            raise FastdiffError(f"--seeds asks for more than {MOST} samples; run smaller ranges, or `fastdiff sample -n`")
        out += range(first, last + 1)
    return _once(out, "--seeds")


def _once(values: list[int], option: str) -> list[int]:
    if repeated := sorted({v for v in values if values.count(v) > 1}) if len(set(values)) < len(values) else []:
        raise FastdiffError(f"{option} names {', '.join(map(str, repeated))} twice; each picture has one file")
    return values


def class_names(denoiser: Denoiser, checkpoint: str) -> tuple[str, ...]:
    """The checkpoint's class names, or numbers where it has none; empty for an unconditional network."""
    from ..shipped import CLASS_NAMES

    names = tuple(denoiser.info.get("class_names") or CLASS_NAMES.get(checkpoint) or ())
    return names if len(names) == denoiser.num_classes else tuple(str(i) for i in range(denoiser.num_classes))


def prompted(denoiser: Denoiser, prompt: str | None) -> Denoiser:
    """A text-conditioned denoiser with its prompt bound, the empty one where none is given; any other as it is.

    Raises:
        FastdiffError: a prompt for a checkpoint without text encoders.
    """
    if denoiser.encode is None:
        if prompt is not None:
            raise FastdiffError("this checkpoint has no text encoders: leave out --prompt")
        return denoiser
    return denoiser.bind(**denoiser.encode([prompt or ""]))


def conditioned(denoiser: Denoiser, prompt: str | None, path: Path | None, count: int) -> tuple[Denoiser, Conditions | None]:
    """A denoiser with its prompt bound, or with the first of `count` samples' conditions of a file, which come along.

    Raises:
        FastdiffError: both asked for; a file that does not fit the network.
    """
    from ..checkpoints.conditions import read_conditions, tried

    if path is None:
        return prompted(denoiser, prompt), None
    if prompt is not None:
        raise FastdiffError("--prompt and --condition both say what the network is told: leave out one of them")
    found = read_conditions(path, denoiser, count)
    bound = found.bound(denoiser, [0])
    if bound.shape is not None:
        tried(bound)
    return bound, found


def varied(denoiser: Denoiser, name: str, compile: bool, batch: int, world: World) -> tuple[Denoiser, dict[str, str]]:
    """The denoiser in the variant asked for, and what tells its images from torch's default's: their bits differ. "auto" measures
    and says what it saw.

    Raises:
        FastdiffError: no such variant, or one that does not go here.
    """
    from ..variants import PLAIN, VARIANTS, fastest

    if compile and name != "auto":
        raise FastdiffError("--compile only acts with --variant auto: add it, or take --variant compiled")
    if name == "auto" and world.size > 1:
        raise FastdiffError("--variant auto asks one process: under torchrun name the variant that they share")
    if name == "auto":
        denoiser, report = fastest(denoiser, batch, compile=compile)
        for line in report.lines:
            say(line)
        name = report.chosen
    elif name in VARIANTS:
        denoiser = VARIANTS[name].of(denoiser)
    else:
        raise FastdiffError(f"--variant is auto or one of {', '.join(VARIANTS)}; given {name!r}")
    return denoiser, {} if name == PLAIN.name else {"variant": name}


def parse_classes(text: str | None, names: tuple[str, ...]) -> list[int] | None:
    """ "0,3", "coat,bag" or "all" -> labels; None stays None.

    Raises:
        FastdiffError: a label out of range, an unknown name, one named twice, or a network without classes.
    """
    if text is None:
        return None
    if not names:
        raise FastdiffError("this checkpoint knows no classes: leave out --classes")
    if text.strip() == "all":
        return list(range(len(names)))
    lower = [name.lower() for name in names]
    labels = []
    for word in (w.strip() for w in text.split(",")):
        if word.lower() in lower:
            labels.append(lower.index(word.lower()))
        elif re.fullmatch(r"-?\d+", word):
            if not 0 <= int(word) < len(names):
                raise FastdiffError(f"--classes are 0 to {len(names) - 1} for this checkpoint; given {word}")
            labels.append(int(word))
        else:
            near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.4)
            hint = f"did you mean {names[lower.index(near[0])]}?" if near else f"known: {', '.join(names)}"
            raise FastdiffError(f"--classes: no class {word!r}; {hint}")
    return _once(labels, "--classes")


def requests(seeds: Sequence[int], classes: list[int] | None, names: tuple[str, ...]) -> list[Request]:
    """Every seed in every class named, class by class; without --classes, seed s in class s mod their number."""
    if classes is None or not names:
        return in_turn(seeds, None, names)
    pairs = [(seed, label) for label in classes for seed in seeds]
    if len(pairs) > MOST:
        raise FastdiffError(f"--seeds and --classes ask for {len(pairs)} samples; at most {MOST}: run smaller parts")
    return [Request(seed, label, _file_name(seed, label, names)) for seed, label in pairs]


def in_turn(seeds: Sequence[int], classes: list[int] | None, names: tuple[str, ...]) -> list[Request]:
    """Every seed once: seed s in class s mod their number, of those named or of all."""
    turn = classes or list(range(len(names)))
    labels = [turn[seed % len(turn)] if turn else None for seed in seeds]
    return [Request(seed, label, _file_name(seed, label, names)) for seed, label in zip(seeds, labels, strict=True)]


def _file_name(seed: int, label: int | None, names: tuple[str, ...]) -> str:
    if label is None:
        return f"seed{seed:06d}.png"
    slug = re.sub(r"[^a-z0-9]+", "-", names[label].lower()).strip("-")
    return f"seed{seed:06d}_class{label}{'-' + slug if slug and slug != str(label) else ''}.png"


def check_device(name: str | None) -> torch.device:
    """The device of a name, or the default one.

    Raises:
        FastdiffError: an unknown device, or one that this machine or this build of torch does not have.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        why = str(e).splitlines()[0]
        raise FastdiffError(f"--device {name} cannot be used here ({why}); `fastdiff info` lists devices") from e
    if device.type == "meta":
        raise FastdiffError("--device meta holds no numbers; use cpu or cuda")
    return device
