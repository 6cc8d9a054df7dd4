"""Sampler overhead outside the network: fastdiff's loop, a hand-written loop, diffusers and k-diffusion, interleaved.

Run as a script it writes results/overhead.json; test_overhead.py times the same loops.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from overhead_hand import HAND, Network, tables
from torch import Tensor

import fastdiff as fd
from fastdiff.files import write_text
from fastdiff.sampling import run

SHAPE = (4, 3, 32, 32)
ROWS = 20
METHODS = ("ddim", "dpmpp-2m", "dpmpp-3m", "unipc-2", "unipc-3", "lms-4", "heun")
PREDICTIONS = ("eps", "v")
BAR = 1.4  # fastdiff's loop against the hand-written one, two-step multistep
# in the rounds of the predictor-correctors too, whose loop's bar counts in it: 30 us a row where it takes 14
YARDSTICK, CORRECTED_BAR = "hand dpmpp-2m", 30 / 14
SEAT_BAR = 25.0  # us a row that the scheduler seat may cost beyond fastdiff's loop
HERE = Path(__file__).resolve().parent

PEERS = ("diffusers", "k_diffusion")
KDIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("sample_euler", {}), "dpmpp-2m": ("sample_dpmpp_2m", {}), "lms-4": ("sample_lms", {"order": 4}),
    "heun": ("sample_heun", {}),
}  # fmt: skip

Loop = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """`prepare` makes, untimed, a loop over `rows` network calls; the loop is what is timed."""

    method: str
    prediction: str
    who: str  # "sample" | "loop" (fastdiff with and without its checks) | "seat" (in diffusers' place) | "hand" | a peer's name
    rows: int
    prepare: Callable[[], Loop]

    @property
    def name(self) -> str:
        return f"{self.method}-{self.prediction}-{self.who}"


def cases(method: str, prediction: str, peers: bool = True) -> list[Case]:
    """Every loop for a method, on a network that returns one fixed tensor; the peers' where they can be imported."""
    generator = torch.Generator().manual_seed(0)
    noise, fixed = (torch.randn(SHAPE, generator=generator) for _ in range(2))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return fixed

    denoiser = fd.Denoiser(network, fd.schedule.vp_linear(), prediction=prediction, shape=SHAPE[1:])
    plan = fd.plan(method, denoiser, nfe=ROWS)

    def sample() -> Tensor:
        return fd.sample(denoiser, plan, noise=noise)

    @torch.no_grad()
    def loop() -> Tensor:
        return run(denoiser, plan, noise * plan.start[1])

    written, table = HAND[method], tables(plan, prediction)

    @torch.inference_mode()
    def hand() -> Tensor:
        return written(network, noise * plan.start[1], table)

    mine = {"sample": sample, "loop": loop, "hand": hand}
    out = [Case(method, prediction, who, ROWS, lambda f=f: f) for who, f in mine.items()]
    if method.startswith("unipc"):
        other = fd.plan("dpmpp-2m", denoiser, nfe=ROWS)
        numbers = tables(other, prediction)

        @torch.inference_mode()
        def yardstick() -> Tensor:
            return HAND["dpmpp-2m"](network, noise * other.start[1], numbers)

        out.append(Case(method, prediction, YARDSTICK, ROWS, lambda: yardstick))
    if peers and missing("diffusers") is None:
        out += [diffusers_case(method, prediction, network, noise), seat_case(method, prediction, network, noise)]
    if peers and method in KDIFFUSION and missing("k_diffusion") is None:
        out.append(kdiffusion_case(method, prediction, network, noise))
    return out


def check(group: Iterable[Case]) -> None:
    """The loops of a method do the same work: fastdiff's and the hand-written one give the same sample. (The seat and the peers
    run on discrete levels of their own; tests/compat and tests/solvers compare those.)"""
    results = {c.who: c.prepare()() for c in group if c.who in ("sample", "loop", "hand")}
    for who, x in results.items():
        torch.testing.assert_close(x, results["sample"], rtol=1e-4, atol=1e-4, msg=lambda m, who=who: f"{who}: {m}")


def missing(peer: str) -> str | None:
    """Why a peer is not in the comparison, or None."""
    try:
        importlib.import_module(peer)
    except ImportError as e:
        return f"{peer} is not installed here ({e})"
    return None


def diffusers_case(method: str, prediction: str, network: Network, noise: Tensor) -> Case:
    """The scheduler as a pipeline drives it; `set_timesteps` (5 to 80 us) is not timed, the time tensor not made."""
    import diffusers

    common = {"beta_schedule": "linear", "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction]}
    name, options, step_options = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}, {}),
        "dpmpp-2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, {}),
        "dpmpp-3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {}),
        "unipc-2": ("UniPCMultistepScheduler", {"solver_order": 2}, {}),
        "unipc-3": ("UniPCMultistepScheduler", {"solver_order": 3}, {}),
        "lms-4": ("LMSDiscreteScheduler", {}, {"order": 4}),
        "heun": ("HeunDiscreteScheduler", {}, {}),
    }[method]
    scheduler = getattr(diffusers, name)(**common, **options)
    steps = ROWS // 2 if method == "heun" else ROWS
    scheduler.set_timesteps(steps)
    rows = len(scheduler.timesteps)

    def prepare() -> Loop:
        scheduler.set_timesteps(steps)
        return driven(scheduler, network, noise, **step_options)

    return Case(method, prediction, "diffusers", rows, prepare)


def seat_case(method: str, prediction: str, network: Network, noise: Tensor) -> Case:
    """fastdiff's plan in the scheduler's place, driven as `diffusers_case` drives theirs."""
    import diffusers

    config = diffusers.DDIMScheduler(
        beta_schedule="linear", clip_sample=False, prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction]
    ).config
    seat = fd.compat.DiffusersScheduler.from_config(config, solver=method)
    steps = ROWS // 2 if method == "heun" else ROWS
    seat.set_timesteps(steps)
    rows = len(seat.timesteps)

    return Case(method, prediction, "seat", rows, lambda: driven(seat, network, noise))


def kdiffusion_case(method: str, prediction: str, network: Network, noise: Tensor) -> Case:
    """The function of k-diffusion for a method, on its wrapper of a discrete-time network; `get_sigmas` is not timed."""
    from k_diffusion import external, sampling

    wrapper = {"eps": external.DiscreteEpsDDPMDenoiser, "v": external.DiscreteVDDPMDenoiser}[prediction]
    model = wrapper(network, torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0), quantize=False)
    name, options = KDIFFUSION[method]
    steps, rows = (ROWS // 2, ROWS - 1) if method == "heun" else (ROWS, ROWS)
    sigmas, function = model.get_sigmas(steps), getattr(sampling, name)

    def loop() -> Tensor:
        return function(model, noise * sigmas[0], sigmas, disable=True, **options)

    return Case(method, prediction, "k-diffusion", rows, lambda: loop)


def driven(scheduler: Any, network: Network, noise: Tensor, **step_options: Any) -> Loop:
    """The loop of a diffusers pipeline around a scheduler whose timesteps are set."""

    @torch.inference_mode()
    def loop() -> Tensor:
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            f = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(f, t, x, **step_options, return_dict=False)[0]
        return x

    return loop


def measure(group: list[Case], rounds: int) -> dict[str, list[float]]:
    """Microseconds a row of every case, one loop of each a round, the order reversed every other round.

    The thread's CPU time, not the wall's: on a shared core a long loop is interrupted more often than a short one.
    """
    times: dict[str, list[float]] = {c.who: [] for c in group}
    for case in group * 3:
        case.prepare()()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for case in group if i % 2 else group[::-1]:
                loop = case.prepare()
                begun = time.thread_time()
                loop()
                times[case.who].append((time.thread_time() - begun) / case.rows * 1e6)
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return times


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and least microseconds a row, and their ratios to the hand-written loop's."""
    hand = times["hand"]
    return {
        who: {
            "us_per_row": round(statistics.median(t), 2),
            "us_per_row_min": round(min(t), 2),
            "ratio": round(statistics.median(t) / statistics.median(hand), 3),
            "ratio_min": round(min(t) / min(hand), 3),
        }
        for who, t in times.items()
    }


def machine() -> dict[str, Any]:
    """Where and on what code the numbers were made."""
    models = [x.split(":", 1)[1].strip() for x in _read("/proc/cpuinfo").splitlines() if x.startswith("model name")]
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {peer: metadata.version(peer) for peer in PEERS if missing(peer) is None}
    return {
        "device": models[0] if models else platform.processor(), "threads": torch.get_num_threads(),
        "load_average": _read("/proc/loadavg").split()[:3], "versions": versions, "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    """The commit of the code, "+changes" where fastdiff/ differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD").strip()
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no", "fastdiff").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=HERE.parent, check=True, capture_output=True, text=True).stdout


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="loops of each kind (default 300)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    reasons = [reason for peer in PEERS if (reason := missing(peer))]
    for reason in reasons:
        print(f"not in this run: {reason}", file=sys.stderr)
    rows = []
    for prediction in PREDICTIONS:
        for method in options.methods:
            group = cases(method, prediction)
            check(group)
            result = summary(measure(group, options.rounds))
            rows += [{"method": method, "prediction": prediction, "who": who, **r} for who, r in result.items()]
            cells = (f" | {who} {r['us_per_row']:.1f} us ({r['ratio']:.2f}x)" for who, r in result.items())
            print(f"{method:9s} {prediction:4s}{''.join(cells)}", flush=True)
    setting = {
        "shape": SHAPE, "dtype": "float32", "rows": ROWS, "rounds": options.rounds, "clock": "thread_time",
        "peers_missing": reasons,
    }  # fmt: skip
    write_text(options.out, json.dumps({"setting": setting, "machine": machine(), "results": rows}, indent=1) + "\n")
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
