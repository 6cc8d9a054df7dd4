"""Pages of mapped files, given back while a load still runs.

Weights that are brought to another dtype are copies, and every page of the file that was read for them would stay in the process
until the last tensor is done: half as much again for float16 files in float32. Linux only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)
Ranges = list[tuple[int, int]]


def ranges() -> Ranges:
    """The addresses (first, end) in this process that show files."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for span, _, _, _, inode, *_ in (line.split(maxsplit=5) for line in lines):
        if inode != "0":
            first, end = span.split("-")
            found.append((int(first, 16), int(end, 16)))
    return found


def release(tensor: Tensor, files: Ranges) -> None:
    """Takes the whole pages of a tensor out of memory where they show a file: read again, they come from the file again.

    Args:
        files: what `ranges` found; memory of any other kind is left alone, since there this would erase it.
    """
    page = mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if tensor.is_contiguous() and end > first and any(low <= first and end <= high for low, high in files):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), DONTNEED)
