"""Guidance that looks inside a network, or needs one: perturbed attention, CLIP, one batched call for two predictions."""

import diffusers
import pytest
import tiny
import torch
from analytic import BIMODAL
from transformers import CLIPConfig, CLIPModel

import fastdiff as fd
from fastdiff import ops
from fastdiff.errors import FastdiffError
from fastdiff.guide.weaker import without_maps

SCHEDULE = fd.schedule.vp_cosine()
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def unet(new_order=True):
    return tiny.network(attention=[1], num_classes=None, null_class=False, new_attention_order=new_order)


@pytest.mark.parametrize("new_order", [True, False])
def test_our_attention_passes_values_on(new_order, monkeypatch):
    net = unet(new_order)
    t = torch.full((3,), 300.0)
    usual, perturbed = net(X, t), without_maps(net, lambda name: True)(X, t)
    assert torch.equal(net(X, t), usual) and (perturbed - usual).abs().max() > 1e-3
    monkeypatch.setattr(ops, "attention", lambda q, k, v: v)  # the identity map, for every layer of the network itself
    torch.testing.assert_close(net(X, t), perturbed, rtol=1e-5, atol=1e-6)


def test_the_copy_shares_every_weight():
    net = unet()
    copied = without_maps(net, lambda name: "middle" in name)
    assert [p.data_ptr() for p in copied.parameters()] == [p.data_ptr() for p in net.parameters()]
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    assert torch.equal(next(copied.parameters()), next(net.parameters()))


def test_perturbed_attention_guidance():
    den = fd.Denoiser(unet(), SCHEDULE, "v", shape=(1, 8, 8), time=lambda t: 1000 * t)
    g = fd.guide.pag(den, 3.0)
    weaker = fd.Denoiser(without_maps(den.network, lambda name: "mid" in name), SCHEDULE, "v", time=lambda t: 1000 * t)
    torch.testing.assert_close(g(X, 0.5), weaker(X, 0.5) + 3.0 * (den(X, 0.5) - weaker(X, 0.5)))
    assert torch.equal(fd.guide.pag(den, 1.0)(X, 0.5), den(X, 0.5))
    assert g.calls == 2 and g.guidance is None and fd.sample(g, fd.plan("unipc-2", g, 4), seeds=[1, 2]).isfinite().all()
    with pytest.raises(FastdiffError, match=r"picks none of the self-attention layers .*middle_block"):
        fd.guide.pag(den, 2.0, layers=lambda name: "nowhere" in name)


def test_diffusers_attention_is_perturbed_as_diffusers_does_it():
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    ).eval().requires_grad_(False)  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    perturbed = without_maps(net, lambda name: "mid_block" in name)(x, 500, text).sample
    assert (perturbed - net(x, 500, text).sample).abs().max() > 1e-3
    from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0

    for name, module in net.named_modules():
        if name.startswith("mid_block") and name.endswith("attn1"):
            module.set_processor(PAGIdentitySelfAttnProcessor2_0())
    both = net(torch.cat([x, x]), 500, torch.cat([text, text])).sample  # theirs: usual maps in one half, identity in the other
    torch.testing.assert_close(perturbed, both[2:], rtol=1e-4, atol=1e-5)
    den = fd.Denoiser(net, SCHEDULE, "eps", time=lambda t: 999 * t).bind(encoder_hidden_states=text)
    assert fd.guide.pag(den, 2.0)(x, 0.5).shape == x.shape


def test_diffusers_unconditional_network():
    """Attention on images, with its own norm and residual."""
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=16,
    ).eval().requires_grad_(False)  # fmt: skip
    perturbed = without_maps(net, lambda name: True)
    with torch.no_grad():  # queries and keys of 0 give the uniform map; on one position that is the identity
        small = X[..., :2, :2]
        torch.testing.assert_close(net(small, 300).sample, perturbed(small, 300).sample, rtol=1e-5, atol=1e-6)
        assert (net(X, 300).sample - perturbed(X, 300).sample).abs().max() > 1e-4


def test_clip_guidance_moves_images_towards_a_text():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 50, "eos_token_id": 49, "bos_token_id": 0},
                                vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)).eval()  # fmt: skip
    clip.requires_grad_(False)
    words = torch.tensor([[3, 7, 49], [9, 1, 49], [4, 4, 49]])

    def dissimilarity(x0, words):
        out = clip(input_ids=words, pixel_values=x0.repeat(1, 3, 1, 1))
        return 1 - (out.image_embeds * out.text_embeds).sum(-1)

    den = fd.Denoiser(BIMODAL.network(SCHEDULE), SCHEDULE, "x0", shape=(1, 8, 8))
    plan = fd.plan("dpmpp-2m", den, 10)
    plain = dissimilarity(fd.sample(den, plan, seeds=[1, 2, 3]), words)
    for through in (True, False):
        g = fd.guide.loss(den, dissimilarity, 10.0, through=through, words=words)
        assert (dissimilarity(fd.sample(g, plan, seeds=[1, 2, 3]), words) < plain - 0.1).all()


def test_one_call_for_both_and_two_when_memory_is_short():
    batches = []

    class Network(torch.nn.Module):
        limit = 100

        def forward(self, x, t, class_labels=None, style=None):
            batches.append(len(x))
            if len(x) > self.limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x * 0.5 + class_labels.view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)

    network, labels = Network(), torch.tensor([1.0, 2.0, 3.0])
    den = fd.Denoiser(network, SCHEDULE, "x0").bind(class_labels=labels, style="plain")
    two, one = (fd.guide.cfg(den, 2.0, negative={"class_labels": 0 * labels}, batched=b) for b in (False, True))
    for t in (0.5, torch.tensor([0.2, 0.5, 0.8])):
        torch.testing.assert_close(one(X, t), two(X, t))
    assert batches == [6, 3, 3, 6, 3, 3] and one.calls == two.calls == 2
    batches.clear()
    network.limit = 3
    for _ in range(2):
        torch.testing.assert_close(one(X, 0.5), two(X, 0.5))
    assert batches == [6, 3, 3, 3, 3, 3, 3, 3, 3]  # tried once
    batches.clear()
    uneven = fd.guide.cfg(den, 2.0, negative={"class_labels": 0 * labels, "style": "other"}, batched=True)
    uneven(X, 0.5)
    assert batches == [3, 3]  # conditions that do not lie side by side
    batches.clear()
    within = fd.guide.cfg(den, 2.0, negative={"class_labels": 0 * labels}, interval=(0.1, 1.0), batched=True)
    network.limit = 100
    times = [0.02, 0.4, 0.9]
    for t in times:
        within(X, t)
    assert batches == [3, 6, 3] and [within.calls_at(t) for t in times] == [1, 2, 1]
