"""Many images to a folder: each exactly once, the same bytes however the run was cut, and nothing of another run mixed in."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from analytic import BIMODAL
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_cli import one_line

import fastdiff as fd
from fastdiff import files, streaming
from fastdiff.cli.pictures import png
from fastdiff.errors import FastdiffError
from fastdiff.parallel import World
from fastdiff.streaming import MANIFEST, Batches, Npz, Pictures, Request, Stream, Work
from fastdiff.training.data import load_images

SHAPE = (1, 3, 2)
LAYOUTS = {"npz": Npz(), "png": Pictures(png)}


def requests(seeds):
    return [Request(s, s % 3, f"seed{s:06d}.png") for s in seeds]


def work(count=10, shard=4, layout="npz", **about):
    return Work(count, shard, LAYOUTS[layout], requests, {"checkpoint": "abc", **about})


def elementwise(schedule=None):
    """Images of a denoiser that computes every element by itself, by a solver that draws noise in every step."""
    schedule = schedule or fd.schedule.vp_cosine()
    den = fd.Denoiser(BIMODAL.network(schedule), schedule, "x0", shape=SHAPE)
    plan = fd.plan("euler-ancestral", den, nfe=4)

    def make(part):
        return (den.images(fd.sample(den, plan, seeds=[r.seed for r in part])) * 255).round().to(torch.uint8)

    return make


def fill(folder, work, make, size=3, say=lambda line: None):
    return sum(Stream(folder, work).run(Batches(make, size, say)))


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def held(folder):
    """{seed: pixels} of a folder of npz shards; every seed once."""
    out = {}
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as f:
            for seed, label, x in zip(f["seed"].tolist(), f["y"].tolist(), f["x"], strict=True):
                assert seed not in out and label == seed % 3
                out[seed] = x
    return out


def test_the_folder_holds_the_images_of_the_api(tmp_path):
    make = elementwise()
    assert fill(tmp_path / "o", work(), make) == 10
    assert sorted(contents(tmp_path / "o")) == [MANIFEST, *(f"shard-0000{i}.npz" for i in range(3))]
    want = make(requests(range(10)))
    assert want.float().std() > 20, "images differ, so the comparison means something"
    for seed, x in held(tmp_path / "o").items():
        np.testing.assert_array_equal(x, want[seed].permute(1, 2, 0))
    manifest = json.loads((tmp_path / "o" / MANIFEST).read_text())
    assert manifest == {"fastdiff images": 1, "format": "npz", "seeds": "0-9", "shard": 4, "checkpoint": "abc"}
    as_data = load_images(tmp_path / "o" / "shard-00001.npz")  # a shard is training data
    assert torch.equal(as_data.x, want[4:8]) and as_data.y.tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_do_not_depend_on_batch_or_on_how_often_it_was_killed(tmp_path, layout):
    make, job, calls = elementwise(), work(11, 4, layout), [0]
    fill(tmp_path / "whole", job, make, size=64)

    def dies(part):
        calls[0] += 1
        if calls[0] % 3 == 0:
            raise KeyboardInterrupt
        return make(part)

    for _ in range(20):
        try:
            fill(tmp_path / "killed", job, dies, size=2)
            break
        except KeyboardInterrupt:
            pass
    assert calls[0] > 6 and contents(tmp_path / "killed") == contents(tmp_path / "whole")


@settings(max_examples=25)
@given(count=st.integers(1, 20), shard=st.integers(1, 7), size=st.integers(1, 9), deaths=st.lists(st.integers(1, 6), max_size=4),
       layout=st.sampled_from(sorted(LAYOUTS)))  # fmt: skip
def test_every_image_is_made_once_and_none_is_lost(tmp_path_factory, count, shard, size, deaths, layout):
    """Whatever the shard, the batch and the moments of death: only the unfinished shard is made again."""
    folder, kept, made = tmp_path_factory.mktemp("s"), set(), []

    def run(budget):
        def make(part):
            if budget is not None and len(made) >= budget:
                raise KeyboardInterrupt
            made.extend(r.seed for r in part)
            return torch.stack([torch.full(SHAPE, r.seed, dtype=torch.uint8) for r in part])

        made.clear()
        fill(folder, work(count, shard, layout), make, size)

    for death in deaths:
        with contextlib.suppress(KeyboardInterrupt):
            run(death)
        assert not kept & set(made), "what was there was made again"
        total = len(kept) + len(made)
        kept = set(range(total if total == count else total // shard * shard))
    run(None)
    assert sorted(made) == sorted(set(range(count)) - kept)
    assert len([p for p in folder.iterdir() if p.name != MANIFEST]) == (count if layout == "png" else -(-count // shard))


def test_ranks_share_the_shards():
    """Every missing shard belongs to one process, whatever their number: with real processes below."""
    todo = [0, 1, 4, 5, 6, 9]
    for size in (1, 2, 4, 7):
        shares = [World(rank, size).mine(todo) for rank in range(size)]
        assert sorted(itertools.chain(*shares)) == todo and max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_a_batch_that_does_not_fit_is_halved_and_said_once(tmp_path, error):
    make, sizes, said = elementwise(), [], []

    def small(part):
        sizes.append(len(part))
        if len(part) > 3:
            raise error
        return make(part)

    fill(tmp_path / "small", work(20, 16), small, 16, said.append)
    assert sizes[:4] == [16, 8, 4, 2] and set(sizes[3:]) == {2}
    assert said == [f"out of memory with a batch of {n}: going on with {n // 2}" for n in (16, 8, 4)]
    fill(tmp_path / "large", work(20, 16), make, 16)
    assert contents(tmp_path / "small") == contents(tmp_path / "large")


def test_a_real_allocation_that_fails_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert streaming.out_of_memory(caught.value)
    assert not streaming.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_one_image_that_does_not_fit_is_one_line_and_keeps_what_is_there(tmp_path):
    make = elementwise()

    def grows(part):
        if any(r.seed >= 4 for r in part):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(part)

    with pytest.raises(FastdiffError, match="not even one image fits in memory"):
        fill(tmp_path, work(), grows)
    assert sorted(contents(tmp_path)) == [MANIFEST, "shard-00000.npz"]
    assert fill(tmp_path, work(), make) == 6


def test_other_errors_of_the_network_are_not_taken_for_memory(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        fill(tmp_path, work(), lambda part: torch.zeros(2, 3) @ torch.zeros(2, 3))


# ---- folders


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"checkpoint": "xyz"}, r"checkpoint \(abc -> xyz\)"),
        ({"guidance": 2.0}, r"guidance \(None -> 2.0\)"),
        ({"count": 12}, r"seeds \(0-9 -> 0-11\)"),
        ({"shard": 5}, r"shard \(4 -> 5\)"),
        ({"layout": "png"}, r"format \(npz -> png\)"),
    ],
)
def test_images_of_another_run_are_never_mixed(tmp_path, other, said):
    fill(tmp_path, work(), elementwise())
    before = contents(tmp_path)
    with pytest.raises(FastdiffError, match=said) as caught:
        fill(tmp_path, work(**other), elementwise())
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


def spoil_seeds(folder):
    (folder / "shard-00001.npz").write_bytes((folder / "shard-00000.npz").read_bytes())


def truncate(folder):
    path = folder / "shard-00001.npz"
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_seeds, "shard-00001.npz is a shard of another run"),
        (truncate, "shard-00001.npz is damaged"),
        (lambda folder: (folder / "shard-00007.npz").write_bytes(b""), "shard-00007.npz, which is not of this run"),
        (lambda folder: (folder / "grid.png").write_bytes(b""), "grid.png, which is not of this run"),
        (lambda folder: (folder / MANIFEST).unlink(), f"holds images .shard-00000.npz. and no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), f"{MANIFEST} is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"a": 1}'), "belongs to something else"),
    ],
)
def test_folders_that_are_not_ours(tmp_path, spoil, said):
    fill(tmp_path, work(), elementwise())
    spoil(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FastdiffError, match=said) as caught:
        fill(tmp_path, work(), elementwise())
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


def test_a_run_that_made_nothing_keeps_nobody_out(tmp_path):
    with pytest.raises(FastdiffError, match="no"):
        fill(tmp_path, work(), lambda part: (_ for _ in ()).throw(FastdiffError("no")))
    assert sorted(contents(tmp_path)) == [MANIFEST]
    assert fill(tmp_path, work(guidance=2.0), elementwise()) == 10


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    fill(tmp_path, work(), elementwise())
    before = contents(tmp_path)
    (tmp_path / "shard-00001.npz").rename(tmp_path / ".shard-00001.npz.a8_x1k2z.npz")
    (tmp_path / ".images.json.abcdefgh.json").write_text("{")
    (tmp_path / ".mine").write_text("kept")
    assert fill(tmp_path, work(), elementwise()) == 4
    assert contents(tmp_path) == {**before, ".mine": b"kept"}


def test_temporaries_are_recognised_by_the_name_that_atomic_gives(tmp_path):
    for name in ("seed000001_class2-t-bar.png", "shard-00000.npz", "images.json"):
        with files.atomic(tmp_path / name) as temporary:
            files.remove_temporaries(tmp_path)
            assert not temporary.exists(), temporary.name
            temporary.write_bytes(b"made again")
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch, layout):
    real, count = files.os.fsync, [0]

    def full(handle):
        count[0] += 1
        if count[0] >= 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FastdiffError, match="No space left on device"):
        fill(tmp_path / "o", work(16, 4, layout), elementwise())
    monkeypatch.setattr(files.os, "fsync", real)
    left = contents(tmp_path / "o")
    assert len(left) == 3 and not [name for name in left if name.startswith(".")]  # the manifest and two files
    fill(tmp_path / "o", work(16, 4, layout), elementwise())
    fill(tmp_path / "fresh", work(16, 4, layout), elementwise())
    after = contents(tmp_path / "o")
    assert after == contents(tmp_path / "fresh") and left.items() <= after.items()


# ---- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("stream") / "a.safetensors")


def test_the_command_streams_and_goes_on(fastdiff, checkpoint):
    command = ("sample", checkpoint, "-n", 7, "--shard", 3, "--solver", "ddim", "--nfe", 3, "--out", "o")
    code, out, err = fastdiff(*command)
    assert (code, err) == (0, "") and "ddim, 3 evaluations" in out and "7 images made" in out, (out, err)
    den = fd.load(checkpoint).bind(class_labels=torch.arange(7) % 3)
    want = (den.images(fd.sample(den, fd.plan("ddim", den, nfe=3), seeds=range(7))) * 255).round()
    for seed, x in held(fastdiff.folder / "o").items():
        assert abs(want[seed].permute(1, 2, 0).numpy() - x).max() <= 1, "a U-Net rounds by its batch: a grey level at most"
    before = contents(fastdiff.folder / "o")
    (fastdiff.folder / "o" / "shard-00001.npz").unlink()
    code, out, _ = fastdiff(*command)
    assert code == 0 and "o holds 4 of 7 images already" in out and "3 images made" in out
    assert contents(fastdiff.folder / "o") == before
    one_line(*fastdiff(*command, "--guidance", 2), "other settings: guidance (1.0 -> 2.0)")
    one_line(*fastdiff(*command, "--nfe", 4), "other settings: plan (ddim, 3 evaluations")
    assert contents(fastdiff.folder / "o") == before


def test_png_files_and_classes_in_turn(fastdiff, checkpoint):
    code, _, err = fastdiff("sample", checkpoint, "-n", 3, "--classes", "2,round", "--format", "png", "--solver", "ddim",
                              "--nfe", 2, "--out", "o")  # fmt: skip
    assert code == 0, err
    names = ["seed000000_class2-t-bar.png", "seed000001_class0-round.png", "seed000002_class2-t-bar.png"]
    assert sorted(contents(fastdiff.folder / "o")) == sorted([MANIFEST, *names])
    den = fd.load(checkpoint).bind(class_labels=torch.tensor([2, 0, 2]))
    want = (den.images(fd.sample(den, fd.plan("ddim", den, nfe=2), seeds=range(3))) * 255).round().to(torch.uint8)
    for name, image in zip(names, want, strict=True):
        with Image.open(fastdiff.folder / "o" / name) as f:
            np.testing.assert_array_equal(np.asarray(f), image[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-n", "0"], ["'-n'", "1"]),
        (["-n", "many"], ["'-n'"]),
        (["-n", "5", "--seeds", "0-4"], ["leave out --seeds"]),
        (["-n", "5", "--scale", "2"], ["leave out --scale"]),
        (["-n", "5", "--format", "jpg"], ["npz, png", "jpg"]),
        (["-n", "5", "--shard", "0"], ["--shard"]),
        (["-n", "5", "--out", "file"], ["not a folder"]),
        (["--format", "npz"], ["only acts with -n"]),
        (["--shard", "5"], ["only acts with -n"]),
    ],
    ids=str,
)
def test_mistakes(fastdiff, checkpoint, options, words):
    (fastdiff.folder / "file").write_text("mine")
    one_line(*fastdiff("sample", checkpoint, "--out", "o", *options), *words)
    assert [p.name for p in fastdiff.folder.iterdir()] == ["file"]


# ---- processes


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SAMPLE = ["-m", "fastdiff", "sample", "--solver", "ddim", "--threads", "1"]


def spawn(*command, **options):
    where = {"cwd": Path(fd.__file__).parents[1], "text": True, "timeout": 300}
    return subprocess.run([str(c) for c in command], capture_output=True, check=False, **where, **options)


@pytest.mark.slow
def test_two_processes_make_the_files_that_one_makes(tmp_path, checkpoint):
    wish = [*SAMPLE, checkpoint, "-n", 11, "--shard", 2, "--nfe", 3, "--out"]
    one = spawn(sys.executable, *wish, tmp_path / "one")
    two = spawn(*TORCHRUN, *wish, tmp_path / "two")
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert two.stdout.count("11 images made") == 1, "one process speaks for all"
    for name in ("shard-00001.npz", "shard-00002.npz"):
        (tmp_path / "two" / name).unlink()
    again = spawn(*TORCHRUN, *wish, tmp_path / "two")
    assert again.returncode == 0 and "4 images made" in again.stdout
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    other = spawn(*TORCHRUN, *wish, tmp_path / "two", "--guidance", 2)
    said = [line for line in other.stderr.splitlines() if line.startswith("fastdiff: ")]
    assert other.returncode != 0 and len(said) == 2 and all("other settings: guidance" in line for line in said)


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path, checkpoint):
    wish = [sys.executable, *SAMPLE, checkpoint, "-n", 60, "--shard", 2, "--nfe", 20, "--out"]
    where = Path(fd.__file__).parents[1]
    with subprocess.Popen([str(c) for c in [*wish, tmp_path / "killed"]], stdout=subprocess.DEVNULL, cwd=where) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/shard-*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    before = {k: v for k, v in contents(tmp_path / "killed").items() if not k.startswith(".")}
    assert process.returncode == -signal.SIGKILL and 3 < len(before) < 31
    assert spawn(*wish, tmp_path / "killed").returncode == 0
    assert spawn(*wish, tmp_path / "whole").returncode == 0
    after = contents(tmp_path / "killed")
    assert after == contents(tmp_path / "whole") and before.items() <= after.items() and len(held(tmp_path / "killed")) == 60


@pytest.mark.parametrize(
    "rank, size, gloo, named",
    [(0, 4, "[Rank 0]: Ranks 1, 3 failed to pass monitoredBarrier in 60000 ms", "rank 1, 3 of 4"),
     (0, 2, "Connection closed by peer [127.0.0.1]:1024", "rank 1 of 2"),
     (0, 3, "Connection closed by peer [127.0.0.1]:1024", "one of ranks 1 to 2 of 3"),
     (1, 2, "[Rank 1]: Rank 1 failed to pass monitoredBarrier", "rank 0, or one that it waited for, of 2")],
)  # fmt: skip
def test_whatever_gloo_says_the_dead_are_named(monkeypatch, rank, size, gloo, named):
    def barrier(**options):
        raise RuntimeError(gloo)

    monkeypatch.setattr(torch.distributed, "monitored_barrier", barrier)
    with pytest.raises(FastdiffError, match=f"^{named} processes died"):
        World(rank, size).wait()


DIES = """
import os, signal, sys
from fastdiff.parallel import join
from fastdiff.streaming import Npz
world, write, done = join(), Npz.write, []
def dying(self, *args):
    write(self, *args)
    done.append(1)
    if world.rank == {rank} and len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Npz.write = dying
from fastdiff.cli import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_dead_rank_is_named_and_what_was_written_stays(tmp_path, checkpoint, rank):
    """Without torchrun's agent, which would report the same: the other process finds out, ends with 2, and says who died."""
    wish = [str(c) for c in ["sample", "--solver", "ddim", checkpoint, "-n", 12, "--shard", 2, "--nfe", 2, "--out"]]
    dies = [sys.executable, "-c", DIES.format(rank=rank), *wish, str(tmp_path / "two")]
    port = str(20000 + os.getpid() % 20000)
    group = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    where = {"cwd": Path(fd.__file__).parents[1], "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(dies, env={**group, "RANK": str(r)}, **where) for r in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert both[rank].returncode == -signal.SIGKILL
    ours = [line for line in said[1 - rank].splitlines() if line.startswith("fastdiff: ")]
    assert both[1 - rank].returncode == 2 and len(ours) == 1 and f"rank {rank}" in ours[0] and "died" in ours[0], said
    before = contents(tmp_path / "two")
    assert len(before) == 1 + 2 + 3  # the manifest, two shards of the dead, three of the other
    assert spawn(sys.executable, "-m", "fastdiff", *wish, tmp_path / "two").returncode == 0
    assert spawn(sys.executable, "-m", "fastdiff", *wish, tmp_path / "one").returncode == 0
    after = contents(tmp_path / "two")
    assert after == contents(tmp_path / "one") and before.items() <= after.items()
