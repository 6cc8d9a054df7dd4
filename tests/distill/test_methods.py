"""Guided distillation, segment consistency, consistency tuning: what their targets are, and that their students learn."""

import copy
import dataclasses

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import fastdiff as fd
from fastdiff.bench import Bench, Setup
from fastdiff.bench.cells import tuned_cells
from fastdiff.bench.converged import rmse
from fastdiff.distill import ECT, Consistency, Distiller, Guided, Match, Progressive, Settings, Trajectory
from fastdiff.distill.guided import contrast
from fastdiff.distill.method import Batch, Stage
from fastdiff.distill.trajectory import followed, points
from fastdiff.errors import FastdiffError
from fastdiff.models import UNet
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Images, load_images
from fastdiff.training.trainer import Trainer

SCHEDULE = fd.schedule.vp_cosine()
SHORT = {"updates": 2, "batch": 4}
NETWORK = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention": [], "head_channels": 32}
NEW = [Guided(start=4, steps=2, **SHORT), Consistency(inner=4, **SHORT), ECT(phases=2, **SHORT)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return fd.load(tiny.checkpoint(tmp_path_factory.mktemp("teacher") / "t.safetensors"))


@pytest.fixture(scope="module")
def images():
    x, y = tiny.images(48)
    return Images(torch.from_numpy(x)[:, None], torch.from_numpy(y), ("a", "b", "c"), "digest")


def batch(n=6, scales=None):
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(n, 1, 8, 8, generator=generator)  # noqa: E731
    return Batch(draw().tanh(), draw(), torch.arange(n) % 3, generator, scales)


def ideal():
    """The exact denoiser of N(0, 1) pixels: D = alpha y, whose trajectories keep y where alpha^2 + sigma^2 = 1."""
    return fd.Denoiser(lambda x, t: x * SCHEDULE.alpha(t.double()).to(x.dtype).view(-1, 1, 1, 1), SCHEDULE, "x0")


@pytest.mark.parametrize("method", NEW, ids=lambda m: m.name)
def test_the_student_is_the_teacher_before_the_first_update(method, teacher, images, tmp_path):
    run = Distiller(teacher, method, tmp_path, images)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    want = teacher.bind(class_labels=labels)(x, t)
    student = run.student.bind(class_labels=labels)
    assert torch.equal(student(x, t), want)
    if method.name == "guided":
        assert torch.equal(student.bind(guidance=torch.tensor([1.0, 2.5, 5.0]))(x, t), want)
        assert torch.equal(fd.guide.cfg(student, 3.0)(x, t), want)


def test_the_guided_target_is_guidance_at_each_samples_scale(teacher):
    scales = torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    b, t = batch(6, scales), torch.linspace(0.1, 0.9, 6).double()
    den, z = copy.deepcopy(teacher).to(dtype=torch.float64), b.noise.double()
    got = contrast(den.bind(class_labels=b.labels), b)(z, t)
    for i, scale in enumerate(scales.tolist()):
        one = fd.guide.cfg(den.bind(class_labels=b.labels[i : i + 1]), scale)
        torch.testing.assert_close(got[i : i + 1], one(z[i : i + 1], t[i : i + 1]), rtol=0, atol=1e-11)


def test_a_benchmark_measures_a_student_with_its_own_plan_and_guidance(teacher, images, tmp_path):
    student = Distiller(teacher, Guided(start=2, steps=2, updates=1, batch=4), tmp_path, images).run()
    setup = Setup(6, guidance=3.0)
    (cell,) = tuned_cells(student, setup)
    bench = Bench(student, setup, tmp_path / "bench", None)
    record, x = bench._cell(cell, None)
    assert cell.saved == student.plan and record["network_calls"] == 2 and x.shape == (6, 1, 8, 8)
    assert tuned_cells(teacher, setup) == []


def test_a_guided_student_learns_what_two_calls_of_the_teacher_say(teacher, images, tmp_path):
    """On images and noise that no update saw, at scale 5: nearer to the guided prediction than the teacher without guidance."""
    student = Distiller(teacher, Guided(start=4, steps=4, updates=80, lr=1e-3, batch=16), tmp_path, images).run()
    b, t = batch(48), torch.tensor([0.25, 0.5, 0.75]).repeat(16).double()
    alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    z = alpha * (images.x.float() / 127.5 - 1) + sigma * b.noise
    one, two = (fd.guide.cfg(d.bind(class_labels=images.y), 5.0) for d in (student, teacher))
    assert one.calls == 1 and two.calls == 2 and one.guidance == 5.0 and one.plan is not None
    want = two(z, t)
    errors = [float((d(z, t) - want).square().mean()) for d in (one, teacher.bind(class_labels=images.y))]
    assert errors[0] < 0.8 * errors[1], errors


def test_the_least_loss_is_that_of_the_guided_teacher(teacher, images):
    """A student that is the guided teacher has none, in the stage of two calls and in the halving after it; another has."""
    scales = torch.tensor([1.0, 2.0, 2.5, 3.0, 4.0, 5.0])
    b = batch(6, scales)
    true = teacher.bind(class_labels=b.labels)
    guided = contrast(true, b)
    perfect, other = (fd.Denoiser(f, SCHEDULE, "x0") for f in (guided, contrast(true, b._replace(scales=scales + 0.2))))
    for number, given in ((0, true), (1, perfect)):
        method = Guided(start=4, steps=2)
        method.begin(number, SCHEDULE)
        state = b.generator.get_state()
        losses = []
        for student in (perfect, other):
            b.generator.set_state(state)
            losses.append(float(method.loss(student, given, given, b)))
        # after it two steps are one: what one step can say is not the guided prediction itself any more
        assert losses[1] > 1e-4 and (losses[0] < 1e-8 if number == 0 else losses[0] < losses[1])


@pytest.mark.slow
def test_a_guided_student_follows_the_guided_teacher_with_half_the_calls(tmp_path):
    """A teacher that knows its data; endpoints from noise that no update drew, at three scales, after the first stage. It takes
    updates: 60 leave 1.07, 0.55 and 0.64 of the distance. (A teacher with drawn weights guides to values of 6, where no noised
    image has ever been: no student learns that from data.)"""
    images = load_images(tiny.npz(tmp_path / "x.npz"))
    settings = TrainConfig(steps=150, batch=16, lr=4e-3, warmup=10, ema=0.9, label_dropout=0.2, network=NETWORK)
    Trainer(settings, images, tmp_path / "teacher").run()
    teacher = fd.load(tmp_path / "teacher")
    method = Guided(start=4, steps=4, updates=180, lr=2e-3, batch=16)
    student = Distiller(teacher, method, tmp_path / "student", images).run()
    labels, seeds = torch.arange(24) % 3, range(500, 524)
    for scale in (2.0, 3.0, 5.0):
        one, two = (fd.guide.cfg(d.bind(class_labels=labels), scale) for d in (student, teacher))
        assert (one.calls, two.calls) == (1, 2)
        want, none = (fd.sample(d, student.plan, seeds=seeds) for d in (two, teacher.bind(class_labels=labels)))
        errors = [rmse(x, want) for x in (fd.sample(one, seeds=seeds), none)]
        assert errors[0] < 0.6 * errors[1], (scale, errors)


def test_scales_outside_the_range_and_other_guidance_are_refused(teacher, images, tmp_path):
    student = Distiller(teacher, NEW[0], tmp_path / "g", images).run().bind(class_labels=torch.tensor([0]))
    for scale, options, said in ((6.0, {}, "1 to 5"), (0.5, {}, "1 to 5"), (2.0, {"rescale": 0.5}, "rescale")):
        with pytest.raises(FastdiffError, match=said):
            fd.guide.cfg(student, scale, **options)
    with pytest.raises(FastdiffError, match="no guidance input"):
        teacher.bind(class_labels=torch.tensor([0]), guidance=2.0)(torch.zeros(1, 1, 8, 8), 0.5)


def test_a_guided_student_is_a_teacher_too(teacher, images, tmp_path):
    first = Distiller(teacher, NEW[0], tmp_path / "g", images).run()
    second = Distiller(first, Progressive(2, 1, **SHORT), tmp_path / "p", images).run()
    assert second.plan.nfe == 1 and second.network.guidance_range == (1.0, 5.0)


@pytest.mark.parametrize("settings", [{"segments": 0}, {"segments": 1}, {"segments": 0, "solver": "unipc-2", "calls": 3}])
def test_the_exact_flow_is_consistent(settings):
    """On Gaussian data a jump of the exact flow map is known: a target made by its own jumps has the flow map's value."""
    method = Consistency(steps=2, inner=64, **settings)
    method.begin(0, SCHEDULE)
    points, which = method._teacher, torch.arange(0, len(method._teacher), 7)
    z = torch.randn(len(which), 1, 8, 8, dtype=torch.float64)
    further = points.run(ideal(), z, which)
    exact = fd.Denoiser(lambda x, t: _jumping(method, x, t), SCHEDULE, "x0")
    got = method._goal(z, further, which, exact)
    want = _jumping(method, z, points.times[which, 0])
    # the one teacher step is DDIM with its own error; better solvers leave less of it
    assert float((got - want).abs().max()) < (2e-3 if "solver" in settings else 0.1)


def _jumping(method, x, t):
    """The denoised prediction whose DDIM step to the end of t's segment keeps x, as the exact flow does."""
    index = torch.stack([(method._times.double() - v).abs().argmin() for v in t.double()])
    shape = (-1, 1, 1, 1)
    start = (method._teacher.alpha[index, 0], method._teacher.sigma[index, 0])
    ratio = method._sigma[index] / start[1]
    return (x * (1 - ratio).view(shape) / (method._alpha[index] - ratio * start[0]).view(shape)).to(x.dtype)


def test_at_a_segments_end_nothing_but_the_teachers_step_counts():
    method = Consistency(steps=2, inner=1)
    method.begin(0, SCHEDULE)
    z = torch.randn(2, 1, 8, 8)
    further = method._teacher.run(ideal(), z, torch.arange(2))

    def never(x, t):
        raise AssertionError("no jump is left")

    goal = method._goal(z, further, torch.arange(2), never)
    torch.testing.assert_close(goal, method._teacher.target(z, further, torch.arange(2)))


def test_consistency_tuning_has_no_loss_where_every_image_is_one(teacher):
    """With a single image as all data, D = that image is consistent at any pair of times; any other prediction is not."""
    b = batch(8)
    b = b._replace(x0=b.x0[:1].expand_as(b.x0))
    known = fd.Denoiser(lambda x, t: b.x0, SCHEDULE, "x0")
    off = fd.Denoiser(lambda x, t: b.x0 + 0.1 * t.view(-1, 1, 1, 1), SCHEDULE, "x0")
    for number in (0, 3):
        method = ECT()
        method.begin(number, SCHEDULE)
        assert float(method.loss(known, known, known, b)) == 0.0
        assert float(method.loss(off, off, off, b)) > 0.01


def test_sampling_plans_belong_to_the_methods():
    assert [m.plan(m.stages()[-1], SCHEDULE).name for m in NEW] == ["ddim", "ddim", "lcm"]
    one = Consistency(steps=4, segments=1)
    table = one.plan(one.stages()[0], SCHEDULE)
    assert table.name == "lcm" and table.nfe == 4 and table.stochastic
    ect = ECT().plan(ECT().stages()[0], SCHEDULE)
    assert np.isclose(ect.rows[1].sigma / ect.rows[1].alpha, 0.821)
    assert ECT(steps=1).plan(ECT(steps=1).stages()[0], SCHEDULE).nfe == 1


@pytest.mark.parametrize("method", [
    Consistency(steps=2, inner=4, updates=60, lr=1e-3, batch=16, ema=0.9), ECT(phases=2, updates=30, lr=1e-3, batch=32, ema=0.9),
], ids=lambda m: m.name)  # fmt: skip
def test_students_learn(method, teacher, images, tmp_path):
    """Consistency: nearer to the teacher's endpoints than the teacher at as few steps; ECT: nearer to the data than before."""
    student = Distiller(teacher, method, tmp_path, images).run()
    labels, seeds = torch.arange(24) % 3, range(500, 524)
    mine, theirs = (d.bind(class_labels=labels) for d in (student, teacher))
    if method.name == "ect":
        data = images.x[:24].float() / 127.5 - 1
        want = torch.stack([data[labels[:24] == k].mean(0) for k in range(3)])[labels]
    else:
        want = fd.sample(theirs, fd.plan("ddim", theirs, 64, grid="uniform_t"), seeds=seeds)
    error = [float((fd.sample(d, student.plan, seeds=seeds) - want).square().mean()) for d in (mine, theirs)]
    assert error[0] < 0.8 * error[1], error


def test_averages_are_saved_and_resumed(teacher, images, tmp_path):
    method = Consistency(inner=2, updates=4, batch=4, lr=1e-2, self_ema=0.5, ema=0.9)
    whole = Distiller(teacher, dataclasses.replace(method), tmp_path / "whole", images)
    student = whole.run()
    saved, raw = dict(student.network.named_parameters()), dict(whole.network.named_parameters())
    assert any(not torch.equal(saved[k], raw[k]) for k in saved)  # the average, not the last weights

    def interrupt(progress):
        if progress.update == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Distiller(teacher, dataclasses.replace(method), tmp_path / "parts", images).run(interrupt)
    resumed = Distiller(teacher, dataclasses.replace(method), tmp_path / "parts", images).run()
    assert all(torch.equal(saved[k], v) for k, v in resumed.network.named_parameters())


@pytest.mark.parametrize("settings", [Settings(bf16=True), Settings(checkpointing=True)], ids=["bf16", "checkpointing"])
def test_masters_stay_float32_and_recomputed_activations_are_the_same(settings, teacher, images, tmp_path):
    method = Progressive(4, 2, updates=3, batch=4)
    plain = Distiller(teacher, dataclasses.replace(method), tmp_path / "plain", images).run()
    other = Distiller(teacher, dataclasses.replace(method), tmp_path / "other", images, settings).run()
    pairs = list(zip(plain.network.parameters(), other.network.parameters(), strict=True))
    assert all(b.dtype == torch.float32 for _, b in pairs)
    moments = torch.load(tmp_path / "other" / "state.pt", weights_only=True)["optimiser"]["state"].values()
    assert all(v.dtype == torch.float32 for moment in moments for v in moment.values())
    same = all(torch.equal(a, b) for a, b in pairs)
    assert same == settings.checkpointing


def test_what_does_not_fit_is_refused(teacher, images, tmp_path):
    plain = fd.load(tiny.checkpoint(tmp_path / "u.safetensors", tiny.network(num_classes=None, null_class=False)))
    ranged = fd.load(tiny.checkpoint(tmp_path / "r.safetensors", data_range=[0, 1]))
    cases = [
        (plain, Guided(4, 2), "null class"), (teacher, Guided(4, 2, scales=(5.0, 1.0)), "range such as 1,5"),
        (ranged, Consistency(), "0 to 1"), (teacher, Consistency(steps=4, segments=3), "n segments, or 1"),
        (teacher, ECT(q=1.0), "q > 1"), (teacher, ECT(steps=12), "fewer steps"), (teacher, Guided(9, 2), "power of two"),
    ]  # fmt: skip
    for den, method, said in cases:
        with pytest.raises(FastdiffError, match=said):
            Distiller(den, method, tmp_path / "no", images)
    with pytest.raises(FastdiffError, match="3 equal parts"):
        Distiller(teacher, Trajectory(2, batch=4), tmp_path / "no", None, Settings(accumulate=3))
    assert not (tmp_path / "no").exists()


def test_a_trajectory_student_of_guidance_follows_the_guided_teacher(teacher, tmp_path):
    """It starts as the teacher without guidance; its targets are the guided teacher's points at each one's own scale."""
    method = Trajectory(counts=(1, 2), scales=(1.0, 5.0), calls=2, **SHORT)
    assert method.adds() == "the number of its calls as an input and the guidance scale as an input"
    run = Distiller(teacher, method, tmp_path)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    want = teacher.bind(class_labels=labels)(x, t)
    assert torch.equal(run.student.bind(class_labels=labels, guidance=torch.tensor([1.0, 3.0, 5.0]), steps=1)(x, t), want)
    b = batch(3, torch.tensor([1.0, 2.0, 4.0]))
    true = teacher.bind(class_labels=b.labels)
    got = points(method._teacher[2], contrast(true, b), b.noise)
    for i, scale in enumerate(b.scales.tolist()):
        one = fd.guide.cfg(teacher.bind(class_labels=b.labels[i : i + 1]), scale)
        for mine, all_of in zip(points(method._teacher[2], one, b.noise[i : i + 1]), got, strict=True):
            torch.testing.assert_close(mine, all_of[i : i + 1], rtol=1e-4, atol=1e-4)
    perfect = fd.Denoiser(contrast(true, b), SCHEDULE, "x0")
    other = fd.Denoiser(contrast(true, b._replace(scales=b.scales + 1)), SCHEDULE, "x0")
    losses = [float(followed(method._teacher[2], d, b.noise, got)) for d in (perfect, other)]
    assert losses[0] < 1e-5 < 1e-3 < losses[1]
    run.run()
    student = fd.load(tmp_path)
    assert student.network.guidance_range == (1.0, 5.0) and student.step_counts == (1, 2)
    guided = fd.guide.cfg(student.bind(class_labels=labels), 3.0)
    assert guided.calls == 1 and fd.sample(guided, student.tuned[0], seeds=range(3)).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method", [
    Progressive(8, 2, solver="dpmpp-2m", calls=3, **SHORT), Guided(start=4, steps=2, calls=2, **SHORT),
    Trajectory(counts=(1, 2, 3), calls=2, **SHORT), Trajectory(2, calls=2, scales=(1.0, 3.0), **SHORT),
    Consistency(inner=4, calls=2, solver="unipc-2", **SHORT), ECT(phases=1, **SHORT),
    Progressive(counts=(1, 2, 4), updates=2, batch=8), Guided(counts=(1, 2), calls=2, updates=2, batch=8),
    Match(Progressive(4, 2, **SHORT), predicts="x0", updates=1), Match(ECT(phases=1, **SHORT), predicts="x0", updates=1),
    Match(Consistency(segments=1, inner=4, **SHORT), {"model_channels": 64}, updates=1),
], ids=lambda m: m.name)  # fmt: skip
def test_a_method_says_what_an_image_costs(method, teacher, images, tmp_path):
    """Forward passes counted by what runs, a pass with gradients as three."""
    run, seen = Distiller(teacher, method, tmp_path, images), []

    def hook(module, args, output):
        if isinstance(module, UNet):
            seen.append(len(args[0]) * (3 if torch.is_grad_enabled() else 1))

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        for number, stage in enumerate(run.stages):
            seen.clear()
            run.step(stage)
            # the last point of a segment has no jump left, so a batch of nothing else asks one network less
            assert sum(seen) / stage.batch == method.units(number), number
            run.update = stage.updates
            run._finish(stage)
    finally:
        handle.remove()


def test_a_student_of_clean_predictions_has_a_plan_for_fewer_calls(teacher, images, tmp_path):
    for number, method in enumerate((ECT(steps=3, phases=1, **SHORT), Consistency(steps=4, segments=1, inner=4, **SHORT))):
        student = Distiller(teacher, method, tmp_path / str(number), images).run()
        assert [p.nfe for p in student.tuned] == ([1, 2, 3], [1, 2, 4])[number] and student.plan == student.tuned[-1]
        assert fd.plan("auto", student.bind(class_labels=torch.arange(2)), 1).rows == student.tuned[0].rows
    assert Consistency(steps=4, inner=4).plans(Stage(4, 1, 1e-3, 1), teacher.schedule) == ()
