"""nets.py: the compact class-conditional UNet that add.py, dmd2.py and shortcut.py share.

A reader of the methods needs one line of it: `net(x, t, d=None, y=None)` maps images [B, 3, R, R]
to a float tensor of the same shape, given scalars t (and d) of order one per image and labels y.
What the output means (a velocity, a denoised image) is the script's business; `net.encode` gives
the encoder's features.

The shape, and why (speed: training steps of a 32x32 net in bf16 on two CPU cores):
  * Residual blocks of GroupNorm, SiLU, 3x3 convolution, with the condition as scale and shift of
    the second norm (ADM, Dhariwal and Nichol 2021): what EDM and most since have kept.
  * A narrow first stage at full resolution, not a stem of patches: outlines come out cleaner.
  * Down to 8x8, where the picture must agree with itself (one colour a shape): the coarse stage
    costs little, and its convolutions reach across.
  * Scale and shift say what to draw, not where. So every stage has a learned map of places, and
    every class a map at the coarsest stage: a tenth less flow loss after 11,000 images (one seed).
  * What comes up passes a 1x1 while still coarse and is added to the skip, not concatenated: the
    decoder's 3x3 convolutions see half the channels.
  * Groups of 16 channels: with channels-last tensors the backward pass of GroupNorm is 3-10 times
    slower for groups that do not fill the processor's vectors.
  * Attention is off unless asked for: in the first minutes of a CPU run it costs more than it
    brings.
  * Each block's second convolution and the last layer start at zero: blocks are the identity,
    the net is 0.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as computed_twice


def zero_init(layer):
    """Silence a branch at the start of training by zeroing its last layer."""
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """In groups of 16 channels. On a GPU, autocast would widen the input to fp32 and all that
    follows with it, as far as the next convolution; the sums are in fp32 anyway."""

    def __init__(self, channels):
        super().__init__(max(1, channels // 16), channels)

    def forward(self, x):
        if not x.is_cuda:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype),
                                self.bias.to(x.dtype), self.eps)


class Block(nn.Module):
    """Residual block: [B, cin, H, W] and embedding [B, E] -> [B, cout, H, W]."""

    def __init__(self, cin, cout, embedding, dropout):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(cout), zero_init(nn.Conv2d(cout, cout, 3, padding=1))
        self.film, self.dropout = nn.Linear(embedding, 2 * cout), nn.Dropout(dropout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(emb)[:, :, None, None].to(h.dtype).chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the positions of [B, C, H, W], heads of 32 channels (at least one)."""

    def __init__(self, channels):
        super().__init__()
        self.heads = math.gcd(max(1, channels // 32), channels)
        self.norm, self.qkv = GroupNorm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x, emb):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.mT.unbind(1)                              # [B, heads, HW, C / heads]
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":    # where its backward is slow
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(out.mT.reshape(b, c, h, w))


class UNet(nn.Module):
    """Class-conditional UNet.

    resolution: side R of the images, divisible by 2^(stages - 1). channels: width of the first
    stage, a multiple of 16; mult: each stage's width in `channels`; blocks: each stage's residual
    blocks, in the encoder and again in the decoder. attention: resolutions with self-attention.
    num_classes: labels are 0 .. num_classes - 1, and num_classes is the null class. conditions:
    how many scalars, t and those in d. checkpoint: of the blocks' activations only the inputs are
    kept for the backward pass, which computes the rest again: a third more time for the memory.
    """

    def __init__(self, resolution=32, channels=32, mult=(1, 2, 4), blocks=(1, 1, 1),
                 attention=(), num_classes=0, conditions=1, dropout=0.0,
                 checkpoint=False):
        super().__init__()
        self.checkpoint = checkpoint
        self.null_class, widths, emb = num_classes, [channels * m for m in mult], 4 * channels
        # Periods from 2 to 1/32: the scalars are of order one.
        self.register_buffer("frequencies", math.pi * 2 ** torch.linspace(0, 6, channels // 2),
                             persistent=False)
        self.embed_scalars = nn.Linear(conditions * 2 * len(self.frequencies), emb)
        self.embed_label = nn.Embedding(num_classes + 1, emb)
        self.embed_out = nn.Linear(emb, emb)

        def stage(cin, cout, n, side):
            layers = nn.ModuleList()
            for i in range(n):
                layers.append(Block(cout if i else cin, cout, emb, dropout))
                if side in attention:
                    layers.append(Attention(cout))
            return layers

        sides = [resolution >> i for i in range(len(mult))]
        ins = [channels, *widths[:-1]]
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        # The maps of places; those of classes have few channels, since there may be 1000 classes.
        self.place = nn.ParameterList(nn.Parameter(0.02 * torch.randn(c, r, r))
                                      for c, r in zip(ins, sides))
        self.label_map = nn.Embedding(num_classes + 1, 16 * sides[-1] ** 2)
        self.label_map_out = nn.Conv2d(16, widths[-1], 1)
        self.encoder = nn.ModuleList(map(stage, ins, widths, blocks, sides))
        self.middle = stage(widths[-1], widths[-1], 1, sides[-1])
        outs = [*widths[1:], widths[-1]]                        # what comes up into each stage
        self.merge = nn.ModuleList(nn.Conv2d(cin, cout, 1) for cin, cout in zip(outs, widths))
        self.decoder = nn.ModuleList(map(stage, widths, widths, blocks, sides))
        self.norm_out, self.conv_out = (GroupNorm(widths[0]),
                                        zero_init(nn.Conv2d(widths[0], 3, 3, padding=1)))

    def embedding(self, t, d=None, y=None):
        """t [B], d [B] or [B, conditions - 1] or None, y [B] int64 or None (the null class)
        -> [B, E]."""
        scalars = t[:, None] if d is None else torch.cat([t[:, None], d.reshape(len(t), -1)], 1)
        phase = scalars.float()[:, :, None] * self.frequencies              # [B, conditions, C/2]
        e = self.embed_scalars(torch.cat([phase.cos(), phase.sin()], 2).flatten(1))
        return F.silu(self.embed_out(F.silu(e + self.embed_label(self.labels(t, y)))))

    def labels(self, t, y):
        return torch.full(t.shape, self.null_class, device=t.device) if y is None else y

    def through(self, layers, h, emb):
        for layer in layers:
            if self.checkpoint and torch.is_grad_enabled():
                h = computed_twice(layer, h, emb, use_reentrant=False)
            else:
                h = layer(h, emb)
        return h

    def encode(self, x, t, d=None, y=None):
        """The encoder's features: a list, one a stage, [B, C_i, R / 2^i, R / 2^i],
        the deepest last."""
        emb = self.embedding(t, d, y)
        h, features = self.conv_in(x), []
        for i, layers in enumerate(self.encoder):
            h = (F.avg_pool2d(h, 2) if i else h) + self.place[i].to(h.dtype)
            h = self.through(layers, h, emb)
            features.append(h)
        return features

    def decode(self, skips, t, d=None, y=None):
        """What `forward` gives, from the features of `encode`, which may serve another loss too."""
        emb, h = self.embedding(t, d, y), skips[-1]
        label = self.label_map(self.labels(t, y)).view(len(h), 16, *h.shape[2:])
        h = h + self.label_map_out(label)
        h = self.through(self.middle, h, emb)
        for i in reversed(range(len(skips))):
            h = skips[i] + F.interpolate(self.merge[i](h), skips[i].shape[2:])
            h = self.through(self.decoder[i], h, emb)
        return self.conv_out(F.silu(self.norm_out(h))).float()

    def forward(self, x, t, d=None, y=None):
        return self.decode(self.encode(x, t, d, y), t, d, y)
