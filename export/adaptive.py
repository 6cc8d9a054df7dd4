"""sampler.onnx with adaptive step size: a Loop that ends when the batch is there. One turn is one evaluation.

The same embedded pair and controller as `fastdiff.adaptive` with `together`: a step has three evaluations (phases 0, 1, 2), is
judged after the third by the batch's worst sample, and taken or tried again smaller. Phase -1 is the exact first step away from
alpha = 0, where the log-SNR is infinite. The evaluation at the end of the path is phase 0 of a step that is not taken: its
prediction is the sample. Levels, weights and the controller are float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor, nn

from ..adaptive import Control
from ..denoiser import Denoiser
from ..grid import LAM_START
from ..pairs import PAIRS, curve
from ..schedule import NoiseSchedule
from .evaluate import LEVELS, Contrast, Evaluation
from .graph import BOOL, DOUBLE, FLOAT, INT64, Graph, total, value
from .network import BATCH, WEIGHTS, Traced, export_module, head_values
from .sampler import outputs

SOLVER = "dpmpp-23"  # no memory between steps, which a Loop would have to carry; unipc-3 takes 0.5 to 0.7 of its calls
PAIR = PAIRS[SOLVER]
ORDER = PAIR.order
SCALARS = ("lam", "h", "error", "phase")  # of the controller: log-SNR, step, last accepted error, evaluation of the step


class _TimeOfLam(nn.Module):
    """log-SNR (1,) float64 -> time, by a table and steps along its chords: ONNX Runtime has no inverse cosine in float64, and
    most schedules no closed form. Nodes of a discrete schedule are its own times, between which the log-SNR is linear."""

    NODES, STEPS = 2048, 2

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        first, last = (float(schedule.lam(t)) for t in (schedule.t_max, schedule.t_min))
        times = schedule.t_of_lam(np.linspace(max(first, LAM_START), last, self.NODES))
        if count := getattr(schedule, "discrete_count", None):
            times = np.sort(np.concatenate([np.arange(count, dtype=np.float64), times[times > count - 2.0]]))[::-1]
        lam = np.asarray(schedule.lam(times), np.float64)
        keep = np.isfinite(lam) & np.concatenate([[True], np.diff(lam) > 0])
        self.register_buffer("t", torch.from_numpy(np.ascontiguousarray(times[keep])))
        self.register_buffer("lam", torch.from_numpy(np.ascontiguousarray(lam[keep])))

    def forward(self, lam: Tensor) -> Tensor:
        nodes, times = self.get_buffer("lam"), self.get_buffer("t")
        i = ((nodes <= lam.unsqueeze(1)).long().sum(dim=1) - 1).clamp(0, len(nodes) - 2)
        chord = (times[i + 1] - times[i]) / (nodes[i + 1] - nodes[i])
        t = times[i] + (lam - nodes[i]) * chord
        for _ in range(self.STEPS):
            t = t.clamp(self.schedule.t_min, self.schedule.t_max)
            t = t + (lam - self.schedule.lam(t)) * chord
        return t.clamp(self.schedule.t_min, self.schedule.t_max)


class _Weights(nn.Module):
    """(lam, h, phase), float64 (1,) -> LEVELS at the point to evaluate, and the step's weights on x, d0, the prediction's change
    and, for the second-order result, the first change; all float32."""

    def __init__(self, denoiser: Denoiser, contrast: Contrast | None) -> None:
        super().__init__()
        self.denoiser, self.contrast = denoiser, contrast
        schedule = denoiser.schedule
        self.time = _TimeOfLam(schedule)
        self.t_max = schedule.t_max
        self.level = float(schedule.alpha(self.t_max)), float(schedule.sigma(self.t_max))

    def forward(self, lam: Tensor, h: Tensor, phase: Tensor) -> tuple[Tensor, ...]:
        schedule, first = self.denoiser.schedule, phase < 0
        s = (phase + 1) * h / ORDER
        here, point, end = self.time(torch.cat([lam, lam + phase.clamp(min=0) * h / ORDER, lam + s])).split(1)
        t = torch.where(first, torch.full_like(lam, self.t_max), point)
        alpha = schedule.alpha(end)
        on_x, on_d, on_slope = schedule.sigma(end) / schedule.sigma(here), -alpha * torch.expm1(-s), alpha * curve(-s)
        change = torch.where(phase > 0, on_slope / (phase.clamp(min=1) * h / ORDER), 0.0)
        # the first step leads from (alpha_0, sigma_0) to the level of lam = LAM_START, for D as it is
        leap = schedule.sigma(here) / self.level[1]
        on_x = torch.where(first, leap, on_x)
        on_d = torch.where(first, schedule.alpha(here) - self.level[0] * leap, on_d)
        step = (on_x, on_d, change, on_slope / (h / ORDER))
        return (*head_values(self.denoiser, t), *(v.float() for v in (self._acts(t), *step)))

    def _acts(self, t: Tensor) -> Tensor:
        """1 where guidance acts."""
        if self.contrast is None or self.contrast.everywhere:
            return torch.ones_like(t)
        u = self.denoiser.schedule.sigma(t) / self.denoiser.schedule.alpha(t).clamp(min=1e-300)
        return ((u > self.contrast.low) & (u <= self.contrast.high)).double()


class _Control(nn.Module):
    """What follows an evaluation: (error of the step, lam, h, last accepted error, phase) -> the same of the next turn."""

    def __init__(self, control: Control, lam_end: float) -> None:
        super().__init__()
        self.control, self.lam_end = control, lam_end

    def forward(self, error: Tensor, lam: Tensor, h: Tensor, last: Tensor, phase: Tensor) -> tuple[Tensor, ...]:
        error = error.clamp(min=1e-10)
        judged = phase == ORDER - 1
        accepted = judged & (error <= 1.0)
        # PI control as in fastdiff.adaptive
        factor = PAIR.safety * error ** (-0.7 / ORDER) * torch.where(accepted, last ** (0.4 / ORDER), 1.0)
        end = torch.where(accepted, lam + h, lam).clamp(max=self.lam_end)
        h = torch.where(judged, h * factor.clamp(0.2, 5.0), h)
        h = torch.minimum(h, self.lam_end - end)  # no further than the end
        following = torch.where(judged, 0.0, phase + 1)
        moved = accepted | (phase < 0)
        arrived = (following == 0) & (end >= self.lam_end - 1e-9)
        return end, h, torch.where(accepted, error, last), following, moved.double(), arrived.double()


def adaptive_model(traced: Traced, control: Control, contrast: Contrast | None = None) -> Any:
    """The model. Inputs as those of a plan's sampler without draws, and `rtol` and `atol` () float32; outputs too, and `nfe` ()
    int64, the evaluations of every sample, and `finished` () bool, false where they ran out before the end."""
    g = Graph()
    schedule = traced.denoiser.schedule
    start = float(schedule.lam(schedule.t_max))
    begin = start if math.isfinite(start) else LAM_START
    evaluation = Evaluation.of(g, traced, contrast)
    x = g.add("Mul", "noise", g.constant([float(schedule.sigma(schedule.t_max))], np.float32))
    none = g.add("Sub", "noise", "noise")
    scalars = [begin, control.first_step, 1.0, 0.0 if math.isfinite(start) else -1.0]
    states = [x, x, none, none, *(g.constant([v], np.float64) for v in scalars), g.constant([0.0], np.float64)]
    states += [g.constant(0, np.int64), g.constant(False, np.bool_)]
    body = _body(evaluation, control)
    final = [g.name("final") for _ in states]
    most, true = g.constant(control.max_nfe, np.int64), g.constant(True, np.bool_)
    g.nodes.append(helper.make_node("Loop", [most, true, *states], final, name="path", body=body))
    shown = outputs(g, final[0], traced)
    g.add("Identity", final[-2], into=["nfe"])
    g.add("Identity", final[-1], into=["finished"])
    full = (BATCH, *traced.sizes)
    inputs = [value("noise", FLOAT, full), *evaluation.inputs(), value("rtol", FLOAT, ()), value("atol", FLOAT, ())]
    made = [value("x", FLOAT, full), shown, value("nfe", INT64, ()), value("finished", BOOL, ())]
    return g.model("adaptive", inputs, made, traced.opset)


def _body(evaluation: Evaluation, control: Control) -> Any:
    """One turn: an evaluation, and what it does to the states x, y, d0, d1 and to the controller."""
    traced = evaluation.traced
    denoiser = traced.denoiser
    # five tensors: torch.export takes one that is given twice for one input
    one, two, three, four, five = torch.rand(5, 1, dtype=torch.float64).unbind()
    lam_end = float(denoiser.schedule.lam(denoiser.schedule.t_min))
    weights = export_module(_Weights(denoiser, evaluation.contrast), (one, two, three), traced.opset, any_batch=False)
    controller = export_module(_Control(control, lam_end), (one, two, three, four, five), traced.opset, any_batch=False)
    g = Graph("body.")
    g.weights_of(traced.model, WEIGHTS)
    g.weights_of(weights, "weights.")
    g.weights_of(controller, "controller.")
    told = g.inline(weights, ["lam", "h", "phase"], "weights.")
    names = LEVELS if evaluation.contrast else LEVELS[:4]
    d = evaluation.denoised(g, "y", {**dict.fromkeys(LEVELS, 1.0), **dict(zip(names, told, strict=False))})
    on_x, on_d, on_change, on_first = told[5:]
    early = g.add("LessOrEqual", "phase", g.constant([0.0], np.float64))
    second = g.add("Equal", "phase", g.constant([1.0], np.float64))
    d0, d1 = g.add("Where", early, d, "d0"), g.add("Where", second, d, "d1")
    straight = total(g, [(on_x, "x"), (on_d, d0)])
    point = g.add("Add", straight, g.add("Mul", g.add("Sub", d, d0), on_change))
    lower = g.add("Add", straight, g.add("Mul", g.add("Sub", d1, d0), on_first))
    error = _error(g, point, lower, len(traced.shape))
    lam, h, last, phase, moved, arrived = g.inline(controller, [error, "lam", "h", "error", "phase"], "controller.")
    done = _last(g, control)
    kept = g.add("Where", _yes(g, moved), point, "x")
    judged = g.add("Equal", "phase", g.constant([ORDER - 1.0], np.float64))
    g.add("Where", done, d, kept, into=["x_next"])
    g.add("Where", judged, kept, point, into=["y_next"])
    ends = {"d0": d0, "d1": d1, "lam": lam, "h": h, "error": last, "phase": phase, "arrived": arrived}
    ends["calls"] = g.add("Add", "calls", g.constant(1, np.int64))
    ends["finished"] = g.add("And", done, g.add("Squeeze", _yes(g, "arrived")))
    for name, v in ends.items():
        g.add("Identity", v, into=[f"{name}_next"])
    g.add("Not", done, into=["still_going"])
    full, number = (BATCH, *traced.sizes), (1,)
    kinds: dict[str, tuple[int, Any]] = dict.fromkeys(("x", "y", "d0", "d1"), (FLOAT, full))
    kinds |= dict.fromkeys(SCALARS, (DOUBLE, number))
    order = {**kinds, "arrived": (DOUBLE, number), "calls": (INT64, ()), "finished": (BOOL, ())}
    given = [value("turn", INT64, ()), value("going", BOOL, ()), *(value(n, *kind) for n, kind in order.items())]
    return g.graph("turn", given, [value("still_going", BOOL, ()), *(value(f"{n}_next", *kind) for n, kind in order.items())])


def _last(g: Graph, control: Control) -> str:
    """() bool: this evaluation starts no step; the path is done, or too few evaluations are left for one step and the last."""
    starts = g.add("Equal", "phase", g.constant([0.0], np.float64))
    tired = g.add("Greater", "calls", g.constant(control.max_nfe - ORDER - 1, np.int64))
    return str(g.add("And", g.add("Squeeze", starts), g.add("Or", g.add("Squeeze", _yes(g, "arrived")), tired)))


def _yes(g: Graph, number: str) -> str:
    return str(g.add("Greater", number, g.constant([0.5], np.float64)))


def _error(g: Graph, point: str, lower: str, dims: int) -> str:
    """The worst sample's root-mean-square difference of the two results, relative to atol + rtol |x|; (1,) float64."""
    size = g.add("Max", g.add("Abs", "x"), g.add("Abs", point))
    off = g.add("Div", g.add("Sub", point, lower), g.add("Add", "atol", g.add("Mul", "rtol", size)))
    square = g.add("Mul", wide := g.add("Cast", off, to=DOUBLE), wide)
    mean = g.add("ReduceMean", square, g.constant(range(1, 1 + dims), np.int64), keepdims=0)
    return str(g.add("Sqrt", g.add("ReduceMax", mean, g.constant([0], np.int64), keepdims=1)))
