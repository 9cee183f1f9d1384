"""add.py: Adversarial Diffusion Distillation (Sauer et al. 2023, arXiv 2311.17042).

A diffusion model, the teacher, is made into a student that needs one to four calls, by

    L = L_adv(x_hat) + lambda L_distill(x_hat),   x_hat = x_hat_theta(x_s, s)           (Eq. 1)
    L_distill = c(t) |x_hat - x_hat_psi(alpha_t x_hat + sigma_t eps; t)|^2              (Eq. 4)

where x_s is a real image noised to one of the student's four times s, L_adv the hinge loss of light
discriminator heads (weights phi) on a frozen network's features (Eq. 2, 3), theta are the student's
weights, and psi those of the frozen teacher, which denoises the student's image once it is noised
afresh.

Time t runs from 0 (image) to 1000 (pure noise): x_t = alpha_t x0 + sigma_t eps. Both predict
v = alpha_t eps - sigma_t x0: of a predicted eps, no image could be had at t = 1000.

    python add.py --steps 1                           # coloured shapes, one CPU core: 20 to 40 min
    python add.py --steps 1,2,4                       # the same run, sampled in up to four calls
    python add.py --data cifar10 --steps 1,4          # on a GPU

Departs from the paper in (its training code is not public, and it leaves much open):
  * everything is small, in pixels, trained from scratch, teacher included; DDPM's linear betas;
  * the frozen feature network is by default the teacher's own encoder, which sees the images with
    some noise and the null label (LADD, 2403.12015), not DINOv2, which is a download;
  * the heads see each channel of the features less its mean, in fifths of its deviation, over 1024
    real images (`norms`), where StyleGAN-T's have a local batch norm. In the encoder's own units a
    weak teacher shows them little but the mean: on CIFAR-10, after 3000 updates of the teacher and
    700 of the student, one call painted stripes (FD-random of the weights as they are 2.74 in one
    call and 6.15 in four; standardised 0.45 and 0.98). On shapes it makes no clear difference;
  * the heads have 3x3 convolutions on feature maps where StyleGAN-T's have 1-d ones on tokens, and
    are averaged over places and images. There is one for each stage of the encoder, four on a
    transformer (StyleGAN-T: five, and images are augmented);
  * they are told which call an image is of (--tell-call). If not, the hinge of all calls together
    is content where one call is too dark and another too bright, and a sample drifts with each;
  * c_text is the class, c_img the mean of the feature network's last map of x0 (paper: a separate
    DINOv2's class token). It is left out of both sides of the hinge where s = 1000: there the
    student cannot know which x0 is meant, and the heads would punish it for that;
  * in half of a batch the later calls see not noised real images but the student's own images of
    the call before, noised, as in sampling with all --taus (DMD2's backward simulation;
    --simulated 0: the paper's). No x0 is meant there, so c_img is left out as well. Without them
    each call adds the detail that a real image loses in the noise to images that never had it, and
    contrast grows: on CIFAR-10 the pixels' deviation was 0.475 after one call, 0.503 after two,
    0.555 after four (the images': 0.503), and four calls scored worse than one (FD-random 0.36
    against 0.16, without `norms`). On shapes four calls had 0.077 without, 0.039 with these images;
    from another teacher there was no clear difference;
  * the student's times are 200, 400, 600 and 1000 (--taus; the paper names the last alone, and its
    released models are called at 999, 899, 799, 699): 400, 600, 800, 1000 were worse.
    In sampling each call's image is noised afresh (released: Euler-ancestral steps, which keep a
    part of the noise);
  * the weighting is exponential, that of the paper's ablations (its final models: NFSD);
  * |.|^2 is a mean over the pixels, so lambda is not comparable: in a training with 2.5 the
    distillation's gradient at an image is a 60th to a 100th of the adversarial one, with 80 a
    fifth. t is uniform in 1 .. 999, and w = sigma^2 in the SDS and NFSD weightings;
  * R1 is of a head's sum of logits, without a factor 1/2, so gamma is not comparable: at 1e-5 it
    is not felt, at 1e-3 (and without momentum) colours no longer chase each other round;
  * optimisers, rates, clipping, EMA and schedules are ours: the paper has none. The student's and
    the heads' rates end at a tenth, not at zero: the two circle, and the EMA is the centre. Where
    they decay to zero they stop somewhere on the circle, and the EMA with them;
  * NFSD's negative prompt is another class, drawn at random.
"""
import argparse
import contextlib
import csv
import datetime
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import distributed, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fid
from fid import UserError, from_uint8, to_uint8
from nets import UNet

try:
    import fcntl
except ImportError:                                         # Windows: two processes may meet
    fcntl = None

METHOD = "add"
T = 1000                        # diffusion times 1 .. T; 0 is the image

PRESETS = dict(
    #            shapes     cifar10    folder     imagenet64
    teacher_iters=(6000,    200_000,   100_000,   400_000),
    teacher_batch=(16,      256,       64,        256),
    teacher_lr =(5e-3,      1e-3,      2e-3,      5e-4),
    teacher_ema=(0.995,     0.9995,    0.999,     0.9999),
    iters      =(3000,      50_000,    30_000,    100_000),
    batch      =(16,        128,       64,        128),
    lr         =(5e-4,      2e-4,      2e-4,      1e-4),
    disc_lr    =(2e-3,      1e-3,      1e-3,      1e-3),
    ema        =(0.998,     0.999,     0.999,     0.999),
    samples    =(2048,      50_000,    10_000,    50_000),
    features   =("random",  "auto",    "auto",    "auto"),
    resolution =(32,        32,        32,        64),
    flip       =(False,     True,      True,      True),
    channels   =(32,        96,        64,        128),
    mult       =((1, 2, 4), (1, 2, 2), (1, 2, 4), (1, 2, 3, 4)),
    blocks     =((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 2, 2, 2)),
    attention  =((),        (16,),     (8,),      (16, 8)),
    dropout    =(0.0,       0.1,       0.1,       0.0),
)
STEPS = ()                      # 1, 2, 4, as far as there are --taus


def method_options(add):
    add("--teacher", type=lambda path: str(pathlib.Path(path)),
        help="folder of another run, to take its teacher instead of training one; options of the "
        "teacher's training then have no effect")
    add("--teacher-iters", type=int, help="length of the teacher's training")
    add("--teacher-batch", type=int, help="its images per update")
    add("--teacher-lr", type=float, help="its peak learning rate")
    add("--teacher-ema", type=float, help="its decay of the running mean")
    add("--teacher-steps", type=int, help="DDIM steps to score the teacher with; 0: do not "
        "[32, until its picture is there]")
    add("--taus", type=numbers, default=(200, 400, 600, 1000),
        help="the student's times, in training and sampling; the last is pure noise. --steps are "
        "1, 2, 4 of them unless given")
    add("--simulated", type=float, default=0.5, help="share of a batch whose x_s is no noised real "
        "image but, as in sampling, the student's own of the call before; the paper: 0")
    add("--student-init", choices=["teacher", "random"], default="teacher",
        help="random: Table 1c")
    add("--adv-weight", type=float, default=1.0, help="of the adversarial loss; 0: distillation "
        "alone")
    add("--distill-weight", type=float, default=80.0, help="lambda; 0: adversarial alone")
    add("--weighting", choices=["exponential", "sds", "nfsd"], default="exponential",
        help="of the distillation loss: c(t) = alpha, that of SDS, or NFSD's gradient")
    add("--nfsd-scale", type=float, default=7.5, help="guidance within --weighting nfsd, which has "
        "no use for --cfg and --teacher-denoise-steps")
    add("--teacher-denoise-steps", type=int, default=1,
        help="DDIM steps to the teacher's target (Table 1f)")
    add("--condition", choices=["none", "label", "image", "both"], default="both",
        help="what the heads are told (Table 1b)")
    add("--tell-call", action=argparse.BooleanOptionalAction, default=True,
        help="tell them which of its calls the student's image is of")
    add("--feature-net", choices=["teacher", "vit", "dinov2"], default="teacher",
        help="what the heads see through: the teacher's encoder; torchvision's ViT-B/16; the "
        "paper's DINOv2 ViT-S/14, by torch.hub, which runs that repository's code")
    add("--feature-noise", type=int, default=250,
        help="with the teacher's encoder: images are noised to a time up to this")
    add("--disc-lr", type=float, help="the heads' peak learning rate")
    add("--r1", type=float, default=1e-3, help="gamma, weight of R1 on the heads' input features")
    add("--cfg", type=float, default=1.0, help="guidance of the teacher; 1: off")
    add("--label-dropout", type=float, default=0.1, help="share of null labels in the teacher's "
        "training; the heads' features, guidance and nfsd need them")


def variant(given):
    """What the name of the default run folder says besides method and data."""
    return ""


def check_method(args):
    if not args.taus or sorted(set(args.taus)) != [*args.taus] or args.taus[-1] != T \
            or args.taus[0] < 1:
        raise UserError(f"--taus {show(args.taus)}: expected rising times from 1 to {T}, the last "
                        f"{T}")
    args.steps = args.steps or tuple(n for n in (1, 2, 4) if n <= len(args.taus))
    for n in args.steps:
        if not 1 <= n <= len(args.taus):
            raise UserError(f"--steps {n}: a student of {len(args.taus)} --taus samples in 1 to "
                            f"{len(args.taus)}")
    expect(args, "teacher_iters teacher_batch", "1 or more", lambda n: 1 <= n < 2 ** 31)
    expect(args, "teacher_steps feature_noise", f"0 to {T}", lambda n: 0 <= n <= T)
    expect(args, "teacher_denoise_steps", f"1 to {T}", lambda n: 1 <= n <= T)
    expect(args, "simulated", "a number from 0 to 1", lambda x: 0 <= x <= 1)
    expect(args, "teacher_lr disc_lr", "a number between 0 and 1", lambda x: 0 < x < 1)
    expect(args, "teacher_ema label_dropout", "a number from 0 to below 1", lambda x: 0 <= x < 1)
    expect(args, "distill_weight adv_weight nfsd_scale r1 cfg", "at least 0",
           lambda x: 0 <= x < math.inf)
    args.nulls = args.label_dropout > 0                     # the teacher knows the null label
    if not args.nulls and (args.cfg != 1 or args.weighting == "nfsd"):
        raise UserError("--cfg, --weighting nfsd: need a teacher that knows the null label; give a "
                        "--label-dropout above 0")
    if args.distill_weight == args.adv_weight == 0:
        raise UserError("--distill-weight 0 --adv-weight 0: nothing is left for the student to "
                        "learn from")


# ---- schedule: alpha and sigma -------------------------------------------------------------------

def vp_schedule():
    """alpha, sigma [T + 1] of the times 0 .. T, alpha^2 + sigma^2 = 1, alpha_T exactly 0.

    DDPM's linear betas, their sqrt(alpha_bar) shifted and scaled so that the last has no signal
    left and the first is as it was (Lin et al. 2023, 2305.08891, Algorithm 1).
    """
    alpha = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha = torch.cat([torch.ones(1, dtype=torch.float64), alpha])
    return alpha.float(), (1 - alpha ** 2).sqrt().float()


def call_times(steps, taus):
    """The times at which a student of so many steps is called, falling: 1000, then evenly down the
    taus (rising)."""
    return [taus[::-1][i * len(taus) // steps] for i in range(steps)]


# ---- the networks --------------------------------------------------------------------------------

class Denoiser(nn.Module):
    """x_hat(x_t, t, y): the image expected behind x_t = alpha_t x0 + sigma_t eps, by v-prediction.

    v = c_skip x_t + c_out net(x_t / S), with S^2 = sigma^2 + (alpha a)^2 the variance of x_t for
    images of variance a^2 (a: EDM's sigma_data): c_skip x_t is the best linear guess of v, c_out
    the deviation of the rest, so that the network's target has variance one at every t (as EDM
    preconditions).

    x [B, 3, R, R]; t [B] int64, 0 .. T; y [B] int64, None: the null class. v, eps: what else the
    network predicts of x_t; encode: its features, a map [B, C, H, W] of each stage.
    """

    def __init__(self, net, alpha, sigma, a=0.5):
        super().__init__()
        self.net, self.a = net, a
        self.register_buffer("alpha", alpha, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)

    def noised(self, x0, t, eps):
        return expand(self.alpha[t]) * x0 + expand(self.sigma[t]) * eps     # expand: [B, 1, 1, 1]

    def S(self, t):
        return (self.sigma[t] ** 2 + (self.alpha[t] * self.a) ** 2).sqrt()

    def v(self, x, t, y):
        S = self.S(t)
        c_skip = self.alpha[t] * self.sigma[t] * (1 - self.a ** 2) / S ** 2
        return expand(c_skip) * x + expand(self.a / S) * self.net(x / expand(S), t / T, y=y)

    def forward(self, x, t, y):
        return expand(self.alpha[t]) * x - expand(self.sigma[t]) * self.v(x, t, y)

    def eps(self, x, t, y):
        return expand(self.sigma[t]) * x + expand(self.alpha[t]) * self.v(x, t, y)

    def encode(self, x, t, y):
        return self.net.encode(x / expand(self.S(t)), t / T, y=y)


class VisionTransformer(nn.Module):
    """A pretrained transformer as feature network: patch tokens after four of its blocks, the class
    token added to each, as maps [B, C, H, W] (StyleGAN-T). Images in [-1, 1]."""

    def __init__(self, name):
        super().__init__()
        try:
            if name == "vit":
                weights = torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1
                self.vit = torchvision.models.vit_b_16(weights=weights)
                blocks = self.vit.encoder.layers
            else:
                self.vit = torch.hub.load("facebookresearch/dinov2", "dinov2_vits14")
                blocks = self.vit.blocks
        except Exception as error:                          # no network, no space, no such file
            raise UserError(f"--feature-net {name}: cannot be had "
                            f"({' '.join(str(error).split())[:120]}); take --feature-net teacher") \
                from None
        self.maps = []
        for i in (2, 5, 8, 11):
            blocks[i].register_forward_hook(lambda module, inputs, tokens: self.maps.append(tokens))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, x):
        x = F.interpolate((x + 1) / 2, (224, 224), mode="bilinear", antialias=True)
        self.maps.clear()
        self.vit((x - self.mean) / self.std)
        tokens = [(t[:, 1:] + t[:, :1]).mT for t in self.maps]
        return [t.unflatten(2, (math.isqrt(t.shape[2]), -1)).float() for t in tokens]


class Head(nn.Module):
    """Features [B, C, H, W], condition [B, E] or None -> logits [B, H, W] (StyleGAN-T's heads)."""

    def __init__(self, channels, condition):
        super().__init__()
        sn = nn.utils.parametrizations.spectral_norm
        unit = lambda size: nn.Sequential(
            sn(nn.Conv2d(channels, channels, size, padding="same", padding_mode="circular")),
            nn.LeakyReLU(0.2))
        self.first, self.residual = unit(1), unit(3)
        self.out = sn(nn.Conv2d(channels, 64 if condition else 1, 1))
        self.project = nn.Linear(condition, 64) if condition else None

    def forward(self, h, c):
        h = self.first(h)
        h = self.out((h + self.residual(h)) / math.sqrt(2))
        if self.project is not None:
            h = (h * self.project(c)[:, :, None, None]).sum(1, keepdim=True) / math.sqrt(64)
        return h[:, 0].float()


class Discriminator(nn.Module):
    """A head for each of the frozen network's feature maps, told the label and what x0 was.

    channels: of the maps. condition: none, label, image or both. c_img: the embedding of x0
    [B, C_last]; where `known` [B] is False a learned vector stands in its place. calls: the heads
    are also told which of so many calls the student's image is of, `call` [B], or the one that a
    real image is compared with; 0: they are not.
    """

    def __init__(self, channels, num_classes, condition, calls=0):
        super().__init__()
        label, image = condition in ("label", "both"), condition in ("image", "both")
        self.call = nn.Embedding(calls, 64) if calls else None
        self.label = nn.Embedding(num_classes + 1, 64) if label else None
        self.image = nn.Sequential(nn.LayerNorm(channels[-1], elementwise_affine=False),
                                   nn.Linear(channels[-1], 64)) if image else None
        self.unknown = nn.Parameter(torch.randn(64)) if image else None
        told = label + image + (calls > 0)
        self.heads = nn.ModuleList(Head(c, 64 * told) for c in channels)

    def forward(self, features, y, c_img, known, call):
        c = [] if self.label is None else [self.label(y)]
        if self.call is not None:
            c.append(self.call(call))
        if self.image is not None:
            c.append(torch.where(known[:, None], self.image(c_img), self.unknown))
        c = torch.cat(c, 1) if c else None
        return [head(f, c) for head, f in zip(self.heads, features)]


# ---- losses --------------------------------------------------------------------------------------
# x0 real images in [-1, 1], x_hat the student's, eps noise, all [B, 3, R, R]; t, y [B] int64, a
# label of None is the null class; logits: of each head [B, H, W]. Losses are means over the batch,
# and over all elements of an image or a map of logits; the heads' are added up: scalars.

def guided(teacher, x, t, y, cfg_scale=1.0):
    """v of the teacher with classifier-free guidance; 1: off."""
    v = teacher.v(x, t, y)
    if cfg_scale == 1:
        return v
    v_null = teacher.v(x, t, None)
    return v_null + cfg_scale * (v - v_null)


def teacher_loss(teacher, x0, t, eps, y):
    """|v_hat - (alpha_t eps - sigma_t x0)|^2, t uniform in 1 .. T (Salimans and Ho, 2202.00512)."""
    v = expand(teacher.alpha[t]) * eps - expand(teacher.sigma[t]) * x0
    return (teacher.v(teacher.noised(x0, t, eps), t, y) - v).square().mean()


def adversarial_loss(logits_fake):
    """Eq. 2: the student's hinge loss, over all heads."""
    return sum(-logits.mean() for logits in logits_fake)


def discriminator_loss(logits_real, logits_fake):
    """Eq. 3 without R1: the heads' hinge loss."""
    return sum(F.relu(1 - real).mean() + F.relu(1 + fake).mean()
               for real, fake in zip(logits_real, logits_fake))


def r1_penalty(logits_real, features):
    """R1 of Eq. 3: |d D_k / d F_k|^2, of each head at its own input features of real images; a
    head's logits are added up over the places, a mean over the batch."""
    total = sum(logits.sum() for logits in logits_real)
    grads = torch.autograd.grad(total, features, create_graph=True)
    return sum(g.square().sum((1, 2, 3)).mean() for g in grads)


def c_of_t(weighting, alpha, sigma):
    """c(t) of Eq. 4, from alpha and sigma at t. exponential: alpha. sds: alpha w / (2 sigma) with
    w = sigma^2, which makes Eq. 4's gradient that of score distillation sampling,
    w (eps_hat - eps) (appendix A)."""
    w = sigma ** 2
    return dict(exponential=alpha, sds=alpha * w / (2 * sigma))[weighting]


def distillation_loss(teacher, x_hat, t, eps, y, c, steps=1, cfg_scale=1.0):
    """Eq. 4. The teacher sees the student's image noised afresh, and is a constant target.

    c [B]: the weighting at t. steps: DDIM steps from t to the target (Table 1f).
    """
    with torch.no_grad():
        x_t = teacher.noised(x_hat, t, eps)
        # x_hat_psi: one step of DDIM down to 0 is (x_t - sigma_t eps_hat) / alpha_t.
        target = ddim(teacher, x_t, t, y, steps, cfg_scale)
    return (expand(c) * (x_hat - target).square()).mean()   # Eq. 4


def nfsd_loss(teacher, x_hat, t, eps, y, y_other, scale):
    """Noise-free score distillation (Katzir et al., 2310.17590, Eq. 6): the gradient is
    w (delta_D + s delta_C), in which the added noise eps is not subtracted. y_other [B]: the
    negative prompts; scale: s."""
    with torch.no_grad():
        x_t, sigma = teacher.noised(x_hat, t, eps), expand(teacher.sigma[t])
        eps_y, eps_null, eps_other = (teacher.eps(x_t, t, label) for label in (y, None, y_other))
        delta_C = eps_y - eps_null
        delta_D = torch.where(expand(t < 0.2 * T), eps_null, eps_null - eps_other)
        target = x_hat - sigma ** 2 * (delta_D + scale * delta_C)
    return 0.5 * (x_hat - target).square().mean()


# ---- samplers ------------------------------------------------------------------------------------

def simulated(student, noise, y, k, taus):
    """Backward simulation (DMD2, section 4.5): what the student's call number k sees, its own image
    of call k - 1, noised afresh; call 0 sees noise. The sampler is the same lines.

    noise: callable -> fresh noise [B, 3, R, R]. k [B] int64, on the CPU: images may be at different
    calls. taus: the times of all calls, falling.
    """
    x = noise().clone()                                     # it stays as the caller has it
    for i in range(int(k.max())):
        rows = (k > i).nonzero()[:, 0].to(x.device, non_blocking=True)  # another call is to come
        tau, tau_next = (torch.full(rows.shape, t, device=x.device) for t in taus[i:i + 2])
        x[rows] = student.noised(student(x[rows], tau, y[rows]), tau_next, noise()[rows])
    return x                                                                    # [B, 3, R, R]


@torch.no_grad()
def sample(student, noise, y, taus):
    """Images of labels y [B], in len(taus) calls of the student."""
    x = simulated(student, noise, y, torch.full(y.shape, len(taus) - 1, device="cpu"), taus)
    return student(x, torch.full_like(y, taus[-1]), y)


@torch.no_grad()
def ddim(teacher, x, t, y, steps, cfg_scale=1.0):
    """From x_t at times t [B], 1 .. T, to images, in equal steps of time, to rounding (Song et al.,
    2010.02502): the teacher's sampler and, of the student's image, noised, the target."""
    for i in range(steps):
        now, then = t - t * i // steps, t - t * (i + 1) // steps
        v = guided(teacher, x, now, y, cfg_scale)
        # (x - sigma eps) / alpha, but also where alpha is 0.
        x0 = expand(teacher.alpha[now]) * x - expand(teacher.sigma[now]) * v
        eps = expand(teacher.sigma[now]) * x + expand(teacher.alpha[now]) * v
        x = teacher.noised(x0, then, eps)
    return x


# ---- common to add.py and dmd2.py ----------------------------------------------------------------

def norm(gradient):
    """The norm over all processes' images of a gradient, of a loss that is a mean over them."""
    return fid.total(gradient.square().sum()).sqrt() / fid.processes()[1]


def moments(x):
    """Mean and standard deviation of all processes' images."""
    mean, square = fid.gather(torch.stack([x.mean(), x.square().mean()])).mean(0)
    return dict(mean=mean, std=(square - mean ** 2).clamp(min=0).sqrt())


def load_teacher(folder, teacher_ema, run, nulls):
    """The teacher in another run's folder. nulls: it must know the null label."""
    try:
        stored = stored_args(pathlib.Path(folder))
        if not stored:
            raise UserError(f"holds no run of {METHOD}.py; give the folder of one")
        for name in ("resolution", "channels", "mult", "blocks", "attention"):
            if stored[name] != getattr(run.args, name):
                raise UserError(f"was trained with --{name} {show(stored[name])}, not "
                                f"{show(getattr(run.args, name))}; give that here too")
        if nulls and not stored["nulls"]:
            raise UserError("was trained without null labels; train it with the same --cfg and "
                            "--label-dropout")
        state = read_checkpoint(pathlib.Path(folder))[0]
        if not stored["teacher"] and state["step"] < stored["teacher_iters"]:
            raise UserError(f"its training stands at {state['step']} of {stored['teacher_iters']}; "
                            "go on with that first")
        if state["data"] != run.data:
            raise UserError("is of other data")
        teacher_ema.load_state_dict(state["teacher_ema"])
    except Exception as error:                              # torch raises all sorts on a bad file
        why = error if isinstance(error, UserError) else f"cannot be read: {error!r}"
        why = " ".join(str(why).removeprefix(f"{folder}: ").split())[:200]
        why = why.partition("; give another --out")[0]
        raise UserError(f"--teacher {folder}: {why}") from None


# ---- training ------------------------------------------------------------------------------------

def rewind(disc, buffers):
    """Spectral norm iterates its vectors with each call: micro-batches begin at the same ones."""
    for now, then in zip(disc.buffers(), buffers):
        now.copy_(then)


def draw(run, student, teacher, y, name):
    """A picture of the training so far, of fixed noise: the student's images in one call and in
    all, and what the teacher makes of the first once noised to t = 500."""
    y, noise = y.to(run.device), noise_of(range(10), run.args, run.device)
    x_hat = sample(student, noise, y, [T])
    refined = sample(student, noise_of(range(10), run.args, run.device), y,
                     call_times(len(run.args.taus), run.args.taus))
    t = torch.full_like(y, T // 2)
    target = ddim(teacher, teacher.noised(x_hat, t, noise()), t, y, 1, run.args.cfg)
    save_grid(run, name, to_uint8(torch.cat([x_hat, refined, target])).cpu())


def main(argv=None):
    args = parse_args(argv)
    device, autocast = set_up(args)
    images = fid.load_images(args.data, args.resolution)
    scorer, null_class = Scorer(args, device, images), len(images.classes)
    if args.cfg != 1 and not images.classes:
        raise UserError(f"--cfg {args.cfg}: {images.name} has no classes to guide to")
    if args.weighting == "nfsd" and null_class < 2:
        raise UserError(f"--weighting nfsd: {images.name} has no other class to guide away from")
    if null_class and not args.nulls and args.adv_weight and args.feature_net == "teacher":
        raise UserError("--label-dropout 0: the heads see through the teacher's encoder with the "
                        "null label, which it must know; give more, or another --feature-net")
    pixels, labels = images.pixels, images.labels.to(device)
    if pixels.numel() < 2 ** 31:                            # more than 2 GB stay where they are
        pixels = pixels.to(device)

    torch.manual_seed(args.seed)
    teacher, student = (
        Denoiser(UNet(args.resolution, args.channels, args.mult, args.blocks, args.attention,
                      null_class, dropout=args.dropout, checkpoint=args.checkpoint_activations),
                 *vp_schedule())
        .to(device, memory_format=torch.channels_last) for _ in range(2))
    widths = dict(teacher=[args.channels * m for m in args.mult], vit=4 * [768], dinov2=4 * [384])
    disc = Discriminator(widths[args.feature_net], null_class, args.condition,
                         len(args.taus) * args.tell_call).to(device)
    norms = nn.ModuleList(nn.BatchNorm2d(width, affine=False, momentum=None)    # None: plain mean
                          for width in widths[args.feature_net]).to(device).eval()
    teacher_ema = AveragedModel(teacher, multi_avg_fn=get_ema_multi_avg_fn(args.teacher_ema))
    student_ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    for net in (teacher_ema, student, student_ema):         # from here on: no dropout
        net.eval()
    psi = teacher_ema.module.requires_grad_(False)
    adam = lambda params, lr, beta1=0.0, decay=0.01: torch.optim.AdamW(
        params, lr, (beta1, 0.99), weight_decay=decay, fused=True)
    opt_teacher = adam(teacher.parameters(), args.teacher_lr, 0.9)
    opt_student = adam(student.parameters(), args.lr)       # no momentum: two players (StyleGAN-T)
    opt_disc = adam(disc.parameters(), args.disc_lr, decay=0.0)
    schedule_teacher = warmup_cosine(opt_teacher, args.teacher_iters)
    schedule_student, schedule_disc = (warmup_cosine(opt, args.iters, end=0.1)
                                       for opt in (opt_student, opt_disc))
    run = Run(args, device, images, dict(
        teacher=teacher, teacher_ema=teacher_ema, opt_teacher=opt_teacher,
        schedule_teacher=schedule_teacher, student=student, student_ema=student_ema,
        opt_student=opt_student, schedule_student=schedule_student, disc=disc, opt_disc=opt_disc,
        schedule_disc=schedule_disc, norms=norms))
    if args.teacher and not run.step:
        load_teacher(args.teacher, teacher_ema, run, args.nulls)
    begin = 0 if args.teacher else args.teacher_iters       # the step where phase 2 begins
    end = begin + args.iters
    trains = run.step < end                                 # if not, it is only sampled
    teacher_steps = args.teacher_steps
    if teacher_steps is None:                               # once, after the training
        teacher_steps = 0 if (run.folder / "teacher-32step.png").exists() else 32
    if args.compile:
        torch._dynamo.config.suppress_errors = True         # without a compiler: go on uncompiled
        torch._dynamo.config.recompile_limit = 64           # not 8: all nets are of one code
        for net in (teacher.net, psi.net, student.net, student_ema.module.net):
            net.encode, net.decode = torch.compile(net.encode), torch.compile(net.decode)
    vit = None
    if args.feature_net != "teacher" and trains:
        with fid.first_alone():
            vit = VisionTransformer(args.feature_net).to(device).eval().requires_grad_(False)

    def extract(x0, t, eps):
        """The frozen network's feature maps, float; the teacher's encoder sees images at time t.
        Each channel has deviation 5 over real images: about that of the encoder's own on `shapes`,
        for which the rates are."""
        maps = vit(x0) if vit else psi.encode(psi.noised(x0, t, eps), t, None)
        return [5 * standardise(h.float()) for standardise, h in zip(norms, maps)]

    def teach(noise, y, steps):
        with autocast:
            return ddim(psi, noise(), torch.full_like(y, T), y, steps, args.cfg)

    def sampler(net):
        def generate(noise, y, steps):
            with autocast:
                return sample(net, noise, y, call_times(steps, args.taus))
        return generate

    # Phase 1: the teacher.
    for step in run.steps(begin, "teacher", args.teacher_batch):
        x0, y = draw_batch(pixels, labels, args.teacher_batch, args.flip)
        if args.nulls:
            drop = torch.rand(len(y), device=device) < args.label_dropout
            y = torch.where(drop, null_class, y)
        t = torch.randint(1, T + 1, (len(y),), device=device)
        eps = torch.randn_like(x0)
        for rows in slices(args, step):
            with autocast:
                loss = teacher_loss(teacher, x0[rows], t[rows], eps[rows], y[rows])
            (loss / args.accumulate).backward()
            run.add(loss_teacher=loss.detach())
        run.add(grad_norm=update(opt_teacher, schedule_teacher))
        teacher_ema.update_parameters(teacher)
        if (step + 1) % max(1, args.teacher_iters // 5) == 0:
            y = scorer.columns.to(device)
            x0 = teach(noise_of(range(10), args, device), y, teacher_steps or 32)
            save_grid(run, f"progress/teacher-{step + 1:07d}.png", to_uint8(x0).cpu())
    if run.step == begin:
        if args.student_init == "teacher":
            student.load_state_dict(psi.state_dict())
        torch.manual_seed(args.seed)
        norms.train()                                       # 1024 real images: then it is fixed
        for _ in range(16 if args.adv_weight else 0):
            x0, _ = draw_batch(pixels, labels, 64, args.flip)
            t_F = torch.randint(args.feature_noise + 1, (64,), device=device)
            with autocast, torch.no_grad():
                extract(x0, t_F, torch.randn_like(x0))
        norms.eval()

    # Phase 2: the student and the heads, an update of each.
    taus = call_times(len(args.taus), args.taus)
    tau_of = torch.tensor(taus, device=device)
    for step in run.steps(end, "distillation", args.batch):
        x0, y = draw_batch(pixels, labels, args.batch, args.flip)
        k = torch.randint(len(taus), y.shape)               # on the CPU, which asks how many are
        call = k.to(device, non_blocking=True)              # at a call: a GPU's would be waited for
        s = tau_of[call]                                    # uniform over the taus
        eps_s = torch.randn((len(taus), *x0.shape), device=device)      # of each call
        x_s = student.noised(x0, s, eps_s[0])
        own = round(args.simulated * len(y))                # how many, the first, are `simulated`
        for rows in slices(args):
            first = slice(rows.start, own, rows.step)
            if len(y[first]):
                draws = iter(eps_s[:, first])
                with torch.no_grad(), autocast:
                    x_s[first] = simulated(student, lambda: next(draws), y[first], k[first], taus)
        known = s < T                                       # where x_s shows x0: c_img is told
        known[:own] = False
        if args.adv_weight:
            t_F = torch.randint(args.feature_noise + 1, y.shape, device=device)
            eps_fake, eps_real = torch.randn_like(x0), torch.randn_like(x0)
        if args.distill_weight:
            t, eps = torch.randint(1, T, y.shape, device=device), torch.randn_like(x0)
            if args.weighting == "nfsd":
                other = (y + torch.randint(1, null_class, y.shape, device=device)) % null_class

        def student_pass(rows):
            with autocast:
                x_hat = student(x_s[rows], s[rows], y[rows])
                leaf = x_hat.detach().requires_grad_()
                return x_hat, leaf, (extract(leaf, t_F[rows], eps_fake[rows])
                                     if args.adv_weight else None)

        # The heads. Their features are of a frozen network: one pass serves both updates, unless
        # there are micro-batches, of which memory holds one.
        parts, conditions = [*slices(args)], []
        vectors = [b.clone() for b in disc.buffers()]       # of spectral norm
        for rows in parts if args.adv_weight else ():
            rewind(disc, vectors)
            with torch.set_grad_enabled(len(parts) == 1):
                x_hat, leaf, fake = student_pass(rows)
            with autocast, torch.no_grad():
                real = extract(x0[rows], t_F[rows], eps_real[rows])
                clean = x0[rows], torch.zeros_like(y[rows]), torch.zeros_like(x0[rows])     # t = 0
                c_img = real if vit or disc.image is None else extract(*clean)
            conditions.append((y[rows], c_img[-1].mean((2, 3)), known[rows], call[rows]))
            real = [f.requires_grad_() for f in real]
            with autocast:
                logits_real = disc(real, *conditions[-1])
                logits_fake = disc([f.detach() for f in fake], *conditions[-1])
            loss_disc = discriminator_loss(logits_real, logits_fake)
            penalty = r1_penalty(logits_real, real) if args.r1 else 0 * loss_disc
            ((loss_disc + args.r1 * penalty) / args.accumulate).backward()
            with torch.no_grad():
                mean = lambda logits: sum(l.mean() for l in logits) / len(logits)
                run.add(loss_disc=loss_disc.detach(), r1=penalty.detach(),
                        d_real=mean(logits_real), d_fake=mean(logits_fake))
        if args.adv_weight:
            run.add(grad_norm_disc=update(opt_disc, schedule_disc))

        vectors = [b.clone() for b in disc.buffers()]
        for i, rows in enumerate(parts):
            rewind(disc, vectors)
            if len(parts) > 1 or not args.adv_weight:
                x_hat, leaf, fake = student_pass(rows)
            grad_adv = grad_distill = torch.zeros_like(leaf)
            if args.adv_weight:
                with autocast:
                    loss_adv = adversarial_loss(disc(fake, *conditions[i]))
                grad_adv = args.adv_weight * torch.autograd.grad(loss_adv, leaf)[0]
                run.add(loss_adv=loss_adv.detach())
            if args.distill_weight:
                part = t[rows], eps[rows], y[rows]
                with autocast:
                    if args.weighting == "nfsd":
                        loss_distill = nfsd_loss(psi, leaf, *part, other[rows], args.nfsd_scale)
                    else:
                        c = c_of_t(args.weighting, psi.alpha[t[rows]], psi.sigma[t[rows]])
                        loss_distill = distillation_loss(psi, leaf, *part, c,
                                                         args.teacher_denoise_steps, args.cfg)
                grad_distill = args.distill_weight * torch.autograd.grad(loss_distill, leaf)[0]
                run.add(loss_distill=loss_distill.detach())
            # Eq. 1: both gradients at the student's images, to be watched there, then one pass.
            x_hat.backward((grad_adv + grad_distill) / args.accumulate)
            del x_hat, fake
            run.add(grad_adv=norm(grad_adv), grad_distill=norm(grad_distill),
                    **moments(leaf.detach()))
        run.add(grad_norm=update(opt_student, schedule_student))
        student_ema.update_parameters(student)
        done = step + 1 - begin
        if done % max(1, args.iters // 10) == 0:
            with autocast:
                draw(run, student_ema.module, psi, scorer.columns, f"progress/{step + 1:07d}.png")
        if args.score_every and done % args.score_every == 0 and done < args.iters:
            evaluate(run, scorer, sampler(student_ema.module), args.steps, "student ema",
                     f"progress/{step + 1:07d}")

    if teacher_steps:
        evaluate(run, scorer, teach, [teacher_steps], "teacher ema", "teacher",
                 lambda n: n if args.cfg == 1 else 2 * n)
    evaluate(run, scorer, sampler(student), args.steps, "student", "raw")
    evaluate(run, scorer, sampler(student_ema.module), args.steps, "student ema")


# ---- common: arguments ---------------------------------------------------------------------------

# From here to the end add.py, dmd2.py and shortcut.py have one text: what any run needs.

KINDS = "shapes cifar10 folder imagenet64".split()      # the columns of PRESETS
# The options that may differ from call to call of one run.
FREE = ("steps teacher_steps samples score_every labels features inception device compile "
        "accumulate checkpoint_activations npz out").split()
CHECKPOINTS = "checkpoint.pt", "checkpoint-previous.pt"


def numbers(text):
    try:
        return () if text == "none" else tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers, as 1,2,4") from None


def show(value):
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def expect(args, names, what, fits):
    """Refuse options whose values do not fit; where none is given (None), nothing is wrong."""
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise UserError(f"--{name.replace('_', '-')} {show(value)}: expected {what}")


def parse_args(argv=None):
    """What was given, over what an existing run was trained with, over the data set's preset."""
    parser = argparse.ArgumentParser(prog=f"{METHOD}.py", description=__doc__.partition("\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error, defaults = fid.refuse, {}

    def add(flag, default=None, help="", **kwargs):
        name = flag[2:].replace("-", "_")
        defaults[name] = PRESETS.get(name, (default,) * len(KINDS))
        if name in PRESETS:
            columns = zip(KINDS, PRESETS[name])
            help += " [" + ", ".join(f"{show(v) or 'none'} ({kind})" for kind, v in columns) + "]"
        elif default is not False and default not in (None, ()):
            help += f" [{show(default)}]"
        parser.add_argument(flag, help=help.replace("%", "%%"), **kwargs)

    add("--steps", type=numbers, default=STEPS, help="sampling steps (NFE), a comma list")
    add("--data", default="shapes", help="shapes, cifar10, a folder of images (subfolders are "
        "classes), or one of downsampled-ImageNet train_data_batch_*.npz")
    add("--preset", choices=KINDS, help="which data's defaults to take [those of --data]; shapes: "
        "a network and a training for a CPU")
    add("--out", help=f"run folder [runs/{METHOD}-DATA]")
    add("--iters", type=int, help="length of the training, of its last phase")
    add("--batch", type=int, help="images per update, of all processes together")
    add("--accumulate", type=int, default=1, help="micro-batches to an update, to save memory")
    add("--checkpoint-activations", action="store_true", default=False,
        help="compute them twice, to save more memory")
    add("--lr", type=float, help="peak learning rate")
    add("--ema", type=float, help="decay of the running mean of the weights")
    add("--seed", type=int, default=0, help="of the weights, the training and the samples")
    add("--device", default="auto", help="cpu, cuda, mps")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"],
        help="auto: bf16 where the hardware is fast at it")
    add("--compile", action="store_true", default=False, help="torch.compile the networks")
    add("--samples", type=int, help="images to score at each of --steps; 0: pictures only")
    add("--score-every", type=int, default=0,
        help="score also every so many updates of the last phase; 0: never")
    add("--labels", help="classes to draw, a comma list of names or numbers")
    add("--features", choices=["auto", "inception", "random"],
        help="what to score with; auto: inception where its weights can be had")
    add("--inception", help="path of the Inception weights")
    add("--npz", action="store_true", default=False, help="keep the samples as samples-Nstep.npz")
    add("--resolution", type=int, help="side of the images")
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror training images at random")
    add("--channels", type=int, help="width of the network's first stage, a multiple of 16")
    add("--mult", type=numbers, help="width of each stage, in --channels; each halves the side")
    add("--blocks", type=numbers, help="residual blocks of each stage")
    add("--attention", type=numbers, help="resolutions with self-attention, or none")
    add("--dropout", type=float, help="in the residual blocks")
    method_options(add)
    given = vars(parser.parse_args(argv))

    if given.get("data", "shapes") not in KINDS[:2]:                # imgs, imgs/ and ./imgs are one
        path = str(pathlib.Path(given["data"]))
        given["data"] = f"./{path}" if path in KINDS[:2] else path
    name = pathlib.Path(given.get("data", "shapes")).resolve().name
    folder = pathlib.Path(given.get("out") or f"runs/{METHOD}-{name}{variant(given)}")
    stored = stored_args(folder)
    kind = fid.kind_of(given.get("data", stored.get("data", "shapes")))
    preset = given.get("preset") or stored.get("preset") or kind
    if stored and given.get("precision") == "auto":         # what it came to is stored
        del given["precision"]
    args = {name: values[KINDS.index(preset)] for name, values in defaults.items()}
    args |= dict(preset=kind) | {n: v for n, v in stored.items() if n not in FREE}
    for name, value in given.items():
        if stored and name not in FREE and args[name] != value:
            raise UserError(f"{folder}: was trained with --{name.replace('_', '-')} "
                            f"{show(args[name])}, not {show(value)}; give another --out")
    args = argparse.Namespace(**args | given | dict(out=str(folder), method=METHOD))

    expect(args, "iters batch accumulate", "1 or more", lambda n: 1 <= n < 2 ** 31)
    expect(args, "samples score_every seed", "0 or more", lambda n: 0 <= n < 2 ** 31)
    expect(args, "resolution", "8 or more", lambda n: 8 <= n < 2 ** 31)
    expect(args, "channels", "a multiple of 16", lambda n: 16 <= n < 2 ** 31 and n % 16 == 0)
    expect(args, "lr", "a number between 0 and 1", lambda x: 0 < x < 1)
    expect(args, "ema dropout", "a number from 0 to below 1", lambda x: 0 <= x < 1)
    if given.get("inception"):
        if given.get("features") == "random":
            raise UserError("--inception: is of no use with --features random")
        args.features = "inception"
    if args.samples == 1:
        raise UserError("--samples 1: has no covariance; give 0, or at least 2")
    if len(args.mult) != len(args.blocks) or min(args.mult + args.blocks, default=0) < 1:
        raise UserError("--mult and --blocks: expected as many numbers, each at least 1")
    if args.resolution % 2 ** (len(args.mult) - 1):
        raise UserError(f"--resolution {args.resolution}: cannot be halved {len(args.mult) - 1} "
                        "times, once between two stages of --mult")
    stages = [args.resolution >> i for i in range(len(args.mult))]
    wrong = [side for side in args.attention if side not in stages]
    if wrong and not stored and "attention" not in given:   # the preset's, of other stages
        args.attention = (stages[-1],)
    elif wrong:
        raise UserError(f"--attention {wrong[0]}: no stage has that resolution; expected some of "
                        f"{show(stages)}, or none")
    check_method(args)
    if not args.steps:
        raise UserError("--steps: needs a number")
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("batch",) if getattr(args, "teacher", None) else ("batch", "teacher_batch"):
        if getattr(args, name, 0) % (world * args.accumulate):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a "
                            f"multiple of {world} processes x --accumulate {args.accumulate}")
    return args


def stored_args(folder):
    """The arguments of the run in a folder; {} where none has got as far as a checkpoint."""
    path = folder / "args.json"
    try:
        if not path.exists():
            ours = "progress", "pairs.npz", ".pairs.npz", ".args.json"      # of a start that failed
            if folder.is_dir() and any(p.name not in ours for p in folder.iterdir()):
                raise UserError(f"--out {folder}: is no run folder and not empty; give another")
            return {}
        stored = json.loads(path.read_text())["args"]
        stored = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give another --out") from None
    if stored.get("method") != METHOD:
        raise UserError(f"{folder}: holds a run of {stored.get('method')}.py; give another --out")
    return stored if any((folder / name).exists() for name in CHECKPOINTS) else {}


def set_up(args):
    """-> the device, and the autocast context that networks run in. Settles args.precision.

    Under torchrun, joins its processes: each has a device and a part of every batch of its own.
    """
    device = fid.pick_device(args.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"torchrun: its processes cannot share {device}; give --device cpu")
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # An hour: one may download, write or score. One that is killed is missed at once.
            distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else
                                           "gloo", timeout=datetime.timedelta(hours=1))
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:120]
            raise UserError(f"torchrun: processes cannot be joined on {device} ({why})") from None
        if fid.processes()[0]:
            sys.stdout = open(os.devnull, "w")              # process 0 speaks for all
    if args.precision == "auto":
        has = lambda what: getattr(torch.cpu, f"_is_{what}_supported", lambda: False)()
        fast = dict(cpu=has("amx_tile") or has("avx512_bf16"),
                    cuda=device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8)
        args.precision = "bf16" if fast.get(device.type) else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def expand(t):
    return t[:, None, None, None]                                           # [B] -> [B, 1, 1, 1]


def draw_batch(pixels, labels, n, flip):
    """n random images [n, 3, R, R] in [-1, 1], mirrored at random if `flip`, and their labels [n];
    on the device of `labels` [N], wherever the `pixels` [N, 3, R, R] are."""
    i = torch.randint(len(pixels), (n,), device=labels.device)
    x = from_uint8(pixels[i.to(pixels.device)].to(labels.device))
    if flip:
        x = torch.where(expand(torch.rand(n, device=x.device) < 0.5), x.flip(3), x)
    return x, labels[i]


def slices(args, step=None):
    """The rows of a batch that are this process's: a slice for each micro-batch.

    All processes draw the same batch, noise and all, so that how it is shared out does not matter.
    step: given where there is dropout, which must differ from slice to slice.
    """
    (rank, world), seed = fid.processes(), args.seed * 1_000_003
    parts = world * args.accumulate
    for part in range(rank, parts, world):
        if step is not None and parts > 1:
            torch.manual_seed((seed + step) * parts + part)
        yield slice(part, None, parts)


def update(opt, schedule=None):
    """An update by the gradients so far: their mean over all processes, clipped at norm 1.
    -> the norm before."""
    params = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    world = fid.processes()[1]
    if world > 1:                                           # in one message
        flat = fid.total(torch.cat([p.grad.flatten() for p in params])) / world
        for p, mean in zip(params, flat.split([p.numel() for p in params])):
            p.grad.copy_(mean.view_as(p))
    grad_norm = nn.utils.clip_grad_norm_(params, 1.0)
    opt.step()
    opt.zero_grad()
    if schedule:
        schedule.step()
    return grad_norm


def warmup_cosine(opt, iters, end=0.0):
    """The learning rate over a training: up for 100 steps or a tenth, then down to `end` of it."""
    def rate(i):
        up = min(1, (i + 1) / min(100, iters // 10 + 1))
        down = (1 + math.cos(math.pi * min(1, i / iters))) / 2
        return up * (end + (1 - end) * down)
    return torch.optim.lr_scheduler.LambdaLR(opt, rate)


# ---- common: the run folder ----------------------------------------------------------------------

def read_checkpoint(folder):
    """-> a run's newest checkpoint that can be read, its path, and what is wrong with a newer."""
    wrong = None
    for path in (folder / name for name in CHECKPOINTS):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state["method"], state["step"], state["data"]
            return state, path, wrong
        except FileNotFoundError:                           # killed between two renamings
            continue
        except Exception as error:                          # torch raises all sorts on a bad file
            wrong = wrong or f"{path}: does not load: {' '.join(repr(error).split())[:200]}"
            if isinstance(error, OSError) or fid.out_of_memory(error):
                break                                       # nothing is wrong with the file
    raise UserError(f"{wrong}; give another --out, or move the checkpoints away to train anew")


class Run:
    """A run folder: arguments, log, checkpoint and pictures, and the signals that end a run.

    modules: by name, all that a resumed training must find as it was. There is no random state to
    keep: each step seeds the generators by (seed, step).
    """

    def __init__(self, args, device, images, modules):
        self.args, self.device, self.modules = args, device, modules
        self.folder, self.step, self.training, self.signal = pathlib.Path(args.out), 0, False, None
        self.data = [len(images.labels), *images.classes]   # another data set is another run
        self.sums, self.rows, self.counts = {}, [], {}      # counts: further columns of the log
        self.seconds = 0.0                                  # of training, until the last row
        if any((self.folder / name).exists() for name in CHECKPOINTS):
            self.load()
            print(f"{self.folder}: {self.step} updates are done", flush=True)
        if fid.gather(torch.tensor(self.step)).unique().numel() > 1:
            raise UserError(f"--out {args.out}: is not one folder for all processes")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def make(self):
        """The folder; not before there is something to keep."""
        try:
            (self.folder / "progress").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.args.out}: cannot be made ({error.strerror})") from None

    def on_signal(self, number, frame):
        """Training ends after its step, anything else now; the same signal again ends that as well.
        (torchrun answers Ctrl-C with a SIGTERM, which must not.)"""
        signal.signal(number, signal.SIG_DFL)
        self.signal = number
        if not self.training:
            kept = "; the training is kept, the same command uses it" * (self.step > 0)
            print(f"\nstopped{kept}")
            sys.exit(128 + number)

    def write(self, name, write):
        """Write a file by write(path), under a temporary name: whole or not at all.

        Process 0 does, and the others wait. Of checkpoints the last is kept too: wherever a kill
        comes between the lines, one of the two is there and whole.
        """
        path = self.folder / name
        temporary = path.with_name(f".{path.name}")     # keeps the ending, which says the format
        try:
            if fid.processes()[0] == 0:
                write(temporary)
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                if name == CHECKPOINTS[0] and path.exists():
                    os.replace(path, self.folder / CHECKPOINTS[1])
                os.replace(temporary, path)
        except (OSError, RuntimeError) as error:        # torch.save: RuntimeError on a full disk
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise UserError(f"{path}: cannot be written ({' '.join(str(error).split())}); "
                            "what was there is kept") from None
        fid.gather(torch.zeros(1))

    def save(self):
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= dict(method=METHOD, step=self.step, data=self.data)
        self.write(CHECKPOINTS[0], lambda path: torch.save(state, path))

    def load(self):
        state, path, wrong = read_checkpoint(self.folder)
        try:
            if state["method"] != METHOD:
                raise UserError(f"is of {state['method']}.py")
            if state["data"] != self.data:
                raise UserError(f"is of other data: {state['data'][0]} images, now {self.data[0]}, "
                                f"{len(state['data']) - 1} classes, now {len(self.data) - 1}, "
                                "or other names of classes")
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.step = state["step"]
            if wrong and fid.processes()[0] == 0:
                os.replace(self.folder / CHECKPOINTS[0], self.folder / "checkpoint-broken.pt")
                print(f"{wrong}; it is now checkpoint-broken.pt, and {path.name}, of step "
                      f"{self.step}, is used", flush=True)
        except Exception as error:                          # torch raises all sorts on a bad file
            if fid.out_of_memory(error):
                raise                                       # nothing is wrong with the file
            why = error if isinstance(error, UserError) else f"does not load: {error!r}"
            raise UserError(f"{path}: {' '.join(str(why).split())[:200]}; "
                            "give another --out, or move the checkpoints away to train anew"
                            ) from None

    def begin(self, what, end):
        """Before the first step of a process: record it, and cut log and scores back to it."""
        self.make()
        self.lock = contextlib.nullcontext()
        try:
            self.lock = open(self.folder / "progress" / "lock", "w")
            if fcntl and fid.processes()[0] == 0:           # until it is closed
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is training there; wait for it, or "
                            "give another --out") from None
        except OSError:                                     # a file system without locks
            pass
        try:
            git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True,
                                 text=True, cwd=pathlib.Path(__file__).parent).stdout.strip()
        except OSError:                                     # no git on this machine
            git = ""
        cuda = self.device.type == "cuda"
        hardware = torch.cuda.get_device_name(self.device) if cuda else \
            f"{platform.machine()} {self.device}, {torch.get_num_threads()} threads"
        if fid.processes()[1] > 1:
            hardware = f"{fid.processes()[1]} x {hardware}"
        about = dict(args=vars(self.args), command=sys.argv, git=git, hardware=hardware,
                     python=platform.python_version(), torch=torch.__version__)
        self.write("args.json", lambda path: path.write_text(json.dumps(about, indent=1)))
        self.rows, scores = ([row for row in self.read_csv(name) if int(row["step"]) <= self.step]
                             for name in ("log.csv", "scores.csv"))
        if scores or (self.folder / "scores.csv").exists():
            self.write_csv("scores.csv", scores)
        self.seconds = float(self.rows[-1].get("seconds") or 0) if self.rows else 0.0
        count, *classes = self.data
        print(f"{what}: {'going on' if self.step else 'begins'} at step {self.step} of {end} in "
              f"{self.folder} ({count} images, {len(classes) or 'no'} classes; {hardware}, "
              f"{self.args.precision})", flush=True)

    def steps(self, end, what, images):
        """Yield the steps up to `end`; after each keep what is due, and stop if a signal came.

        One counter runs through all phases of a training. images: how many a step takes.
        """
        if self.step >= end:
            return
        self.begin(what, end)
        self.images = images
        self.training, saved, self.since = True, time.monotonic(), (time.monotonic(), self.step)
        with self.lock, tqdm(total=end, initial=self.step, desc=what, unit="it",
                             disable=fid.quiet()) as self.bar:
            while self.step < end:
                torch.manual_seed(self.args.seed * 1_000_003 + self.step)
                if self.args.compile:                   # CUDA graphs may write over their outputs
                    torch.compiler.cudagraph_mark_step_begin()
                yield self.step
                self.step += 1
                self.bar.update()
                # A signal to one process, and the clock of one, are those of all.
                mine = [self.signal or 0, int(time.monotonic() - saved > 60)]
                stop, late = fid.gather(torch.tensor(mine)).amax(0).tolist()
                due = stop or late or self.step == end
                if due or self.step % 50 == 0:
                    self.log()                              # first: it ends a run gone to NaN
                if due:
                    self.save()
                    saved = time.monotonic()
                    if late and self.bar.disable:           # no bar to watch
                        print(f"step {self.step} of {end}: kept", flush=True)
                if stop:
                    self.bar.close()
                    print(f"stopped at step {self.step}; the same command goes on from there")
                    sys.exit(128 + stop)
        self.training = False
        if self.signal:                                     # it came with the last checkpoint
            sys.exit(128 + self.signal)

    def add(self, rows=1, **scalars):
        """Sum scalars, on the device, for the next row of the log. rows: a mean's weight in it."""
        for name, value in scalars.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + rows * value, count + rows

    def log(self):
        """One row of log.csv, means since the last; ends the run if one is not finite."""
        (then, step), now = self.since, time.monotonic()
        sums = [[float(total), count] for total, count in self.sums.values()]
        sums = fid.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        row = {name: total / n for name, (total, n) in zip(self.sums, sums) if n}
        row["img_per_s"] = (self.step - step) * self.images / (now - then)
        self.seconds += now - then
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is not finite at step {self.step}; the last checkpoint is "
                                "kept. Train anew into another --out, with a lower learning rate")
        self.bar.set_postfix({name: f"{value:.3g}" for name, value in row.items()})
        self.rows.append(dict(step=self.step, seconds=f"{self.seconds:.1f}") | self.counts
                         | {n: f"{value:.6g}" for n, value in row.items()})
        self.sums, self.since = {}, (now, self.step)
        self.write_csv("log.csv", self.rows)

    def read_csv(self, name):
        path = self.folder / name
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if all(row["step"].isdecimal() for row in rows):
                return rows
        except FileNotFoundError:
            return []
        except (OSError, ValueError, LookupError, AttributeError, csv.Error):
            pass
        raise UserError(f"{path}: cannot be read as a table of steps; move it away")

    def write_csv(self, name, rows):
        def write(path):
            with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
                writer = csv.DictWriter(file, list(dict.fromkeys(itertools.chain(*rows))))
                writer.writeheader()
                writer.writerows(rows)
        self.write(name, write)


# ---- common: pictures and scores -----------------------------------------------------------------

def noise_of(samples, args, device="cpu"):
    """-> noise(), which at each call gives these samples (a range) fresh noise [n, 3, R, R].

    Each sample has a seed of its own: none depends on the batch or the device it is drawn on.
    """
    rngs = [torch.Generator().manual_seed(args.seed * 1_000_003 + 500_000_000 + i) for i in samples]
    shape = 3, args.resolution, args.resolution
    return lambda: torch.stack([torch.randn(shape, generator=rng) for rng in rngs]).to(device)


def at_once(args):
    """How many images to sample together: fewer where they are large, to save memory."""
    return max(1, min(256, 2 ** 20 // args.resolution ** 2))


def classes_to_draw(args, images):
    """The classes that samples run through in turn [C] int64;
    the null class where there are none."""
    if not args.labels:
        return torch.arange(max(1, len(images.classes)))
    picked = []
    for name in map(str.strip, args.labels.split(",")):
        if name in images.classes:
            picked.append(images.classes.index(name))
        elif name.isdecimal() and int(name) < len(images.classes):
            picked.append(int(name))
        else:
            known = "the classes " * bool(images.classes) + ", ".join(images.classes[:12])
            raise UserError(f"--labels {name}: {images.name} has {known or 'no classes'}"
                            + ", ..." * (len(images.classes) > 12))
    return torch.tensor(picked)


def save_grid(run, name, pixels):
    """A picture of uint8 images [N, 3, R, R], row by row, enlarged where they are small."""
    grid = torchvision.utils.make_grid(pixels, nrow=10, padding=2, pad_value=40)
    scale = max(1, 64 // run.args.resolution)
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    run.write(name, Image.fromarray(grid.permute(1, 2, 0).numpy()).save)


class Scorer:
    """The feature network and the reference statistics: asked for before the training, so that
    what cannot work is said at once; computed when first needed."""

    def __init__(self, args, device, images):
        self.args, self.images = args, images
        self.name = images.name + f" ({args.labels})" * bool(args.labels)
        self.classes, self.reference = classes_to_draw(args, images), None
        self.columns = self.classes.repeat(10)[:10]                     # of the pictures
        self.wanted = torch.isin(images.labels, self.classes) if args.labels else slice(None)
        self.labels = images.labels[self.wanted].sort().values          # to draw in proportion
        if args.samples and len(self.labels) < 2:
            raise UserError(f"{self.name}: too few images to score against; give --samples 0")
        self.net = (fid.load_features(args.features, device, args.inception)
                    if args.samples else None)

    def __call__(self, pixels):
        """The distance of samples [N, 3, R, R] uint8 to the data."""
        if self.reference is None:
            key = None if self.args.labels else self.images.key
            self.reference = fid.reference(self.net, self.images.pixels[self.wanted], key=key)
        return fid.distance(fid.statistics(self.net, pixels, "features", shared=True),
                            self.reference)


def evaluate(run, scorer, generate, steps, who, prefix="samples", nfe=lambda steps: steps):
    """Sample at each number of steps, save the pictures, score, and print a protocol line each.

    generate: (noise() [B, 3, R, R], labels [B], steps) -> images in [-1, 1]. who: whose weights.
    """
    args, begun = run.args, time.monotonic()
    if args.labels:                                         # beside the pictures of all classes
        prefix += "-" + "-".join(map(str.strip, args.labels.split(",")))
        prefix = os.fsencode(prefix)[:150].decode(errors="ignore")
    # First the picture's 80; then those to score, with labels in the data's proportions.
    known, mixed = scorer.labels, torch.Generator().manual_seed(0)
    to_score = known[torch.arange(args.samples) * len(known) // max(1, args.samples)]
    to_score = to_score[torch.randperm(args.samples, generator=mixed)]
    labels = torch.cat([scorer.columns.repeat(8), to_score])
    count, kept = len(labels), slice(80 if args.samples else 0, None)
    most = at_once(args)
    for n in steps:
        # In turn a batch for each process: samples are those of one process, bit for bit.
        (rank, world), pixels, spent = fid.processes(), [], 0.0
        with tqdm(total=count, desc=f"{n} steps", unit="img", leave=False,
                  disable=fid.quiet()) as bar:
            for first in range(0, count, most * world):
                i, start = first + most * rank, time.perf_counter()
                y = labels[i:i + most].to(run.device)
                own = torch.zeros(most, 3, args.resolution, args.resolution, dtype=torch.uint8)
                if len(y):
                    noise = noise_of(range(i, i + len(y)), args, run.device)
                    own[:len(y)] = to_uint8(generate(noise, y, n)).cpu()    # .cpu() waits
                pixels.append(fid.gather(own).flatten(0, 1))
                spent += time.perf_counter() - start
                bar.update(min(most * world, count - first))
                if run.signal:                              # in training: it ends after its step
                    bar.set_postfix_str("then stopping")
        pixels = torch.cat(pixels)[:count]
        save_grid(run, f"{prefix}-{n}step.png", pixels[:80])
        if args.npz:                                        # where none is scored, the picture's
            arrays = dict(images=pixels[kept].permute(0, 2, 3, 1).numpy(),
                          labels=labels[kept].numpy())
            run.write(f"{prefix}-{n}step.npz", lambda path: np.savez(path, **arrays))
        if not args.samples:
            continue
        value, speed = scorer(pixels[kept]), count / spent
        step = run.step + run.training                      # of the updates done
        print(f"step {step}: " * run.training
              + fid.protocol(scorer.net.label, f"{value:.4g}", scorer.net.name, args.samples,
                             scorer.reference.n, scorer.name, nfe(n), who, f"{speed:.0f}"),
              flush=True)
        row = dict(step=step, metric=scorer.net.label, value=value,
                   samples=args.samples, reference=scorer.reference.n, data=scorer.name,
                   nfe=nfe(n), who=who, img_per_s=speed)
        run.write_csv("scores.csv", [*run.read_csv("scores.csv"), row])
    if run.training:                                        # the log's time is that of training
        run.since = run.since[0] + time.monotonic() - begun, run.since[1]
    else:
        print(f"pictures: {run.folder}/{prefix}-*step.png", flush=True)


if __name__ == "__main__":
    fid.command(f"{METHOD}.py", main, "--accumulate or --checkpoint-activations, or fewer "
                "--channels and another --out")
