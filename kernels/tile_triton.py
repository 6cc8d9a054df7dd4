"""What the kernels that read tiles of rows and columns share; imported only where triton is."""

from __future__ import annotations

import triton
import triton.language as tl

# A product and the sum after it are rounded once: the default of Triton up to 3.9, which warns that it will change.
FUSED = {"enable_fp_fusion": True}


def registers(warps: int) -> int:
    """`maxnreg` of a launch: all that a thread may have. Unless told, the assembler would rather spill 8 bytes than leave an SM
    with a program less."""
    return min(255, 65_536 // (32 * warps))


def parts(size: int, least: int = 1) -> tuple[int, int]:
    """A size as one or two powers of two, `least` at least, that hold it with the fewest empty places: 40 = 32 + 8."""
    whole = max(least, triton.next_power_of_2(size))
    half = whole // 2
    rest = max(least, triton.next_power_of_2(max(size - half, 1)))
    return (half, rest) if least <= half < size and half + rest < whole else (whole, 0)


@triton.jit
def at(rows, columns, row_step, column_step):
    """Offsets of a tile; 32 bits where the steps are, which halves the registers they take."""
    return rows[:, None] * row_step + columns[None, :] * column_step


@triton.jit
def existing(rows, columns, rows_end, columns_end, ALL_ROWS: tl.constexpr, ALL_COLUMNS: tl.constexpr):
    """Which elements of a tile exist. Where all rows or all columns are known to, nothing is asked of each element."""
    if ALL_ROWS and ALL_COLUMNS:
        return tl.full((rows.shape[0], columns.shape[0]), True, tl.int1)
    elif ALL_ROWS:
        return (columns < columns_end)[None, :]
    elif ALL_COLUMNS:
        return (rows < rows_end)[:, None]
    else:
        return (rows < rows_end)[:, None] & (columns < columns_end)[None, :]
