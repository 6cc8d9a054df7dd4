"""Without the extra every command that needs it says so in one line; this runs where the packages are missing too."""

import sys

import pytest
import tiny

MODULES = {"onnx": "export", "onnxscript": "export", "onnxruntime": "export"}


@pytest.mark.parametrize("missing", MODULES)
def test_export_names_the_extra(missing, fastdiff, tmp_path, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "a.safetensors")
    for name in [n for n in sys.modules if n.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = fastdiff("export", checkpoint, "--out", "e")
    assert code == 2 and len(err.splitlines()) == 1 and "pip install 'fastdiff[onnx]'" in err and not out
    assert not any(fastdiff.folder.iterdir())
