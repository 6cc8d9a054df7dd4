"""The command line: pictures of the right samples; a mistake is one line, exit code 2, and nothing left behind."""

import json
import signal
import subprocess
import sys
from functools import partial
from importlib import metadata

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import fastdiff as fd
from fastdiff import variants
from fastdiff.cli import pictures
from fastdiff.errors import FastdiffError
from fastdiff.training.trainer import Trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.safetensors")


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def expected(checkpoint, seeds, labels, guidance=1.0, **options):
    """The pixels that the Python interface gives for the same wishes."""
    den = fd.load(checkpoint).bind(class_labels=torch.tensor(labels))
    den = fd.guide.cfg(den, guidance) if guidance != 1 else den
    plan = fd.plan(options.pop("solver", "unipc-2"), den, **{"nfe": 10, **options})
    return (den.images(fd.sample(den, plan, seeds=seeds)) * 255).round().to(torch.uint8).numpy()[:, 0]


def test_alone_it_shows_its_commands(fastdiff):
    code, out, err = fastdiff()
    assert code == 0 and not err
    for command in ("sample", "train", "solvers", "info"):
        assert f"  {command} " in out


def test_sample_writes_the_pictures_of_the_api(fastdiff, checkpoint):
    code, out, err = fastdiff("sample", checkpoint, "--seeds", "0-3,9", "--out", "o")
    assert (code, err, len(out.splitlines())) == (0, "", 1), (out, err)
    assert all(word in out for word in ("ipndm-3, hand-made", "10 evaluations", "10 network calls", "5 samples", "o/grid.png"))
    labels = [0, 1, 2, 0, 0]  # without --classes: the seed modulo the number of classes
    slugs = ["0-round", "1-square", "2-t-bar", "0-round", "0-round"]
    names = [f"seed{seed:06d}_class{slug}.png" for seed, slug in zip((0, 1, 2, 3, 9), slugs, strict=True)]
    assert sorted(p.name for p in (fastdiff.folder / "o").iterdir()) == sorted([*names, "grid.png"])
    want = expected(checkpoint, [0, 1, 2, 3, 9], labels, solver="auto")
    for name, image in zip(names, want, strict=True):
        np.testing.assert_array_equal(read(fastdiff.folder / "o" / name), image)
    sheet = read(fastdiff.folder / "o" / "grid.png")
    assert sheet.shape == (2 * 10 - 2, 3 * 10 - 2)
    np.testing.assert_array_equal(sheet[:8, 10:18], want[1])
    np.testing.assert_array_equal(sheet[10:18, 10:18], want[4])
    assert (sheet[:, 8:10] == 255).all() and (sheet[10:, 20:] == 255).all()


def test_classes_guidance_scale_and_other_options(fastdiff, checkpoint):
    code, out, _ = fastdiff(
        "sample", checkpoint, "--seeds", "4,7", "--classes", "T-BAR,0", "--guidance", "2", "--scale", "3", "--nfe", "6",
        "--solver", "dpmpp-2m", "--grid", "uniform_lambda", "--end", "sigma_min", "--out", "o",
    )  # fmt: skip
    assert code == 0 and "12 network calls" in out and "guidance 2" in out
    options = {"solver": "dpmpp-2m", "nfe": 6, "grid": "uniform_lambda", "end": "sigma_min"}
    want = expected(checkpoint, [4, 7, 4, 7], [2, 2, 0, 0], guidance=2.0, **options)
    got = read(fastdiff.folder / "o" / "seed000007_class2-t-bar.png")
    np.testing.assert_array_equal(got, want[1].repeat(3, 0).repeat(3, 1))
    assert read(fastdiff.folder / "o" / "grid.png").shape == (2 * 26 - 2, 2 * 26 - 2)  # a row a class, a column a seed


def test_a_seed_gives_the_same_bytes_at_every_batch_size(fastdiff, checkpoint):
    for batch, solver in ((64, "euler-ancestral"), (2, "euler-ancestral"), (1, "euler-ancestral")):
        code, _, err = fastdiff(
            "sample", checkpoint, "--seeds", "0-4", "--batch", batch, "--solver", solver, "--out", f"b{batch}"
        )
        assert code == 0, err
    files = sorted(p.name for p in (fastdiff.folder / "b64").iterdir())
    assert len(files) == 6
    for name in files:
        data = (fastdiff.folder / "b64" / name).read_bytes()
        assert data == (fastdiff.folder / "b2" / name).read_bytes() == (fastdiff.folder / "b1" / name).read_bytes()


def test_a_saved_plan_and_adaptive_steps(fastdiff, checkpoint):
    plan = fd.plan("heun", fd.load(checkpoint), nfe=7)
    plan.save("p.json")
    code, out, _ = fastdiff("sample", checkpoint, "--plan", "p.json", "--seeds", "5", "--out", "p")
    assert code == 0 and "heun, 7 evaluations" in out
    want = expected(checkpoint, [5], [2], solver="heun", nfe=7)
    np.testing.assert_array_equal(read(fastdiff.folder / "p" / "seed000005_class2-t-bar.png"), want[0])
    code, out, err = fastdiff("sample", checkpoint, "--adaptive", "--rtol", "0.1", "--atol", "0.1", "--seeds", "0-1")
    assert code == 0 and not err and "adaptive unipc-3, rtol 0.1, atol 0.1" in out
    assert (fastdiff.folder / "out/samples/grid.png").exists()


def test_variants_of_the_network(fastdiff, checkpoint, monkeypatch):
    """auto says what it measured; images of another variant are not mixed into a folder of one."""
    monkeypatch.setattr(variants, "fastest", partial(variants.fastest, seconds=0.0))
    code, out, err = fastdiff("sample", checkpoint, "--seeds", "0-1", "--nfe", "4", "--variant", "auto", "--out", "o")
    assert code == 0 and not err and "batch 2: " in out and "plain: " in out and "channels-last: " in out
    many = ["sample", checkpoint, "-n", "3", "--nfe", "4", "--out", "many"]
    assert fastdiff(*many, "--variant", "channels-last")[0] == 0
    assert json.loads((fastdiff.folder / "many" / "images.json").read_text())["variant"] == "channels-last"
    one_line(*fastdiff(*many), "variant (channels-last -> None)")



def test_an_unconditional_checkpoint(fastdiff, tmp_path):
    path = tiny.checkpoint(tmp_path / "u.safetensors", tiny.network(num_classes=None, null_class=False))
    code, _, _ = fastdiff("sample", path, "--seeds", "3", "--out", "o")
    assert code == 0 and (fastdiff.folder / "o/seed000003.png").exists()
    one_line(*fastdiff("sample", path, "--classes", "0", "--out", "x"), "no classes")
    one_line(*fastdiff("sample", path, "--guidance", "2", "--out", "x"), "null class")
    assert not (fastdiff.folder / "x").exists()


def one_line(code, out, err, *words):
    """A refused command: exit code 2, nothing on stdout, one line on stderr that holds these words."""
    assert code == 2 and out == "" and len(err.splitlines()) == 1, (code, out, err)
    assert err.startswith("fastdiff: ") and "Traceback" not in err
    for word in words:
        assert word in err, err


MISTAKES = [
    (["--solver", "unipcc"], "did you mean unipc"),
    (["--nfe", "0"], "--nfe"),
    (["--nfe", "ten"], "--nfe"),
    (["--grid", "karas"], "karras"),
    (["--end", "clean"], "sigma_min"),
    (["--classes", "3"], "0 to 2"),
    (["--classes", "-1"], "0 to 2"),
    (["--classes", "sqare"], "did you mean square"),
    (["--classes", "1,square"], "twice"),
    (["--classes", ""], "no class"),
    (["--seeds", "5-1"], "rise"),
    (["--seeds", "one"], "whole numbers"),
    (["--seeds", "-3"], "whole numbers"),
    (["--seeds", "1,2,1"], "twice"),
    (["--seeds", "0-9999999999"], "100000"),
    (["--seeds", "18446744073709551616"], "2^64"),
    (["--guidance", "nan"], "guidance"),
    (["--guidance", "-1"], "--guidance"),
    (["--batch", "0"], "--batch"),
    (["--scale", "0"], "--scale"),
    (["--rtol", "0.1"], "--adaptive"),
    (["--adaptive", "--rtol", "-1"], "rtol"),
    (["--adaptive", "--nfe", "5"], "--nfe"),
    (["--variant", "int8"], "plain, channels-last, bf16"),
    (["--compile"], "--variant auto"),
    (["--plan", "none.json"], "none.json"),
    (["--plan", "none.json", "--solver", "ddim"], "leave out --solver"),
    (["--device", "gpu"], "--device gpu"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--device", "meta"], "meta"),
    (["--sover", "ddim"], "--sover"),
    (["extra"], "extra"),
]


@pytest.mark.parametrize(("options", "word"), MISTAKES, ids=[" ".join(o) for o, _ in MISTAKES])
def test_mistakes(fastdiff, checkpoint, options, word):
    one_line(*fastdiff("sample", checkpoint, "--out", "o", *options), word)
    assert list(fastdiff.folder.iterdir()) == []


def test_checkpoints_that_cannot_be_loaded(fastdiff, checkpoint, tmp_path):
    (tmp_path / "half.safetensors").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "model.ckpt").write_bytes(b"")
    for command in ("sample", "info"):
        one_line(*fastdiff(command, tmp_path / "half.safetensors"), "half.safetensors", "truncated")
        one_line(*fastdiff(command, tmp_path / "model.ckpt"), "model.ckpt", "no torch file")
        one_line(*fastdiff(command, "fashion-mnits"), "no checkpoint", "fashion-mnist")
    assert list(fastdiff.folder.iterdir()) == []


def test_a_path_with_brackets_and_any_length_stays_one_line_as_it_is(fastdiff):
    path = "[bold]/" + "x" * 300 + ".safetensors"
    one_line(*fastdiff("info", path), path)


def test_plans_that_do_not_fit(fastdiff, checkpoint):
    fd.plan("ddim", fd.schedule.edm(), nfe=4).save("edm.json")
    fd.plan("ddim", fd.schedule.vp_linear(), nfe=4).save("linear.json")
    (fastdiff.folder / "broken.json").write_text('{"format": 1')
    for name, word in (
        ("edm", "another noise schedule"),
        ("linear", "another noise schedule"),
        ("broken", "not a plan"),
    ):
        one_line(*fastdiff("sample", checkpoint, "--plan", f"{name}.json", "--out", "o"), word)
    assert not (fastdiff.folder / "o").exists()


def test_output_that_cannot_be_written_is_said_before_sampling(fastdiff, checkpoint, monkeypatch):
    monkeypatch.setattr(fd.Denoiser, "__call__", lambda *_: pytest.fail("sampled before looking at --out"))
    (fastdiff.folder / "file").write_text("mine")
    one_line(*fastdiff("sample", checkpoint, "--out", "file"), "not a folder")
    one_line(*fastdiff("sample", checkpoint, "--out", "file/below"), "not a folder")
    assert (fastdiff.folder / "file").read_text() == "mine"
    monkeypatch.setattr("os.access", lambda *_: False)
    one_line(*fastdiff("sample", checkpoint, "--out", "o"), "cannot be written")


def test_a_disk_that_fills_up_leaves_nothing(fastdiff, checkpoint, monkeypatch):
    kept = fastdiff.folder / "old" / "seed000000_class0-round.png"
    kept.parent.mkdir()
    kept.write_bytes(b"mine")
    real, count = pictures.write_bytes, [0]

    def full(path, data):
        count[0] += 1
        if count[0] == 3:
            raise FastdiffError(f"cannot write {path}: No space left on device; free some space")
        real(path, data)

    monkeypatch.setattr(pictures, "write_bytes", full)
    one_line(*fastdiff("sample", checkpoint, "--seeds", "0-5", "--out", "new"), "No space")
    assert not (fastdiff.folder / "new").exists()
    count[0] = 0
    one_line(*fastdiff("sample", checkpoint, "--seeds", "0-5", "--out", "old"), "No space")
    assert [p.name for p in kept.parent.iterdir()] == [kept.name]


def test_a_network_that_returns_nan(fastdiff, tmp_path):
    net = tiny.network()
    net.out[2].bias.fill_(float("nan"))
    path = tiny.checkpoint(tmp_path / "nan.safetensors", net)
    one_line(*fastdiff("sample", path, "--out", "o"), "NaN", "row 0 of 10")
    assert not (fastdiff.folder / "o").exists()


def test_without_pillow(fastdiff, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    one_line(*fastdiff("sample", checkpoint, "--out", "o"), "pip install 'fastdiff[plots]'")
    assert not (fastdiff.folder / "o").exists()


def test_ctrl_c(fastdiff, checkpoint, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fd.Denoiser, "__call__", interrupt)
    code, out, err = fastdiff("sample", checkpoint, "--out", "o")
    assert (code, out, err) == (130, "", "interrupted; what is done is kept\n")
    assert not (fastdiff.folder / "o").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_ends_after_its_step_and_goes_on(fastdiff, monkeypatch, number):
    """The signal comes in the middle of the third step, which is finished, saved and not repeated."""
    tiny.npz(fastdiff.folder / "a.npz")
    command = ["train", "--data", "a.npz", "--out", "run", "--steps", "5", "--batch", "4", "--network", '{"channel_mult": [1], '
               '"model_channels": 32, "num_res_blocks": 1, "attention": [], "head_channels": 32}']  # fmt: skip
    real, before = Trainer.loss, signal.getsignal(number)

    def interrupted(self, generator):
        if self.step == 2:
            signal.raise_signal(number)
        return real(self, generator)

    monkeypatch.setattr(Trainer, "loss", interrupted)
    code, _, err = fastdiff(*command)
    assert (code, err) == (130, "interrupted; what is done is kept\n")
    assert signal.getsignal(number) is before, "the handlers are given back"
    monkeypatch.setattr(Trainer, "loss", real)
    code, out, _ = fastdiff(*command)
    assert code == 0 and out.count("resuming run at step 3 of 5") == 1
    assert fd.load("run").info["training"]["step"] == 5


def test_solvers_lists_them_all(fastdiff):
    code, out, _ = fastdiff("solvers", "--json")
    listed = json.loads(out)
    assert code == 0 and list(listed) == list(fd.list_solvers())
    for name, info in fd.list_solvers().items():
        assert listed[name]["order"] == info.order and listed[name]["options"] == info.options
        assert listed[name]["aliases"] == list(info.aliases) and listed[name]["stochastic"] is info.stochastic
    code, out, _ = fastdiff("solvers")
    assert code == 0 and all(f"{name} " in out for name in fd.list_solvers())
    code, out, _ = fastdiff("solvers", "euler_a")
    assert code == 0 and out.startswith("euler-ancestral") and "eta 1.0" in out
    one_line(*fastdiff("solvers", "eulr"), "did you mean")


def test_info(fastdiff, checkpoint):
    code, out, _ = fastdiff("info", checkpoint, "--json")
    found = json.loads(out)
    assert code == 0 and found["fastdiff"]["torch"] == torch.__version__
    here = found["fastdiff"]
    assert here["installed"]["safetensors"] == metadata.version("safetensors")
    assert here["installed"]["PIL"] == metadata.version("pillow") and not set(here["installed"]) & set(here["not installed"])
    reason = "sees no NVIDIA GPU" if not torch.cuda.is_available() else ""
    assert here["cpu"].startswith(torch.backends.cpu.get_cpu_capability()) and "bfloat16" in here["cpu"]
    assert set(here["kernels"]) == {"group_norm_silu", "attention", "combine"}
    assert all(reason in runs for runs in here["kernels"].values())
    about = found["checkpoint"]
    assert about["sha256"] == fd.load(checkpoint).hash and about["classes"] == ["round", "square", "T-bar"]
    assert about["parameters"] == sum(p.numel() for p in tiny.network().parameters())
    assert (about["prediction"], about["schedule"]["name"], about["shape"]) == ("v", "vp_cosine", [1, 8, 8])
    code, out, _ = fastdiff("info", checkpoint)
    assert not reason or " ".join(out.split()).count(reason) == 1  # once for all three ops
    assert code == 0 and about["sha256"] in out and "vp_cosine" in out


TRAIN_MISTAKES = [
    (["--data", "none.npz"], "none.npz"),
    (["--data", "cut.npz"], "cut.npz"),
    (["--schedule", "cosine"], "vp_cosine"),
    (["--schedule", "{name"], "JSON"),
    (["--network", "[1]"], "mapping"),
    (["--network", '{"width": 3}'], "width"),
    (["--prediction", "epsilon"], "eps"),
    (["--weighting", "snr"], "min_snr"),
    (["--lr", "nan"], "lr"),
    (["--steps", "0"], "--steps"),
    (["--out", "a.npz"], "not a folder"),
]


@pytest.mark.parametrize(("options", "word"), TRAIN_MISTAKES, ids=[" ".join(o) for o, _ in TRAIN_MISTAKES])
def test_train_mistakes(fastdiff, options, word):
    data = tiny.npz(fastdiff.folder / "a.npz").read_bytes()
    (fastdiff.folder / "cut.npz").write_bytes(data[:-100])
    one_line(*fastdiff("train", "--data", "a.npz", "--out", "run", *options), word)
    assert sorted(p.name for p in fastdiff.folder.iterdir()) == ["a.npz", "cut.npz"]


def test_the_installed_command(tmp_path):
    """One real process, through the entry point: an unknown option, the exit code, one line."""
    command = [sys.executable, "-c", "from fastdiff.cli import main; main()", "sample", "--sover", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    one_line(done.returncode, done.stdout, done.stderr, "--sover")


def test_the_shipped_model_by_class_name(fastdiff):
    """Needs the shipped model."""
    code, out, err = fastdiff("sample", "--seeds", "1", "--classes", "ankle boot", "--nfe", "5", "--out", "o")
    assert code == 0, err
    assert (fastdiff.folder / "o/seed000001_class9-ankle-boot.png").exists() and "5 evaluations" in out
