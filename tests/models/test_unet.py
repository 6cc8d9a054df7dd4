"""The U-Net: guided-diffusion's state dict, its two attention orders, and gradients that are right."""

import math

import pytest
import torch

from fastdiff.errors import FastdiffError
from fastdiff.models import UNet, UNetConfig
from fastdiff.models.unet import AttentionBlock, timestep_embedding

SMALL = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention": (2,),
    "head_channels": 32,
    "num_classes": 4,
}

# guided-diffusion: UNetModel(image_size=8, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1,
# attention_resolutions=(2,), channel_mult=(1, 2), num_classes=4, num_head_channels=32, use_scale_shift_norm=True), as
# its code makes them. Each has a bias of its first dimension, but for label_emb.
ADM = """
time_embed.0 128 32
time_embed.2 128 128
label_emb 4 128
input_blocks.0.0 32 3 3 3
input_blocks.1.0.in_layers.0 32
input_blocks.1.0.in_layers.2 32 32 3 3
input_blocks.1.0.emb_layers.1 64 128
input_blocks.1.0.out_layers.0 32
input_blocks.1.0.out_layers.3 32 32 3 3
input_blocks.2.0.op 32 32 3 3
input_blocks.3.0.in_layers.0 32
input_blocks.3.0.in_layers.2 64 32 3 3
input_blocks.3.0.emb_layers.1 128 128
input_blocks.3.0.out_layers.0 64
input_blocks.3.0.out_layers.3 64 64 3 3
input_blocks.3.0.skip_connection 64 32 1 1
input_blocks.3.1.norm 64
input_blocks.3.1.qkv 192 64 1
input_blocks.3.1.proj_out 64 64 1
middle_block.0.in_layers.0 64
middle_block.0.in_layers.2 64 64 3 3
middle_block.0.emb_layers.1 128 128
middle_block.0.out_layers.0 64
middle_block.0.out_layers.3 64 64 3 3
middle_block.1.norm 64
middle_block.1.qkv 192 64 1
middle_block.1.proj_out 64 64 1
middle_block.2.in_layers.0 64
middle_block.2.in_layers.2 64 64 3 3
middle_block.2.emb_layers.1 128 128
middle_block.2.out_layers.0 64
middle_block.2.out_layers.3 64 64 3 3
output_blocks.0.0.in_layers.0 128
output_blocks.0.0.in_layers.2 64 128 3 3
output_blocks.0.0.emb_layers.1 128 128
output_blocks.0.0.out_layers.0 64
output_blocks.0.0.out_layers.3 64 64 3 3
output_blocks.0.0.skip_connection 64 128 1 1
output_blocks.0.1.norm 64
output_blocks.0.1.qkv 192 64 1
output_blocks.0.1.proj_out 64 64 1
output_blocks.1.0.in_layers.0 96
output_blocks.1.0.in_layers.2 64 96 3 3
output_blocks.1.0.emb_layers.1 128 128
output_blocks.1.0.out_layers.0 64
output_blocks.1.0.out_layers.3 64 64 3 3
output_blocks.1.0.skip_connection 64 96 1 1
output_blocks.1.1.norm 64
output_blocks.1.1.qkv 192 64 1
output_blocks.1.1.proj_out 64 64 1
output_blocks.1.2.conv 64 64 3 3
output_blocks.2.0.in_layers.0 96
output_blocks.2.0.in_layers.2 32 96 3 3
output_blocks.2.0.emb_layers.1 64 128
output_blocks.2.0.out_layers.0 32
output_blocks.2.0.out_layers.3 32 32 3 3
output_blocks.2.0.skip_connection 32 96 1 1
output_blocks.3.0.in_layers.0 64
output_blocks.3.0.in_layers.2 32 64 3 3
output_blocks.3.0.emb_layers.1 64 128
output_blocks.3.0.out_layers.0 32
output_blocks.3.0.out_layers.3 32 32 3 3
output_blocks.3.0.skip_connection 32 64 1 1
out.0 32
out.2 3 32 3 3
"""


def expected():
    out = {}
    for line in ADM.strip().splitlines():
        name, *shape = line.split()
        out[f"{name}.weight"] = tuple(map(int, shape))
        if name != "label_emb":
            out[f"{name}.bias"] = (int(shape[0]),)
    return out


def shapes(net):
    return {k: tuple(v.shape) for k, v in net.state_dict().items()}


def drawn(**changes):
    """A small network in float64 with every weight drawn, so that no gradient hides behind a zero initialisation."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return net


def test_state_dict_is_guided_diffusions():
    assert shapes(UNet(UNetConfig(**SMALL))) == expected()


def test_state_dict_with_resblock_updown_and_without_scale_shift():
    """Resampling blocks have a block's parameters instead of `op` and `conv`; an added embedding is half as wide."""
    got = shapes(UNet(UNetConfig(**SMALL, resblock_updown=True, use_scale_shift_norm=False)))
    want = {}
    for name, shape in expected().items():
        if ".op." in name or ".conv." in name:
            continue
        want[name] = (shape[0] // 2, *shape[1:]) if ".emb_layers." in name else shape
    for prefix, ch in (("input_blocks.2.0", 32), ("output_blocks.1.2", 64)):
        for part, shape in (
            ("in_layers.0", (ch,)),
            ("in_layers.2", (ch, ch, 3, 3)),
            ("emb_layers.1", (ch, 128)),
            ("out_layers.0", (ch,)),
            ("out_layers.3", (ch, ch, 3, 3)),
        ):
            want |= {f"{prefix}.{part}.weight": shape, f"{prefix}.{part}.bias": (ch,)}
    assert got == want


def test_an_untrained_network_returns_zero_and_a_drawn_one_depends_on_all_its_inputs():
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 3])
    assert not UNet(UNetConfig(**SMALL))(x, t, y).any()
    net = drawn()
    base = net(x.double(), t, y)
    assert base.shape == x.shape
    assert not torch.allclose(base, net(x.double(), t + 1, y)) and not torch.allclose(
        base, net(x.double(), t, y.flip(0))
    )
    torch.testing.assert_close(base[1:], net(x[1:].double(), t[1:], y[1:]))  # a sample knows nothing of its neighbours


def test_timestep_embedding_against_its_formula():
    got = timestep_embedding(torch.tensor([0.0, 12.5]), 5, 100.0)
    for row, t in zip(got, (0.0, 12.5), strict=True):
        freqs = [1.0, 100.0 ** (-1 / 2)]
        want = [math.cos(t * f) for f in freqs] + [math.sin(t * f) for f in freqs] + [0.0]
        torch.testing.assert_close(row, torch.tensor(want))


@pytest.mark.parametrize("new_order", [False, True])
def test_attention_orders(new_order):
    """Legacy: heads first, then q, k, v within each; new: q, k, v first (QKVAttentionLegacy, QKVAttention)."""
    torch.manual_seed(0)
    block = AttentionBlock(64, 32, new_order).double()
    torch.nn.init.normal_(block.proj_out.weight)
    x = torch.randn(2, 64, 3, 2, dtype=torch.float64)
    flat = x.view(2, 64, 6)
    qkv = torch.einsum("oc,bcl->bol", block.qkv.weight[:, :, 0], block.norm(flat)) + block.qkv.bias[:, None]
    heads = []
    for head in range(2):
        if new_order:
            q, k, v = (qkv[:, part * 64 + head * 32 : part * 64 + (head + 1) * 32] for part in range(3))
        else:
            q, k, v = qkv[:, head * 96 : (head + 1) * 96].split(32, dim=1)
        weight = torch.einsum("bct,bcs->bts", q, k).div(math.sqrt(32)).softmax(-1)
        heads.append(torch.einsum("bts,bcs->bct", weight, v))
    h = torch.einsum("oc,bcl->bol", block.proj_out.weight[:, :, 0], torch.cat(heads, 1)) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(x), x + h.view_as(x))


@pytest.mark.parametrize(
    "changes", [{}, {"resblock_updown": True, "use_scale_shift_norm": False, "new_attention_order": True}]
)
def test_gradients_against_finite_differences(changes):
    net, x = drawn(**changes), torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    t, y = torch.tensor([40.0]), torch.tensor([1])
    weight = torch.randn(1, 3, 4, 4, dtype=torch.float64)

    def loss():
        return (net(x, t, y) * weight).sum()

    inputs = [x, *net.parameters()]
    grads = torch.autograd.grad(loss(), inputs)
    directions = [torch.randn_like(p) for p in inputs]
    for chosen in (slice(0, 1), slice(1, None)):  # the image alone, then all parameters
        slope = sum((g * d).sum() for g, d in zip(grads[chosen], directions[chosen], strict=True))
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6):
                for p, d in zip(inputs[chosen], directions[chosen], strict=True):
                    p.add_(d, alpha=step)
                values.append(loss())
            for p, d in zip(inputs[chosen], directions[chosen], strict=True):
                p.add_(d, alpha=1e-6)
        torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-6)


def test_checkpointing_gives_the_same_gradients():
    net, x = drawn(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    t, y = torch.tensor([1.0, 500.0]), torch.tensor([0, 2])
    results, saved = [], []
    for checkpointing in (False, True):
        net.train().checkpointing = checkpointing
        count = [0]

        def pack(v, count=count):
            count[0] += 1
            return v

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            out = net(x, t, y).square().sum()
        results.append(torch.autograd.grad(out, list(net.parameters())))
        saved.append(count[0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert saved[1] < saved[0] / 2, f"checkpointing must keep fewer tensors: {saved}"


def test_learned_variance_doubles_the_channels():
    net = UNet(UNetConfig(**SMALL, learned_variance=True))
    assert net(torch.randn(1, 3, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)).shape == (1, 6, 4, 4)
    assert net.state_dict()["out.2.weight"].shape == (6, 32, 3, 3)


def test_null_label():
    assert UNet(UNetConfig(**SMALL)).null_label is None
    assert UNet(UNetConfig(**SMALL, null_class=True)).null_label == 3
    assert UNet(UNetConfig(**{**SMALL, "num_classes": None})).null_label is None


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_channels": 48}, "multiple of 32"),
        ({"channel_mult": (1, 1.5)}, "multiple of 32"),
        ({"channel_mult": ()}, "level"),
        ({"channel_mult": (1, 0)}, "positive"),
        ({"head_channels": 48}, "head_channels"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"model_channels": 0}, "model_channels"),
        ({"in_channels": -1}, "in_channels"),
        ({"out_channels": 1.5}, "out_channels"),
    ],
)
def test_odd_configurations_are_refused(changes, word):
    with pytest.raises(FastdiffError, match=word):
        UNet(UNetConfig(**{**SMALL, **changes}))


def test_odd_inputs_are_refused():
    net = UNet(UNetConfig(**SMALL))
    with pytest.raises(FastdiffError, match="divisible by 2"):
        net(torch.randn(1, 3, 8, 7), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(FastdiffError, match="class_labels"):
        net(torch.randn(1, 3, 8, 8), torch.zeros(1))
