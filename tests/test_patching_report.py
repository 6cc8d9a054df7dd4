"""What fd.patch reports: what was done, what was left and why, where each op runs; and that errors leave nothing behind."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from patched import clean, noise, unconditional
from torch import nn

import fastdiff as fd
from fastdiff import ops, patching
from fastdiff.errors import FastdiffError
from fastdiff.patching import rules
from fastdiff.patching.rules import ATTENTION, BLOCK, NORM, NORM_SILU

CPU = "the tensors are on cpu, the kernels run on NVIDIA GPUs"


def test_report_names_what_was_done_and_why_it_runs_on_torch():
    net, example = unconditional()
    report = fd.patch(net, example=example)
    assert report.sites["down_blocks.0.resnets.0"] == BLOCK
    assert report.sites["mid_block.attentions.0"] == ATTENTION
    assert report.sites[""] == NORM_SILU and set(report.runs) == set(report.refused) == set(report.sites)
    assert set(report.runs.values()) == {f"torch ({CPU})"}
    text = str(report)
    assert "8 x residual block" in text and f"runs on torch ({CPU}): 17 of 17" in text
    assert "example before and after" in text
    again = fd.patch(net)
    assert not again.sites and again.already == report.sites and "runs on torch" in str(again)
    again.undo()
    assert fd.patch(net).already  # the second undo leaves the first patch alone
    report.undo()
    assert not fd.patch(net).already


def test_the_report_knows_device_and_dtype_of_each_site(monkeypatch):
    """Attention that our kernel could run, but was never measured to be faster at, is torch's by choice."""
    monkeypatch.setattr(ops, "why_torch", lambda device: None)
    net, _ = unconditional()
    kinds = fd.patch(net).sites
    half = fd.patch(copy.deepcopy(net).half())
    attends = [name for name, kind in kinds.items() if kind == ATTENTION]
    assert not half.refused
    assert half.runs == {name: ops.backends()["attention"] if name in attends else "triton" for name in kinds}
    assert "runs on triton: 13 of 17" in half.lines
    single = fd.patch(net)
    assert single.refused == dict.fromkeys(attends, "the kernel takes float16, bfloat16; given torch.float32")
    double = fd.patch(net.double())
    assert set(double.refused) == set(kinds)
    assert double.refused[""] == "the kernel takes float32, float16, bfloat16; given torch.float64"
    assert not any(line.startswith("runs on triton") for line in double.lines)
    net.half().mid_block.attentions[0].float()  # one site that differs from the model's first parameter
    assert list(fd.patch(net).refused) == ["mid_block.attentions.0"]


class Odd(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) + 1


def test_what_is_not_known_is_left_and_named():
    net, _ = unconditional()
    block = net.down_blocks[0].resnets[0]
    block.norm1.register_forward_hook(lambda *_: None)
    net.mid_block.resnets[0].nonlinearity = nn.ReLU()
    net.mid_block.attentions[0].processor = type("Sliced", (), {"__call__": lambda *_: None})()
    net.conv_act.register_forward_hook(lambda *_: None)
    net.extra = nn.ModuleList([Odd(2, 4), nn.MultiheadAttention(4, 1), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)])
    net.extra[3].forward = offloaded = lambda x: x
    report = fd.patch(net)
    assert report.left == {
        "": "UNet2DModel: hooks are registered on its SiLU",
        "down_blocks.0.resnets.0": "ResnetBlock2D: hooks are registered on its GroupNorm",
        "mid_block.resnets.0": "ResnetBlock2D: its activation is ReLU, not SiLU",
        "mid_block.attentions.0": "Attention: its processor is Sliced",
        "extra.0": "Odd: a subclass of GroupNorm with a forward of its own",
        "extra.1": "MultiheadAttention: torch's module, which fuses by itself",
        "extra.3": "GroupNorm: its forward was replaced already (offloading, another patch)",
    }
    report.undo()
    assert net.extra[3].forward is offloaded
    norms = [report.sites[f"down_blocks.0.resnets.0.norm{i}"] for i in (1, 2)]
    assert [*norms, report.sites["extra.2"], report.sites["conv_norm_out"]] == [NORM] * 4
    assert "left: 1 x Attention: its processor is Sliced" in str(report)


def test_hooks_on_what_is_replaced_still_run():
    net, example = unconditional()
    seen = []
    for module in (net.down_blocks[0].resnets[0], net.mid_block.attentions[0], net.mid_block.attentions[0].group_norm):
        module.register_forward_hook(lambda m, *_: seen.append(m))
    report = fd.patch(net, example=example)
    assert not report.left and len(seen) == 6  # before and after


def test_a_class_is_known_by_its_package_too():
    named = {name: type(name, (nn.Identity,), {}) for name in ("Attention", "ResnetBlock2D", "AdaGroupNorm")}
    net = nn.ModuleDict({name: cls() for name, cls in named.items()})
    report = fd.patch(net)
    assert clean(net) and not report.sites
    assert report.left == {
        "Attention": "Attention: an attention unknown here", "AdaGroupNorm": "AdaGroupNorm: a normalisation unknown here"
    }  # fmt: skip
    mine = type("AttnProcessor2_0", (), {"__call__": lambda self, attn, x, **_: 7 * x})
    attn, x = Attention(16, heads=2, dim_head=8, processor=mine()), noise(2, 5, 16)
    assert fd.patch(attn).left == {"": "Attention: its processor is AttnProcessor2_0"} and torch.equal(attn(x), 7 * x)
    attn.processor = AttnProcessor2_0()
    fd.patch(attn)
    attn.processor = mine()
    assert torch.equal(attn(x), 7 * x)


class Ending(nn.Module):
    """Has diffusers' names, and something between them."""

    def __init__(self):
        super().__init__()
        self.conv_norm_out, self.conv_act = nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x):
        return self.conv_act(1 + self.conv_norm_out(x))


def test_only_diffusers_ends_as_diffusers_does():
    report = fd.patch(Ending(), example=(noise(2, 4, 3),))
    assert report.sites == {"conv_norm_out": NORM} and report.error <= 1e-6


class Louder(Attention):
    def forward(self, x):
        return 2 * super().forward(x)


class Deeper(ResnetBlock2D):
    def forward(self, x, temb):
        return super().forward(x, temb) + x


class Renamed(ResnetBlock2D):
    """Computes what it inherits."""


class SelfAttention(nn.Module):
    """Somebody's own, with a norm inside."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(2, 4), nn.Conv1d(4, 12, 1)


def test_subclasses_and_attention_of_ones_own():
    options = {"in_channels": 8, "groups": 2, "temb_channels": 8}
    net = nn.ModuleDict({
        "louder": Louder(16, heads=2, dim_head=8, norm_num_groups=2), "deeper": Deeper(**options), "same": Renamed(**options),
        "own": SelfAttention(),
    })  # fmt: skip
    report = fd.patch(net)
    assert report.left == {
        "louder": "Louder: a subclass of Attention with a forward of its own",
        "deeper": "Deeper: a subclass of ResnetBlock2D with a forward of its own",
        "own": "SelfAttention: an attention unknown here",
    }
    norms = dict.fromkeys(("louder.group_norm", "deeper.norm1", "deeper.norm2", "own.norm"), NORM)
    assert report.sites == {"same": BLOCK, **norms}


def test_strict_refuses_and_leaves_nothing_behind(monkeypatch):
    net, _ = unconditional()
    with pytest.raises(FastdiffError, match="strict patch refused: the module itself: the tensors are on cpu"):
        fd.patch(net, strict=True)
    monkeypatch.setattr(ops, "why_torch", lambda device: None)
    with pytest.raises(FastdiffError, match=r"refused: down_blocks\.1\.attentions\.0: the kernel takes .*\(and 1 more\)"):
        fd.patch(net, strict=True)
    net.half().extra = Odd(2, 4)
    with pytest.raises(FastdiffError, match="strict patch refused: extra: Odd: a subclass of GroupNorm"):
        fd.patch(net, strict=True)
    assert clean(net)
    with pytest.raises(FastdiffError, match="nothing here is known"):
        fd.patch(nn.Linear(2, 2), strict=True)
    del net.extra
    assert "triton" in fd.patch(net, strict=True).runs.values()


def raising(error):
    def op(*args, **options):
        raise error

    return op


@pytest.mark.parametrize("error", [RuntimeError("a kernel's"), KeyboardInterrupt(), FastdiffError("ours")])
def test_whatever_goes_wrong_everything_is_undone(error, monkeypatch):
    net, example = unconditional()
    with monkeypatch.context() as patched:
        patched.setattr(ops, "attention", raising(error))
        with pytest.raises(type(error)):
            fd.patch(net, example=example)
    assert clean(net)
    with monkeypatch.context() as patched:
        patched.setattr(patching, "answer", lambda m: raising(error)() if m is net.mid_block else rules.answer(m))
        with pytest.raises(type(error)):  # in the middle of the walk
            fd.patch(net)
    assert clean(net)


def test_outputs_that_differ_undo_everything(monkeypatch):
    net, example = unconditional()
    monkeypatch.setattr(ops, "attention", lambda q, k, v, scale=None: q)
    with pytest.raises(FastdiffError, match="of its largest value away; allowed are 0"):
        fd.patch(net, example=example)
    assert clean(net)


def test_dropout_draws_the_same_before_and_after():
    net, example = unconditional(dropout=0.5)
    net.train()
    assert not torch.equal(net(*example).sample, net(*example).sample)
    state = torch.get_rng_state()
    assert fd.patch(net, example=example).error <= 1e-5 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("x", [torch.zeros(0, 4, 3), torch.full((1, 4, 3), torch.nan)])
def test_an_example_that_shows_nothing_is_an_error(x):
    norm = nn.GroupNorm(2, 4)
    with pytest.raises(FastdiffError, match="output for example= is empty or not finite"):
        fd.patch(norm, example=(x,))
    assert clean(norm)
