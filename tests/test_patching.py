"""fd.patch on diffusers' networks and ours: same outputs and gradients, copied, saved and compiled, and undone again."""

import copy
import pickle

import peer_networks
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.normalization import AdaGroupNorm
from diffusers.models.unets.unet_2d_blocks import KAttentionBlock
from patched import NETWORKS, called, clean, conditional, noise, unconditional
from torch import nn

import fastdiff as fd
from fastdiff.errors import FastdiffError
from fastdiff.models.edm import EDMUNet
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.patching.rules import ADA_NORM, ATTENTION, NORM


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    net, example = NETWORKS[request.param]()
    for p in net.parameters():  # nothing at 1 or 0, where a missing weight would not show
        p.data.add_(0.1 * torch.randn_like(p))
    return net.eval(), example


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
        assert sum(kind == ATTENTION for kind in report.sites.values()) == attentions
        report.undo()
        assert torch.equal(net(*example).sample, before) and clean(net)


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


def test_a_patched_network_can_be_copied_cast_and_saved(tmp_path):
    net, (x, t) = unconditional()
    fd.patch(net)
    want = net(x, t).sample
    torch.save(net, tmp_path / "net.pt")
    copies = copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(tmp_path / "net.pt", weights_only=False)
    for other in copies:
        assert torch.equal(other(x, t).sample, want)
        assert all(m.forward.args[0] is m for m in other.modules() if "forward" in vars(m)) and not clean(other)
        assert other.double()(x.double(), t).sample.dtype == torch.float64
    assert torch.equal(net(x, t).sample, want)


@pytest.mark.slow
def test_a_patched_network_compiles_whole(network):
    net, example = network
    report = fd.patch(net)
    with torch.no_grad():
        compiled = torch.compile(net, fullgraph=True, backend="eager")(*example).sample
        torch.testing.assert_close(compiled, net(*example).sample, rtol=1e-5, atol=1e-5)
    report.undo()


class Counting(AttnProcessor2_0):
    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_processors_set_after_the_patch_are_used():
    net, example = conditional()
    want = net.eval()(*example).sample
    report = fd.patch(net)
    mine = Counting()
    net.set_attn_processor(mine)
    torch.testing.assert_close(net(*example).sample, want, rtol=1e-4, atol=1e-4)
    assert mine.calls == sum(kind == ATTENTION for kind in report.sites.values())
    net.set_attn_processor(AttnProcessor2_0())
    net.set_default_attn_processor()
    assert {type(p) for p in net.attn_processors.values()} == {AttnProcessor}
    torch.testing.assert_close(net(*example).sample, want, rtol=1e-4, atol=1e-4)
    report.undo()
    assert clean(net) and {type(p) for p in net.attn_processors.values()} == {AttnProcessor}


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_each_processor_has_its_own_scale_and_norms(processor):
    """By hand, diffusers scales by attn.scale and leaves out norm_q and norm_k; by torch's attention, the other way round."""
    torch.manual_seed(0)
    attn = Attention(16, heads=2, dim_head=8, qk_norm="layer_norm", scale_qk=True, processor=processor())
    attn.scale, x = 0.9, noise(2, 5, 16)
    for p in attn.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    want = attn(x)
    assert fd.patch(attn, example=(x,)).sites
    torch.testing.assert_close(attn(x), want, rtol=1e-4, atol=1e-5)
    attn.upcast_softmax = True
    assert torch.equal(attn(x), type(attn).forward(attn, x)) or processor is AttnProcessor2_0


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


def test_adaptive_norms_go_through_the_op():
    torch.manual_seed(0)
    options = {"temb_channels": 8, "attention_bias": True, "cross_attention_dim": 8, "add_self_attention": True, "group_size": 4}
    block = KAttentionBlock(16, 2, 8, **options).eval()
    example = {"hidden_states": noise(2, 16, 4, 4), "encoder_hidden_states": noise(2, 3, 8), "emb": noise(2, 8)}
    report = fd.patch(block, example=example)
    assert not report.left and report.error <= 1e-5
    assert {type(m) for m in block.modules()} >= {AdaGroupNorm, Attention}
    assert report.sites == {"norm1": ADA_NORM, "norm2": ADA_NORM, "attn1": ATTENTION, "attn2": ATTENTION}


def test_our_networks_call_the_ops_already(monkeypatch):
    torch.manual_seed(0)
    ours = UNet(UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, attention=(1,), head_channels=32))
    shapes = peer_networks.cases()["edm adm"]["weights"]
    edm = EDMUNet({name: tuple(shape) for name, shape in shapes.items()})
    edm.load_state_dict(peer_networks.weights(shapes))
    noises, labels = torch.tensor([0.3, 0.5]), torch.tensor([1, 4])
    for net, call in ((ours, (noise(2, 3, 8, 8), noises)), (edm, (noise(2, 3, 8, 8), noises, labels))):
        report = fd.patch(net)
        assert not report.sites and not report.left and clean(net)
        with monkeypatch.context() as counting:
            seen = called(counting)
            net(*call)
        kinds = list(report.already.values())
        assert seen == {"group_norm_silu": kinds.count(NORM), "attention": kinds.count(ATTENTION)} and all(seen.values())


def test_both_parts_of_a_denoiser():
    """The network and the decoder, whose modules have the same names."""
    net, decoder = unconditional()[0], unconditional()[0]
    den = fd.Denoiser(net, fd.schedule.vp_cosine())
    assert set(fd.patch(den).sites) == {f"network.{name}" if name else "network" for name in fd.patch(decoder).sites}
    den.decoder = decoder
    assert len(fd.patch(den).already) == 2 * 17
    with pytest.raises(FastdiffError, match="takes a torch module, or a Denoiser of one; given function"):
        fd.patch(lambda x: x)
