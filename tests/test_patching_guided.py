"""fd.patch on guided-diffusion's blocks (stand-ins of their interface), and on what only looks like them."""

import copy
import pickle

import guided_diffusion as theirs
import pytest
import torch
from patched import called, clean, noise
from torch import nn

import fastdiff as fd
from fastdiff import ops
from fastdiff.patching.rules import ATTENTION, BLOCK, NORM, NORM_SILU

X, T = noise(2, 16, 8, 8), torch.tensor([0.3, 7.0])
FORMS = {
    "scale-shift": {},
    "embedding added, new order of attention": {"scale_shift": False, "legacy": False},
    "a SiLU of its own": {"act": theirs.SiLU},
}


def made(**options):
    torch.manual_seed(0)
    net = theirs.UNetModel(**options).eval()
    for p in net.parameters():  # nothing at 1 or 0, where a missing weight would not show
        p.data.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("form", FORMS)
def test_same_output_through_the_ops_and_undone(form, monkeypatch):
    net = made(**FORMS[form])
    with torch.no_grad():
        before = net(X, T)
        report = fd.patch(net, example=(X, T))
        assert not report.left and report.error <= 1e-5
        assert report.sites == {
            **{f"{half}_blocks.{i}": BLOCK for half, count in (("input", 3), ("output", 1)) for i in range(count)},
            "middle_block.norm": NORM, "middle_block.attention": ATTENTION, "out": NORM_SILU,
        }  # fmt: skip
        seen = called(monkeypatch)
        torch.testing.assert_close(net(X, T), before, rtol=1e-5, atol=1e-5)
        assert seen == {"group_norm_silu": 10, "attention": 1}  # every one of them
        assert fd.patch(net).already == report.sites
        report.undo()
        assert torch.equal(net(X, T), before) and clean(net)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_the_network(checkpointed):
    net = made()
    for block in (*net.input_blocks, *net.output_blocks):
        block.use_checkpoint = checkpointed

    def gradients():
        net.zero_grad()
        net(X, T).square().mean().backward()
        return [p.grad.clone() for p in net.parameters()]

    want = gradients()
    fd.patch(net)
    for got, right in zip(gradients(), want, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5)


def test_half_precision_is_no_less_exact():
    """Norms stay in float32 as with guided-diffusion's use_fp16; against the network in float64."""
    net, right = made(), made().double()
    for m in right.modules():  # GroupNorm32 itself would go back to float32
        if isinstance(m, theirs.GroupNorm32):
            m.forward = lambda x, m=m: nn.GroupNorm.forward(m, x)
    for m in net.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d):
            m.half()
    with torch.no_grad():
        want = right(X.double(), T.double())
        plain = (net(X.half(), T) - want).square().mean()
        fd.patch(net)
        assert (net(X.half(), T) - want).square().mean() <= 1.2 * plain < 1e-5


def test_attention_reads_qkv_in_place(monkeypatch):
    for kind in (theirs.QKVAttention, theirs.QKVAttentionLegacy):
        attention, qkv = kind(4), noise(2, 3 * 4 * 8, 5)
        want = attention(qkv)
        fd.patch(attention)
        given = []
        whole = ops.attention
        monkeypatch.setattr(ops, "attention", lambda *parts, given=given, whole=whole: (given.extend(parts), whole(*parts))[1])
        torch.testing.assert_close(attention(qkv), want, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()
        assert [part.untyped_storage().data_ptr() for part in given] == [qkv.untyped_storage().data_ptr()] * 3


def test_improved_diffusions_attention_has_the_heads_in_the_batch():
    class QKVAttention(nn.Module):
        def forward(self, qkv):
            return theirs.attend(*qkv.chunk(3, dim=1))

    attention, qkv = QKVAttention(), noise(8, 24, 5)
    want = attention(qkv)
    assert fd.patch(attention, example=(qkv,)).sites == {"": ATTENTION}
    torch.testing.assert_close(attention(qkv), want, rtol=1e-5, atol=1e-5)


def test_a_patched_network_is_copied_pickled_and_compiled(tmp_path):
    net = made()
    fd.patch(net)
    with torch.no_grad():
        want = net(X, T)
        torch.save(net, tmp_path / "net.pt")
        others = (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(tmp_path / "net.pt", weights_only=False))
        for other in others:
            for p in other.parameters():
                p.zero_()
            assert not other(X, T).any()  # by its own weights, not the first network's
        assert torch.equal(net(X, T), want)
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(X, T), want)


def test_a_network_of_float16_is_judged_by_its_convolutions(monkeypatch):
    """Its first parameter and its norms are float32; attention has none of its own."""
    monkeypatch.setattr(ops, "why_torch", lambda device: None)
    net = made()
    assert fd.patch(net).refused == {"middle_block.attention": "the kernel takes float16, bfloat16; given torch.float32"}
    for m in net.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d):
            m.half()
    assert not fd.patch(net, strict=True).refused


class Doubled(theirs.ResBlock):
    def _forward(self, x, emb):
        return 2 * super()._forward(x, emb)


def changed(**changes):
    block = theirs.ResBlock(16, 24, use_scale_shift_norm=True)
    for name, value in changes.items():
        setattr(block, name, value)
    return block


def with_act_of(block, act):
    block.out_layers[1] = act
    return block


def hooked(block):
    block.out_layers[0].register_forward_hook(lambda *_: None)
    return block


class Swish(theirs.GroupNorm32):
    """GLIDE's GroupNorm32 holds whether it applies SiLU itself."""


Swish.__name__ = "GroupNorm32"


def swish():
    norm = Swish(8, 16)
    norm.swish = 1.0
    return norm


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_heads = 4

    def forward(self, qkv, mask=None):
        return qkv


WithMask.__name__ = "QKVAttention"

UNLIKE = {
    "a subclass of ResBlock with a _forward of its own": lambda: Doubled(16, 24),
    "its parts are emb_layers, h_upd, in_layers, out_layers, skip_connection, time, x_upd": lambda: changed(time=nn.Linear(1, 1)),
    "its options are not guided-diffusion's: skip_t_emb": lambda: changed(skip_t_emb=True),
    "its out_layers are GroupNorm32, ReLU, Dropout, Conv2d": lambda: with_act_of(changed(), nn.ReLU()),
    "hooks are registered on its GroupNorm32": lambda: hooked(changed()),
    "its forward was replaced already": lambda: changed(_forward=lambda x, emb: x),
    "a GroupNorm32 with attributes of its own: swish": swish,
    "its forward takes 2 arguments, not qkv alone": WithMask,
    "its attributes are not guided-diffusion's: n_heads, scale": lambda: [
        attention := theirs.QKVAttention(4), setattr(attention, "scale", 2.0)
    ][0],
}  # fmt: skip


@pytest.mark.parametrize("why", UNLIKE)
def test_what_only_looks_like_it_is_left(why):
    module = UNLIKE[why]()
    report = fd.patch(nn.ModuleDict({"m": module}))
    assert why in report.left["m"] and "m" not in report.sites
    assert not {"forward", "_forward"} & set(vars(module)) - {"_forward" if "replaced" in why else ""}


def test_a_block_that_is_left_keeps_its_arithmetic():
    """Its norms are fused one by one and its Sequentials where they run whole: scale and shift stay between norm and SiLU."""
    for options in ({"use_scale_shift_norm": True, "factor": 2}, {}):
        torch.manual_seed(0)
        block, emb = Doubled(16, 24, **options), noise(2, 24)
        report = fd.patch(block, example=(X, emb))
        assert report.error <= 1e-5 and list(report.left) == [""]
        assert report.sites == {"in_layers": NORM_SILU, "out_layers": NORM_SILU}


def test_sequential_fuses_neighbours_alone():
    odd = type("Odd", (nn.GroupNorm,), {"forward": lambda self, x: 2 * nn.GroupNorm.forward(self, x)})
    norms = [nn.GroupNorm(2, 4), odd(2, 4), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)]
    acts = [nn.SiLU(), nn.SiLU(), nn.ReLU(), nn.SiLU()]
    net = nn.Sequential(*(layer for pair in zip(norms, acts, strict=True) for layer in pair))
    report = fd.patch(net, example=(noise(2, 4, 3),))
    assert report.sites == {"": NORM_SILU, "4": NORM} and report.error <= 1e-6
    assert report.left == {"2": "Odd: a subclass of GroupNorm with a forward of its own"}
    report.undo()
    assert fd.patch(nn.Sequential(nn.GroupNorm(2, 4), nn.ReLU())).sites == {"0": NORM}
    net[1].register_forward_hook(lambda *_: None)
    report = fd.patch(net)
    assert report.left[""] == "Sequential: hooks are registered on its SiLU" and report.sites["0"] == NORM
