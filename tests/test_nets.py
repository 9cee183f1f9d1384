"""nets.py: shapes and defaults that the three methods build on,
and attention as it is written."""
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from nets import Attention, Block, UNet


def awake(net):
    """Give the zero-initialised layers weights, so that the whole net has a say."""
    torch.manual_seed(1)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


def inputs(resolution, n=3):
    torch.manual_seed(0)
    return (torch.randn(n, 3, resolution, resolution), torch.rand(n), torch.rand(n),
            torch.tensor([0, 4, 10])[:n])


@pytest.mark.parametrize("resolution, mult, blocks", [
    (32, (1, 2, 4), (1, 1, 1)), (64, (1, 2, 2, 4), (1, 2, 1, 2)), (16, (1,), (2,))])
def test_shapes_of_output_and_features(resolution, mult, blocks):
    net = awake(UNet(resolution, 16, mult, blocks, (resolution // 2,),
                     num_classes=10, conditions=2))
    x, t, d, y = inputs(resolution)
    assert net(x, t, d, y).shape == x.shape and net(x, t, d, y).dtype == torch.float32
    features = net.encode(x, t, d, y)
    assert [f.shape for f in features] == [(3, 16 * m, resolution >> i, resolution >> i)
                                           for i, m in enumerate(mult)]


def test_the_net_starts_at_zero_and_a_block_at_the_identity():
    net = UNet(16, 16, (1, 2), (1, 1), (8,), num_classes=10)
    x, t, _, y = inputs(16)
    assert not net(x, t, y=y).any()
    h, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 64)
    assert torch.equal(Block(32, 32, 64, 0.0)(h, emb), h)
    assert torch.equal(Attention(32)(h, emb), h)


def test_every_input_matters():
    net = awake(UNet(16, 16, (1, 2), (1, 1), num_classes=10, conditions=2)).eval()
    x, t, d, y = inputs(16)
    base = net(x, t, d, y)
    for other in (net(x + 0.1, t, d, y), net(x, 1 - t, d, y),
                  net(x, t, 1 - d, y), net(x, t, d, 9 - y % 10)):
        assert ((other - base).abs().amax((1, 2, 3)) > 1e-4).all()                  # of every image


def test_labels_that_are_left_out_are_the_null_class():
    net = awake(UNet(16, 16, (1, 2), (1, 1), num_classes=10)).eval()
    x, t, _, _ = inputs(16)
    assert torch.equal(net(x, t), net(x, t, y=torch.full((3,), 10)))
    with pytest.raises(IndexError):
        net(x, t, y=torch.full((3,), 11))


@pytest.mark.parametrize("conditions", [1, 2, 4])
def test_any_number_of_scalar_conditions(conditions):
    net = awake(UNet(16, 16, (1, 2), (1, 1), conditions=conditions)).eval()
    x, t, _, _ = inputs(16)
    d = None if conditions == 1 else torch.rand(3, conditions - 1)
    base = net(x, t, d)
    for i in range(conditions - 1):
        other = d.clone()
        other[:, i] = 1 - other[:, i]
        assert ((net(x, t, other) - base).abs().amax((1, 2, 3)) > 1e-4).all()


def test_images_of_a_batch_do_not_mix():
    net = awake(UNet(16, 16, (1, 2), (1, 1), (8,), num_classes=10)).eval()
    x, t, _, y = inputs(16)
    assert_close(net(x, t, y=y),
                 torch.cat([net(x[i:i + 1], t[i:i + 1], y=y[i:i + 1]) for i in range(3)]),
                 atol=1e-5, rtol=1e-4)


def test_attention_is_a_softmax_of_products():
    layer = awake(Attention(64)).double()
    x = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 32, 16).unbind(1)      # heads of 32 channels
    weights = torch.einsum("bhcq,bhck->bhqk", q, k).div(32 ** 0.5).softmax(3)
    seen = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 64, 4, 4)
    expected = x + layer.out(seen)
    assert_close(layer(x, None), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_of_bf16_is_computed_in_fp32_on_a_cpu(autocast, monkeypatch):
    real, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv: seen.append(real(*qkv)) or seen[-1])
    layer, x = awake(Attention(64)), torch.randn(2, 64, 4, 4).bfloat16()
    expected = layer(x.float(), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = (layer if autocast else layer.bfloat16())(x, None)
    assert got.dtype == torch.bfloat16 and [out.dtype for out in seen] == [torch.float32] * 2
    assert_close(got.float(), expected, atol=0.05, rtol=0.02)
    got.float().square().sum().backward()
    assert layer.qkv.weight.grad.abs().max() > 0


def test_dropout_is_off_in_evaluation():
    net = awake(UNet(16, 16, (1, 2), (1, 1), dropout=0.5))
    x, t, _, _ = inputs(16)
    assert not torch.equal(net(x, t), net(x, t))
    net.eval()
    assert torch.equal(net(x, t), net(x, t))
