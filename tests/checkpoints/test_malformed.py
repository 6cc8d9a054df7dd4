"""Every malformed checkpoint of the corpus: one clear line, exit code 2, bounded memory and time, and no code run."""

import resource
import time
from contextlib import contextmanager
from pathlib import Path

import make_malformed
import pytest

import fastdiff as fd
from fastdiff.errors import FastdiffError

MEMORY = 256 << 20  # bytes beyond what the process has mapped already
SECONDS = 10.0  # of processor time; the slowest takes about one


@contextmanager
def limited():
    """The process's address space can grow by MEMORY, no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_the_corpus_is_large_enough():
    assert len(make_malformed.CORPUS) >= 40


@pytest.mark.parametrize("name", make_malformed.CORPUS)
def test_malformed(name, tmp_path, fastdiff):
    path = make_malformed.CORPUS[name](tmp_path)
    began = time.process_time()
    with limited():
        code, out, err = fastdiff("info", path)
    assert time.process_time() - began < SECONDS
    assert code == 2 and not out and len(err.splitlines()) == 1, (code, out, err)
    assert err.startswith("fastdiff: ") and len(err) < 1500 and "Traceback" not in err
    assert any(word in err for word in (path.name, str(tmp_path))), err  # it says which file
    assert not (tmp_path / "ran").exists() and not list(fastdiff.folder.iterdir())
    with pytest.raises(FastdiffError) as caught:
        fd.load(path)
    assert "\n" not in str(caught.value)


def test_the_bomb_itself_works(tmp_path):
    """Control: what the corpus holds would run."""
    import pickle

    pickle.loads(pickle.dumps(make_malformed.Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_the_memory_limit_itself_works():
    with limited(), pytest.raises(MemoryError):
        bytearray(2 * MEMORY)
