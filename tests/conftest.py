"""One thread and reproducible examples for the whole run. This folder is on sys.path, so tests import `analytic`."""

import importlib
import importlib.util
import os
import sys

if importlib.util.find_spec("triton") is not None:
    # Triton's own library is interpreted only if that was chosen when it was first imported, which torch and diffusers do too
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    if before is None:
        del os.environ["TRITON_INTERPRET"]

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
