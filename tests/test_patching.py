"""fd.patch on diffusers' networks and ours: same outputs, what the report says, and undone again."""

import copy

import diffusers
import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff import ops, patching
from fastdiff.errors import FastdiffError
from fastdiff.models.unet import UNet, UNetConfig

CPU = "the tensors are on cpu"
BLOCKS = {"block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def unconditional(**options):
    net = diffusers.UNet2DModel(
        in_channels=3, out_channels=3, sample_size=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), **BLOCKS, **options,
    )  # fmt: skip
    return net, (noise(2, 3, 8, 8), torch.tensor([1, 500]))


def conditional():
    net = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=4, **BLOCKS,
    )  # fmt: skip
    return net, (noise(2, 4, 8, 8), torch.tensor([1, 500]), noise(2, 5, 16))


def autoencoder():
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **BLOCKS
    )
    return net, (noise(1, 3, 16, 16),)


NETWORKS = {
    "unconditional": unconditional,
    "scale-shift, resampling in the blocks": lambda: unconditional(
        resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet"
    ),
    "conditional": conditional,
    "autoencoder": autoencoder,
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    net, example = NETWORKS[request.param]()
    for p in net.parameters():  # nothing at 1 or 0, where a missing weight would not show
        p.data.add_(0.1 * torch.randn_like(p))
    return net.eval(), example


def called(monkeypatch):
    """How often an output went through the ops, and how often beside them."""
    seen = {"group_norm_silu": 0, "attention": 0}
    for name in seen:
        whole = getattr(ops, name)

        def counted(*args, name=name, whole=whole, **options):
            seen[name] += 1
            return whole(*args, **options)

        monkeypatch.setattr(ops, name, counted)
    return seen


def test_same_output_through_the_ops_and_undone(network, monkeypatch):
    net, example = network
    with torch.no_grad():
        before, names = net(*example).sample, list(net.state_dict())
        norms = sum(isinstance(m, nn.GroupNorm) for m in net.modules())
        attentions = sum(type(m).__name__ == "Attention" for m in net.modules())
        report = fd.patch(net, example=example)
        seen = called(monkeypatch)
        torch.testing.assert_close(net(*example).sample, before, rtol=1e-4, atol=1e-4)
        assert seen == {"group_norm_silu": norms, "attention": attentions}  # every one of them
        assert report.error <= 1e-4 and not report.left and list(net.state_dict()) == names
        assert sum(kind == patching.ATTENTION for kind in report.sites.values()) == attentions
        report.undo()
        assert torch.equal(net(*example).sample, before)
        assert not any("forward" in m.__dict__ for m in net.modules())


def test_gradients_are_those_of_the_network(network):
    net, example = network

    def gradients():
        net.zero_grad()
        net(*example).sample.square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    want = gradients()
    report = fd.patch(net)
    for got, right in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5)
    report.undo()


def test_report_names_what_was_done_and_why_it_runs_on_torch():
    net, example = unconditional()
    report = fd.patch(net, example=example)
    assert report.sites["down_blocks.0.resnets.0"] == patching.RESNET
    assert report.sites["mid_block.attentions.0"] == patching.ATTENTION
    assert report.sites[""] == patching.NORM_SILU and CPU in report.runs
    text = str(report)
    assert "8 x residual block" in text and f"runs on: torch ({CPU}" in text and "example before and after" in text
    again = fd.patch(net)
    assert not again.sites and again.already == report.sites
    again.undo()
    assert fd.patch(net).already  # the second undo leaves the first patch alone
    report.undo()
    assert not fd.patch(net).already


def test_a_patched_network_can_be_copied_and_cast():
    net, (x, t) = unconditional()
    fd.patch(net)
    other = copy.deepcopy(net).double()
    assert other(x.double(), t).sample.dtype == torch.float64
    assert other.down_blocks[0].resnets[0].forward.__self__ is other.down_blocks[0].resnets[0]


def test_a_mask_goes_to_the_processor_before():
    net, (x, t, text) = conditional()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    before = net(x, t, text, encoder_attention_mask=mask).sample
    fd.patch(net)
    torch.testing.assert_close(net(x, t, text, encoder_attention_mask=mask).sample, before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(net(x, t, text).sample, before, rtol=1e-3, atol=1e-3)


def test_one_condition_serves_every_sample():
    """Tokens (1, 6, d) for a batch of 2: 6 divides by 2, so that a wrong shape would not show as an error. (diffusers' own
    processor refuses them.)"""
    net, (x, t, _) = conditional()
    text = noise(1, 6, 16)
    before = net(x, t, text.expand(2, -1, -1)).sample
    fd.patch(net)
    torch.testing.assert_close(net(x, t, text).sample, before, rtol=1e-4, atol=1e-4)


def test_a_patched_network_is_exported_with_any_batch():
    net, (x, t, text) = conditional()
    fd.patch(net.eval())
    batch = torch.export.Dim("batch", min=2, max=63)  # from 64 on upsampling copies its input
    graph = torch.export.export(net, (x, t, text), dynamic_shapes=({0: batch},) * 3, strict=False).module()
    for n in (2, 3):
        given = noise(n, 4, 8, 8), torch.arange(n) + 1, noise(n, 5, 16)
        torch.testing.assert_close(graph(*given).sample, net(*given).sample, rtol=1e-4, atol=1e-4)


class Odd(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def test_what_is_not_known_is_left_and_named():
    net, _ = unconditional()
    block = net.down_blocks[0].resnets[0]
    block.norm1.register_forward_hook(lambda *_: None)
    net.mid_block.resnets[0].nonlinearity = nn.ReLU()
    net.mid_block.attentions[0].processor = type("Sliced", (), {"__call__": lambda *_: None})()
    net.extra = nn.ModuleList([Odd(2, 4), nn.MultiheadAttention(4, 1), nn.GroupNorm(2, 4)])
    report = fd.patch(net)
    assert report.left == {
        "down_blocks.0.resnets.0": "ResnetBlock2D: hooks are registered on it",
        "down_blocks.0.resnets.0.norm1": "GroupNorm: hooks are registered on it",
        "mid_block.resnets.0": "ResnetBlock2D: its activation is ReLU, not SiLU",
        "mid_block.attentions.0": "Attention: its processor is Sliced",
        "extra.0": "Odd: a class of its own, unknown here",
        "extra.1": "MultiheadAttention: torch's module, which fuses by itself",
    }
    assert report.sites["extra.2"] == report.sites["down_blocks.0.resnets.0.norm2"] == patching.NORM
    assert "left: 1 x Attention: its processor is Sliced" in str(report)


def test_strict_refuses_and_leaves_nothing_behind(monkeypatch):
    net, _ = unconditional()
    with pytest.raises(FastdiffError, match="strict patch refused: the kernels do not run: the tensors are on cpu"):
        fd.patch(net, strict=True)
    monkeypatch.setattr(ops, "why_torch", lambda device: None)
    net.extra = Odd(2, 4)
    with pytest.raises(FastdiffError, match="strict patch refused: extra: Odd: a class of its own"):
        fd.patch(net, strict=True)
    assert not any("forward" in m.__dict__ for m in net.modules())
    with pytest.raises(FastdiffError, match="nothing here is known"):
        fd.patch(nn.Linear(2, 2), strict=True)
    del net.extra
    assert fd.patch(net, strict=True).runs == "triton"


def test_outputs_that_differ_undo_everything(monkeypatch):
    net, example = unconditional()
    monkeypatch.setattr(ops, "attention", lambda q, k, v, scale=None: q)
    with pytest.raises(FastdiffError, match="of its largest value away; allowed are 0"):
        fd.patch(net, example=example)
    assert not any("forward" in m.__dict__ for m in net.modules())


def test_our_unet_calls_the_ops_already():
    torch.manual_seed(0)
    net = UNet(UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention=(1,), head_channels=32))
    report = fd.patch(fd.Denoiser(net, fd.schedule.vp_cosine()), example=None)
    assert not report.sites and not report.left and set(report.already.values()) == {"Norm", "AttentionBlock"}
    with pytest.raises(FastdiffError, match="takes a torch module, or a Denoiser of one; given function"):
        fd.patch(lambda x: x)
