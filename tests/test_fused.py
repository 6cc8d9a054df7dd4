"""A row as one matrix: the same samples as the eager loop, for every solver, prediction and guidance. On the CPU, by torch."""

import pytest
import torch

import fastdiff as fd
from fastdiff import fused
from fastdiff.kernels.combine import INPUTS, OUTPUTS
from fastdiff.sampling import begin, run

SCHEDULE = fd.schedule.vp_cosine()
SHAPE = (2, 2, 2)


def network(x, t, class_labels=None):
    """Bounded, bent, different at every time and for every class."""
    shift = 0.0 if class_labels is None else class_labels.view(-1, 1, 1, 1) / 5
    return torch.tanh(x * (1 + t.view(-1, 1, 1, 1)) + shift)


def twice(x, t):
    return torch.cat([network(x, t), torch.cos(network(x, t))], 1)


def denoiser(prediction="v"):
    return fd.Denoiser(twice if prediction == "both" else network, SCHEDULE, prediction, shape=SHAPE)


def guided(scale=3.0, **options):
    labels = torch.tensor([1, 2])
    return fd.guide.cfg(denoiser(), scale, cond={"class_labels": labels}, negative={"class_labels": 0 * labels}, **options)


def both(den, plan, noise=None, dtype=torch.float32):
    """The sample by the eager loop and by matrices, and the points that a callback saw."""
    state, source = begin(den, plan, noise, None if noise is not None else [1, 2**64 - 1], None, dtype, None)
    seen = ([], [])
    eager = run(den, plan, state, source, lambda i, y: seen[0].append(y))
    ours = fused.run(den, plan, state, source, lambda i, y: seen[1].append(y))
    return eager, ours, seen


@pytest.mark.parametrize("name", sorted(set(fd.list_solvers()) - {"annealed-langevin"}))  # hundreds of like rows
def test_every_solver(name):
    plan = fd.plan(name, SCHEDULE, 6)
    _, _, (left, right) = both(denoiser(), plan, dtype=torch.float64)  # float32 rounds apart where weights are large
    torch.testing.assert_close(torch.stack(right), torch.stack(left), rtol=1e-9, atol=1e-9)
    for row in fused.matrices(plan, guided()):
        assert len(row.row.reads) <= INPUTS and len(row.row.writes) <= OUTPUTS


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow", "score", "edm", "both"])
def test_every_prediction(prediction):
    den = denoiser(prediction)
    plan = fd.plan("unipc-2", den, 5, grid="uniform_t")
    eager, ours, _ = both(den, plan)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.0}, {"scale": 1.0}, {"batched": True}, {"interval": (0.2, 2.0)}, {"rescale": 0.5}],
    ids=str,
)
def test_guidance(options):
    den = guided(**options)
    plan = fd.plan("dpmpp-2m-sde", SCHEDULE, 6)
    eager, ours, _ = both(den, plan)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_guidance_and_conversion_are_part_of_the_row():
    """Two outputs of the network and the base go in, the next point and what is kept come out: five passes, not twenty."""
    row, _, weights, _ = fused.matrices(fd.plan("dpmpp-2m", SCHEDULE, 6), guided())[2]
    assert [c for c in row.reads if str(c).startswith("f")] == ["f0", "f1"] and len(row.reads) == 4
    assert weights.shape == (2, 4)


def test_a_guidance_that_is_not_linear_is_called_whole():
    assert guided(rescale=0.5).folded(0.5) is None
    assert fd.guide.cfgpp(
        denoiser(), 0.5, fd.plan("ddim", SCHEDULE, 4), cond={"class_labels": torch.tensor([1, 2])},
        negative={"class_labels": torch.tensor([0, 0])},
    ).folded(0.5) is None  # fmt: skip


def test_a_plain_callable_and_given_noises():
    plan = fd.plan("ddpm", SCHEDULE, 5)
    random = torch.Generator().manual_seed(0)
    noises = fd.noise.recorded([torch.randn(2, *SHAPE, generator=random) for _ in range(plan.draws + 1)])
    state = noises(0, (2, *SHAPE), torch.device("cpu")) * plan.start[1]

    def call(x, t):
        return denoiser()(x, t)

    ours = fused.run(call, plan, state, noises)
    torch.testing.assert_close(ours, run(call, plan, state, noises), rtol=1e-5, atol=1e-5)


def test_a_network_with_learned_variance_keeps_its_first_half():
    def twice(x, t):
        return torch.cat([network(x, t), 100 + x], 1)

    den = fd.Denoiser(twice, SCHEDULE, "eps", shape=SHAPE)
    eager, ours, _ = both(den, fd.plan("ddim", SCHEDULE, 4))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_noise_of_learned_strength():
    """Whose factor the network says: the noise is made beside the op, its strength on the device."""
    def twice(x, t):
        return torch.cat([network(x, t), torch.sin(3 * x)], 1)

    den = fd.Denoiser(twice, SCHEDULE, "eps", shape=SHAPE)
    eager, ours, _ = both(den, fd.plan("ddpm", SCHEDULE, 5, variance="learned"))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
