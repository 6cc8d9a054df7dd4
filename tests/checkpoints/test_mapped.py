"""What is given back of a mapped file while it loads: pages of the file alone, and none of their content is lost."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastdiff.checkpoints import build, mapped

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
SIZE = 1 << 21  # of float16 numbers: 4 MB


def pages_of_files():
    """Bytes of mapped files that are in memory now."""
    with open("/proc/self/status") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith("RssFile"))


@pytest.fixture
def stored(tmp_path):
    """A tensor on disk, mapped by safetensors, and what it holds."""
    content = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).half()
    save_file({"w": content}, tmp_path / "w.safetensors")
    with safe_open(str(tmp_path / "w.safetensors"), framework="pt") as f:
        return f.get_tensor("w"), content


def test_pages_leave_and_come_back(stored):
    found, content = stored
    assert torch.equal(found, content)
    before = pages_of_files()
    mapped.release(found, mapped.ranges())
    assert before - pages_of_files() > 1.5 * SIZE
    assert torch.equal(found, content)


def test_memory_that_is_no_file_is_left_alone():
    own = torch.ones(SIZE)
    mapped.release(own, mapped.ranges())
    assert own.min() == 1


def test_a_load_in_another_dtype_keeps_no_page_of_the_file(stored):
    found, content = stored
    before = pages_of_files()
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.empty(SIZE, device="meta")))
    build.fit(module, {"w": found}, "here", torch.float32)
    assert torch.equal(module.w, content.float()) and pages_of_files() - before < 0.5 * SIZE
