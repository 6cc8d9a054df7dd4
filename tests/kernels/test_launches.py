"""What the launchers launch compiles for the very arguments that they give: sizes of 1 and multiples of 16 become constants and
promises in the compiler, which the interpreter never sees."""

import pytest
from gates import launched


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_launches_compile(everything):
    found = launched(everything)
    assert {f["kernel"] for f in found} == {
        "one_read", "moments", "join", "apply", "one_read_backward", "sums", "totals", "apply_backward",
        "attend", "of_queries", "of_keys", "rows",
    }  # fmt: skip
    assert len({f["launch"] for f in found}) == (28 if everything else 16)
    for f in found:
        if f["launch"].startswith("attention"):
            assert f["narrow"] == 0, f  # no load of two bytes, at a head of 40 and of 49 positions side by side too
