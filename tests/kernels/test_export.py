"""attention and combine in torch.export and ONNX: one graph with both, for any batch. (GroupNorm's stand in its own tests.)"""

import numpy as np
import pytest
import torch

from fastdiff import ops
from fastdiff.kernels import attention, combine  # noqa: F401  # what registers the two ops

fused = torch.ops.fastdiff
WEIGHTS = torch.tensor([[0.5, 2.0], [-1.0, 0.25]])


class Step(torch.nn.Module):
    """Self-attention over a fused projection, channels first, as the U-Net has it, with a residual; then a row of a plan."""

    def __init__(self, scale=None):
        super().__init__()
        self.scale = scale

    def forward(self, qkv):
        b, c, length = qkv.shape
        q, k, v = (x.transpose(-1, -2) for x in qkv.view(b, 3, 2, c // 6, length).unbind(1))
        d = fused.attention(q, k, v, q, self.scale)[0].transpose(-1, -2).reshape(b, c // 3, length)
        y, kept = fused.combine([qkv[:, : c // 3], d], WEIGHTS, None, 0)
        return y + kept.tanh()


@pytest.mark.parametrize("scale", [None, -0.5])
def test_export_and_onnx(scale):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.export.export(Step(scale), (torch.randn(2, 24, 5),), dynamic_shapes=[{0: torch.export.Dim("batch", min=1)}])
    called = [str(n.target) for n in program.run_decompositions().graph.nodes if "fastdiff" in str(n.target)]
    assert called == ["fastdiff.attention.default", "fastdiff.combine.default"]
    model = torch.onnx.export(
        program, dynamo=True, opset_version=20, verbose=False, custom_translation_table=ops.onnx_table()
    ).model_proto.SerializeToString()
    session = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch in (2, 3):
        given = torch.randn(batch, 24, 5)
        got = session.run(None, {session.get_inputs()[0].name: given.numpy()})[0]
        np.testing.assert_allclose(got, Step(scale)(given).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_any_number_of_positions(kernels, request):
    """Where a kernel would run, the trace asks whether it does; the answer must not bind the sizes that it leaves open."""
    if kernels == "triton":
        request.getfixturevalue("as_on_a_gpu")
    sizes = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("length", min=2)}
    program = torch.export.export(Step(), (torch.randn(2, 48, 5).half(),), dynamic_shapes=[sizes])
    assert "fastdiff.attention.default" in [str(n.target) for n in program.graph.nodes]
    if kernels == "torch":
        given = torch.randn(3, 48, 7).half()
        torch.testing.assert_close(program.module()(given), Step()(given))
