"""Every time-local guidance on a mixture of Gaussians, where the guided score is known in closed form."""

import math

import pytest
import torch
from analytic import BIMODAL, Mixture

import fastdiff as fd
from fastdiff.errors import FastdiffError

SCHEDULE = fd.schedule.vp_cosine()
COMPONENTS = [Mixture((1.0,), (m,), (s,)) for m, s in zip(BIMODAL.means, BIMODAL.stds, strict=True)]
X = torch.linspace(-2.5, 2.5, 24, dtype=torch.float64).view(4, 1, 6)
T = 0.45
TIMES = [T, torch.tensor([0.2, 0.45, 0.6, 0.9], dtype=torch.float64)]
LABELS = torch.tensor([0, 1, 1, 0])


def level(t, x=X):
    """alpha and sigma, broadcasting against x."""
    ones = (1,) * (x.ndim - 1)
    return (torch.as_tensor(v(t), dtype=torch.float64).reshape(-1, *ones) for v in (SCHEDULE.alpha, SCHEDULE.sigma))


def network(x, t, class_labels=None):
    """x0 given a class: a component's posterior mean; class 2 is the null class, the whole mixture."""
    alpha, sigma = level(t.double(), x)
    outs = torch.stack([m.denoise_torch(x, alpha, sigma) for m in (*COMPONENTS, BIMODAL)])
    labels = torch.full((len(x),), 2) if class_labels is None else class_labels
    return outs[labels, torch.arange(len(x))]


network.null_label = 2
DEN = fd.Denoiser(network, SCHEDULE, "x0", time=lambda t: t)


def log_joint(x, t, given=None):
    """log p_t(x) of the mixture, or log w_c p_t(x | c), elementwise."""
    alpha, sigma = level(t, x)
    logs = []
    for w, m, s in zip(BIMODAL.weights, BIMODAL.means, BIMODAL.stds, strict=True):
        var = alpha**2 * s**2 + sigma**2
        logs.append(math.log(w) - 0.5 * torch.log(2 * math.pi * var) - (x - alpha * m) ** 2 / (2 * var))
    logs = torch.stack(logs)
    return torch.logsumexp(logs, 0) if given is None else logs[given, torch.arange(len(x))]


def log_posterior(x, t, labels):
    """log p(c | x_t), summed over a sample's elements: the exact noise-aware classifier."""
    return (log_joint(x, t, labels) - log_joint(x, t)).flatten(1).sum(1)


def from_score(log_density, t, x=X):
    """The denoised prediction of a known density: (x + sigma^2 grad log p) / alpha (Tweedie)."""
    alpha, sigma = level(t, x)
    y = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(y).sum(), y)
    return (x + sigma**2 * score) / alpha


def gaussian(mean, std):
    return fd.Denoiser(Mixture((1.0,), (mean,), (std,)).network(SCHEDULE), SCHEDULE, "x0")


def close(got, want, tolerance=1e-6):  # times reach a network as float32
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


TIME = pytest.mark.parametrize("t", TIMES, ids=["float", "tensor"])


@TIME
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("batched", [True, False])
def test_classifier_free(t, scale, batched):
    """The score of p(x|c)^scale p(x)^(1 - scale)."""
    def tilted(y):
        return scale * log_joint(y, t, LABELS) + (1 - scale) * log_joint(y, t)

    g = fd.guide.cfg(DEN, scale, cond={"class_labels": LABELS}, batched=batched)
    close(g(X, t), from_score(tilted, t))
    close(fd.guide.cfg(DEN, w=scale - 1, cond={"class_labels": LABELS})(X, t) if scale else g(X, t), g(X, t), 1e-12)


@TIME
def test_negative_condition(t):
    """The score of p(x|0)^2.5 p(x|1)^-1.5."""
    g = fd.guide.cfg(DEN, 2.5, cond={"class_labels": 0 * LABELS}, negative={"class_labels": 0 * LABELS + 1})
    close(g(X, t), from_score(lambda y: 2.5 * log_joint(y, t, 0 * LABELS) - 1.5 * log_joint(y, t, 0 * LABELS + 1), t))


@TIME
def test_interval_and_rescale(t):
    """Guided where sigma/alpha lies in the interval, conditional elsewhere; scaled back to the conditional spread."""
    alpha, sigma = level(t)
    conditional = from_score(lambda y: log_joint(y, t, LABELS), t)
    guided = from_score(lambda y: 3 * log_joint(y, t, LABELS) - 2 * log_joint(y, t), t)
    u = (sigma / alpha).expand_as(X)
    inside = (u > 0.5) & (u <= 1.2)
    assert inside.any() and (isinstance(t, float) or not inside.all())
    close(fd.guide.cfg(DEN, 3.0, {"class_labels": LABELS}, interval=(0.5, 1.2))(X, t), torch.where(inside, guided, conditional))
    ratio = conditional.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True)
    close(fd.guide.cfg(DEN, 3.0, {"class_labels": LABELS}, rescale=0.7)(X, t), guided * (0.7 * ratio + 0.3))


@TIME
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_classifier(t, scale):
    """With the exact p(c | x_t), scale 1 is the conditional model itself."""
    g = fd.guide.classifier(DEN, log_posterior, scale, labels=LABELS)
    close(g(X, t), from_score(lambda y: (1 - scale) * log_joint(y, t) + scale * log_joint(y, t, LABELS), t))
    if scale == 1.0:
        close(g(X, t), DEN.bind(class_labels=LABELS)(X, t))
    assert g.calls == g.calls_at(T) == 1


@TIME
def test_a_linear_loss_through_the_network_tilts_a_gaussian_exactly(t):
    """p(x0) exp(-scale a x0) of N(m, s^2) is N(m - scale a s^2, s^2)."""
    m, s, a, scale = 0.4, 0.6, 1.7, 0.8
    data, tilted = gaussian(m, s), gaussian(m - scale * a * s**2, s)
    g = fd.guide.loss(data, lambda x0, weight: (weight * x0).flatten(1).sum(1), scale, weight=torch.full((4, 1, 6), a).double())
    close(g(X, t), tilted(X, t))


@TIME
def test_a_linear_loss_beside_the_network_is_exact_for_unit_variance(t):
    data, tilted = gaussian(0.3, 1.0), gaussian(0.3 - 0.5 * 2.0, 1.0)
    close(fd.guide.loss(data, lambda x0: 2.0 * x0.flatten(1).sum(1), 0.5, through=False)(X, t), tilted(X, t))


@TIME
def test_a_loss_through_the_network_is_its_gradient(t):
    """On the mixture: Tweedie's form of the score plus -scale grad loss(D(x)), by finite differences."""
    def function(x0):
        return (x0**3).flatten(1).sum(1)

    g, h = fd.guide.loss(DEN, function, 0.3), 1e-4
    alpha, sigma = level(t)
    slope = torch.zeros_like(X)
    for i in range(6):
        step = torch.zeros_like(X)
        step[..., i] = h
        slope[..., i] = ((function(DEN(X + step, t)) - function(DEN(X - step, t))) / (2 * h))[:, None]
    close(g(X, t), DEN(X, t) - 0.3 * sigma**2 / alpha * slope, 1e-5)


@TIME
def test_composed_conditions(t):
    """The score of p(x|0)^2 p(x|1)^0.7 p(x)^-1.7."""
    zeros = 0 * LABELS
    g = fd.guide.compose(DEN, [{"class_labels": zeros}, {"class_labels": zeros + 1}], [2.0, 0.7])
    close(g(X, t), from_score(lambda y: 2 * log_joint(y, t, zeros) + 0.7 * log_joint(y, t, zeros + 1) - 1.7 * log_joint(y, t), t))
    assert g.calls == 3
    assert fd.guide.compose(DEN, [{"class_labels": zeros}, {"class_labels": zeros + 1}], [0.4, 0.6]).calls == 2


@TIME
def test_autoguidance(t):
    """Away from a network whose data are wider: the score of p^2 / q."""
    wide = Mixture(BIMODAL.weights, BIMODAL.means, (0.9, 1.1))
    weaker = fd.Denoiser(wide.network(SCHEDULE), SCHEDULE, "x0")
    alpha, sigma = level(t)

    def log_wide(y):
        logs = []
        for w, m, s in zip(wide.weights, wide.means, wide.stds, strict=True):
            var = alpha**2 * s**2 + sigma**2
            logs.append(math.log(w) - 0.5 * torch.log(var) - (y - alpha * m) ** 2 / (2 * var))
        return torch.logsumexp(torch.stack(logs), 0)

    close(fd.guide.autoguidance(DEN, weaker, 2.0)(X, t), from_score(lambda y: 2 * log_joint(y, t) - log_wide(y), t))
    with pytest.raises(FastdiffError, match="one noise schedule"):
        fd.guide.autoguidance(DEN, fd.Denoiser(network, fd.schedule.flow(), "x0"), 2.0)


@pytest.mark.parametrize(("eta", "norm"), [(0.0, 0.0), (1.0, 0.0), (0.3, 0.5), (0.0, 0.01)])
def test_projected(eta, norm):
    d, n = DEN.bind(class_labels=LABELS)(X, T), DEN(X, T)
    out = fd.guide.apg(DEN, 4.0, cond={"class_labels": LABELS}, eta=eta, norm=norm)(X, T)
    for i in range(4):  # by hand, one sample at a time, in a basis whose first direction is d
        a, change = d[i].flatten(), (d[i] - n[i]).flatten()
        if norm and change.norm() > norm:
            change = change / change.norm() * norm
        unit = a / a.norm()
        along = (change @ unit) * unit
        close(out[i].flatten(), a + 3.0 * (change - along + eta * along), 1e-9)
    if (eta, norm) == (1.0, 0.0):
        close(out, fd.guide.cfg(DEN, 4.0, cond={"class_labels": LABELS})(X, T), 1e-9)


def test_limits():
    wide = fd.Denoiser(lambda x, t: 3 * x, SCHEDULE, "x0", data_range=(0.0, 4.0))
    close(fd.guide.clip(wide)(X, T), (3 * X).clamp(0, 4))
    close(fd.guide.clip(wide, -1, 1)(X, T), (3 * X).clamp(-1, 1))
    got = fd.guide.threshold(wide, 0.9)(X, T)
    for i in range(4):
        v = ((3 * X[i]) - 2) / 2
        s = max(1.0, float(torch.quantile(v.abs().flatten(), 0.9)))
        close(got[i], (v.clamp(-s, s) / s) * 2 + 2, 1e-9)
    mean = from_score(lambda y: log_joint(y, T), T)  # and on the mixture
    close(fd.guide.clip(DEN, -0.5, 0.4)(X, T), mean.clamp(-0.5, 0.4))
    far = mean.abs().amax((1, 2), keepdim=True).clamp_min(1.0)
    close(fd.guide.threshold(DEN, 1.0)(X, T), mean / far)
    inside = fd.Denoiser(lambda x, t: torch.tanh(x), SCHEDULE, "x0")
    assert torch.equal(fd.guide.threshold(inside)(X, T), torch.tanh(X))
    guide = fd.guide
    for bad in (lambda: guide.clip(wide, 2, 1), lambda: guide.threshold(wide, 0.0), lambda: guide.threshold(wide, 0.9, 0.5)):
        with pytest.raises(FastdiffError, match="needs"):
            bad()


@pytest.mark.parametrize("prediction", ["x0", "edm"])
def test_an_image_as_condition(prediction):
    """x0 ~ N(0, 1) seen with noise of variance 1/4: the network gets it unscaled, and its posterior mean is known."""
    schedule = fd.schedule.edm(0.01, 50.0)
    seen = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def joint(both, t):
        sigma = (torch.exp(4 * t) if prediction == "edm" else t).double().view(-1, 1, 1, 1)
        x, image = both.chunk(2, dim=1)
        c_in, c_skip, c_out = 1 / (sigma**2 + 0.25).sqrt(), 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        x = x / c_in if prediction == "edm" else x
        mean = (x / sigma**2 + image * 4) / (1 / sigma**2 + 4 + 1)
        return (mean - c_skip * x) / c_out if prediction == "edm" else mean

    den = fd.guide.image_condition(fd.Denoiser(joint, schedule, prediction, shape=(1, 4, 4)), seen)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    close(den(x, 2.0), (x / 4 + 4 * seen) / (1 / 4 + 5))
    close(den.subset(torch.tensor([2]), 3)(x[2:], 2.0), den(x, 2.0)[2:])
    with pytest.raises(FastdiffError, match="3 conditioning images for a batch of 2"):
        den(x[:2], 2.0)
    with pytest.raises(FastdiffError, match="resize it"):
        fd.guide.image_condition(fd.Denoiser(joint, schedule, prediction, shape=(1, 8, 8)), seen)


def test_augmented_images():
    told = []

    def cascade(both, t, aug_level):
        told.append(aug_level.tolist())
        return both[:, 1:]

    base, image = fd.Denoiser(cascade, SCHEDULE, "x0", shape=(1, 64, 64)), torch.ones(2, 1, 64, 64)
    seen = fd.guide.augmented(base, image, 0.3, seeds=[5, 6])(0 * image, 0.5)
    alpha, sigma = float(SCHEDULE.alpha(0.3)), float(SCHEDULE.sigma(0.3))
    assert told[-1] == pytest.approx([0.3, 0.3])
    assert seen.mean() == pytest.approx(alpha, abs=0.02) and seen.std() == pytest.approx(sigma, rel=0.02)
    again = fd.guide.augmented(base, image[:1], 0.3, seeds=[6])(0 * image[:1], 0.5)
    assert torch.equal(again[0], seen[1])  # a sample's augmentation is its own seed's
    assert torch.equal(fd.guide.augmented(base, image, 0.0, seeds=[5, 6])(0 * image, 0.5), image)
    with pytest.raises(FastdiffError, match="augmentation time"):
        fd.guide.augmented(base, image, 1.5, seeds=[5, 6])


def test_cfgpp_is_chung_et_al():
    """Algorithm 2 written out: the guided prediction, noised on with the unconditional noise; also from alpha = 0."""
    for schedule, first in ((SCHEDULE, 0.9), (fd.schedule.flow(), 1.0)):
        times = [first, 0.6, 0.3, 0.1]

        def scaled(x, t, c, schedule=schedule):
            return COMPONENTS[0].network(schedule)(x, float(t[0])) * c[:, None, None] + 0.3

        den = fd.Denoiser(scaled, schedule, "x0")
        plan = fd.plan("ddim", schedule, steps=4, grid=times)
        cond, negative = {"c": torch.ones(4, dtype=torch.float64)}, {"c": torch.zeros(4, dtype=torch.float64) + 0.2}
        g = fd.guide.cfgpp(den, 0.6, plan, cond, negative)
        x = X.clone()
        for t, u in zip(times, [*times[1:], None], strict=True):
            alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
            a, s = (1.0, 0.0) if u is None else (float(schedule.alpha(u)), float(schedule.sigma(u)))
            d, n = den.bind(**cond)(x, t), den.bind(**negative)(x, t)
            x = a * (n + 0.6 * (d - n)) + s * (x - alpha * n) / sigma
        close(fd.sample(g, plan, start=X, dtype=torch.float64), x, 1e-6)
    assert g.guidance is None
    with pytest.raises(FastdiffError, match="made for one plan"):
        g(X, 0.55)
    with pytest.raises(FastdiffError, match="made for one plan"):
        g(X, torch.full((4,), 0.6))


@pytest.mark.parametrize(
    "solver", ["ddim", "dpmpp-3m", "unipc-3", "heun", "dpm-2", "rk4", "plms", "dpmpp-sde", "restart", "sa-solver-pece"]
)
def test_cfgpp_has_a_scale_at_every_row(solver):
    plan = fd.plan(solver, SCHEDULE, 12)
    g = fd.guide.cfgpp(DEN, 0.5, plan, {"class_labels": LABELS})
    assert fd.sample(g, plan, start=X, noise=fd.noise.from_torch(torch.Generator()), dtype=torch.float64).isfinite().all()


GUIDANCES = {
    "cfg": lambda d: fd.guide.cfg(d, 2.0), "interval": lambda d: fd.guide.cfg(d, 2.0, interval=(0.3, 3.0)),
    "rescale": lambda d: fd.guide.cfg(d, 2.0, rescale=0.5), "apg": lambda d: fd.guide.apg(d, 2.0),
    "clip": lambda d: fd.guide.clip(d), "threshold": lambda d: fd.guide.threshold(d),
    "autoguidance": lambda d: fd.guide.autoguidance(d, fd.Denoiser(lambda x, t, class_labels: 0.9 * x, SCHEDULE, "x0")
                                                    .bind(class_labels=LABELS), 1.5),
    "classifier": lambda d: fd.guide.classifier(d, log_posterior, labels=LABELS),
    "loss": lambda d: fd.guide.loss(d, lambda x0, target: (x0 - target).square().flatten(1).sum(1), 0.2, target=X.clone()),
    "loss beside": lambda d: fd.guide.loss(d, lambda x0: x0.square().flatten(1).sum(1), 0.2, through=False),
    "composed": lambda d: fd.guide.compose(d, [{"class_labels": 0 * LABELS}, {"class_labels": LABELS}], [1.0, 0.5]),
    "all": lambda d: fd.guide.clip(fd.guide.loss(fd.guide.cfg(d, 2.0), lambda x0: x0.flatten(1).sum(1), 0.1)),
}  # fmt: skip


@pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)
def test_composes_with_solvers_adaptive_steps_and_is_per_sample(guidance):
    den = fd.Denoiser(network, SCHEDULE, "x0", shape=(1, 6)).bind(class_labels=LABELS)
    g = guidance(den)
    assert isinstance(g, fd.Denoiser) and g.plan is None
    for solver in ("unipc-2", "heun", "dpmpp-2m-sde"):
        plan = fd.plan(solver, g, 7)
        whole = fd.sample(g, plan, seeds=[1, 2, 3, 4])
        assert whole.isfinite().all()
        part = fd.sample(g.subset(torch.tensor([2, 0]), 4), plan, seeds=[3, 1])
        torch.testing.assert_close(part, whole[[2, 0]], rtol=1e-4, atol=1e-4)
    x, nfe = fd.sample_adaptive(g, seeds=[1, 2, 3, 4], rtol=0.05)
    assert x.isfinite().all() and len(nfe) == 4


@pytest.mark.slow
@pytest.mark.parametrize("solver", fd.list_solvers())
def test_every_solver_on_the_guided_score(solver):
    """Clipped classifier-free guidance in a solver, and the solver on the closed form of it."""
    def known(x, t):
        with torch.enable_grad():
            return from_score(lambda y: 2 * log_joint(y, t, LABELS) - log_joint(y, t), t, x).clamp(-1.2, 1.2)

    g = fd.guide.clip(fd.guide.cfg(DEN, 2.0, {"class_labels": LABELS}), -1.2, 1.2)
    if fd.plan(solver, g, 12).learned_variance:
        pytest.skip("its noise needs a network's second output")
    plan = fd.plan(solver, g, 12)
    start, noise = X * plan.start[1], fd.noise.from_torch(torch.Generator().manual_seed(0))
    got = fd.sample(g, plan, noise, start=start, dtype=torch.float64)
    again = fd.noise.from_torch(torch.Generator().manual_seed(0))
    close(got, fd.sample(known, plan, again, start=start, dtype=torch.float64), 1e-4)


def test_learned_plans_are_refused_under_guidance_they_were_not_learned_for():
    plan = fd.plan("ddim", SCHEDULE, 3)
    made = {"checkpoint": "", "prediction": "x0", "schedule": SCHEDULE.config(), "guidance": [2.0]}
    plan = fd.Plan(plan.name, plan.rows, plan.start, plan.end, provenance={"tuned_for": made})
    den = fd.Denoiser(network, SCHEDULE, "x0").bind(class_labels=LABELS)
    assert fd.guide.cfg(den, 2.0).why_not(plan) is None
    for name, guidance in GUIDANCES.items():
        if name != "cfg":
            assert "tuned at guidance 2" in guidance(den).why_not(plan), name


def test_bad_input():
    bound = DEN.bind(class_labels=LABELS)
    bad = {
        "one of the two": lambda: fd.guide.cfg(bound, 2.0, w=1.0),
        "takes no condition text; it takes none": lambda: fd.guide.cfg(
            fd.Denoiser(lambda x, t: x, SCHEDULE, "x0"), 2.0, {"text": 1}, {"text": 0}
        ),
        "takes no condition text; it takes class_labels": lambda: fd.guide.cfg(bound, 2.0, {"text": 1}, {"text": 0}),
        "3 negative conditions for 4": lambda: fd.guide.cfg(bound, 2.0, negative={"class_labels": LABELS[:3]}),
        "needs negative=": lambda: fd.guide.cfg(fd.Denoiser(lambda x, t, c: x, SCHEDULE, "x0"), 2.0, cond={"c": LABELS}),
        "one number a sample": lambda: fd.guide.loss(DEN, lambda x0: x0.sum(), 1.0)(X, T),
        "does not depend": lambda: fd.guide.loss(DEN, lambda x0: torch.zeros(4), 1.0)(X, T),
        "finite scale": lambda: fd.guide.classifier(DEN, log_joint, math.nan),
        "a finite scale a condition": lambda: fd.guide.compose(DEN, [{"class_labels": LABELS}], [1.0, 2.0]),
        "finite eta": lambda: fd.guide.apg(bound, 2.0, eta=math.inf),
        r"in \[0, 1\]": lambda: fd.guide.cfgpp(bound, 2.0, fd.plan("ddim", SCHEDULE, 3)),
        "torch modules": lambda: fd.guide.pag(DEN, 2.0),
        "4 class_labels for a batch of 3: give one a sample": lambda: fd.sample(bound, fd.plan("ddim", SCHEDULE, 3), start=X[:3]),
        "4 class_labels for a batch of 1": lambda: fd.sample(fd.guide.cfg(bound, 2.0), fd.plan("ddim", SCHEDULE, 3), start=X[:1]),
        "2 target for a batch of 4": lambda: fd.sample(
            fd.guide.loss(DEN, lambda x0, target: (x0 - target).flatten(1).sum(1), 1.0, target=X[:2]),
            fd.plan("ddim", SCHEDULE, 3), start=X,
        ),
        "3 class_labels for a batch of 2": lambda: fd.sample_adaptive(DEN.bind(class_labels=LABELS[:3]), start=X[:2]),
    }
    for match, call in bad.items():
        with pytest.raises(FastdiffError, match=match):
            call()
