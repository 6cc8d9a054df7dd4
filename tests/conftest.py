"""One thread and reproducible examples for the whole run. This folder is on sys.path, so tests import `analytic`."""

import sys

import interpreted

if interpreted.PRESENT:
    interpreted.load("triton.language")  # Triton's own functions, before torch or diffusers import them compiled

import pytest
import torch
from hypothesis import settings

from fastdiff.cli.main import main

torch.set_num_threads(1)
settings.register_profile("fastdiff", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fastdiff")


@pytest.fixture
def fastdiff(monkeypatch, tmp_path, capfd):
    """Runs a command in an empty folder; its exit code and what it wrote to stdout and stderr."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capfd.readouterr()
        return end.value.code, out, err

    run.folder = folder
    return run
