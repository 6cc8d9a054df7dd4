"""What compiled kernels may need: asked of a process of its own, since the tests' own triton interprets."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def compiled(op, everything):
    """The resources of an op's kernels for sm_80, sm_90 and sm_100, held to what a program may have."""
    found = asked("cubins.py", op, *(["--all"] if everything else []))
    assert {f["sm"] for f in found} == {80, 90, 100}
    return found


def launched(everything):
    """The same of what launchers launch, for the arguments that they give; for sm_90 alone unless everything is asked for."""
    return asked("launches.py", *(["--all"] if everything else []))


def asked(*command):
    """Registers within what the block's threads share, and no local memory."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = subprocess.run([sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    found = [json.loads(line) for line in out.stdout.splitlines()]
    for f in found:
        assert f["spill"] == 0 and f["registers"] * f["threads"] <= 65536, f
    return found
