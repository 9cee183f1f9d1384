"""dmd2.py: Improved Distribution Matching Distillation (Yin et al. 2024, arXiv 2405.14867).

A diffusion model is the teacher of a generator that needs one call (or a few). The generator's
images should be distributed as the teacher's; a second diffusion model, the fake score, follows
them, and where the two denoise an image differently, the image should move:

    dL/dtheta = E[(mu_fake(x_t) - mu_real(x_t)) / mean|x0 - mu_real(x_t)| dG/dtheta]
              + w_g d softplus(-l(x_t))/dtheta
    L_fake    = E[(1/sigma^2 + 1/sigma_data^2) |mu_fake(x_t) - x0|^2]
              + w_d (softplus(l(x_t)) + softplus(-l(x_t_real)))

with x0 = G(z), x_t = x0 + sigma eps (the paper's F), means over pixels too, w_g = --gan-weight,
w_d = --disc-weight: Eq. 2 (a score is held as its denoiser mu, Eq. 1) with DMD's normaliser
(2311.18828, Eq. 8), and the GAN of Eq. 4, whose logit l is a head on the fake score's encoder.
(Eq. 4 prints -log D of a generated image where log(1 - D) is meant, which with D = sigmoid(l) is
-softplus(l), as in the official code.) Five updates of the fake score (--fake-updates; on `shapes`
2) go with each of the generator: two time-scales (section 4.2, TTUR).

Time is the noise level sigma, from 0.002 (images) to 80 (noise). Three networks of one shape:
teacher (an EDM, Karras et al. 2206.00364), generator G(z) = mu(80 z; 80) and fake score, the last
two beginning as the teacher. (80 is --start-sigma; on `shapes` 10.) A generator of several calls
sees in each its own image of the call before, noised: backward simulation (section 4.5,
`simulated`).

    python dmd2.py --steps 1                          # coloured shapes, two CPU cores: 17 to 20 min
    python dmd2.py --steps 4 --lr 1e-4 --pairs-iters 3000 --iters 2000
    python dmd2.py --data cifar10 --steps 1           # on a GPU

Departs from the paper in:
  * everything is small, trained from scratch, teacher included, with fast learning rates: the
    teacher's and the pairs' decay to zero, the generator's to a tenth, the fake score's stays.
    Generator and discriminator circle, the weights' mean is the centre, and where the fake score's
    rate falls too, the circle slows down and leaves it (`shapes`, 2500 updates: FD-random 0.037
    against 0.026). Adam's betas are 0 (teacher and pairs: 0.9) and 0.99 (official: 0.9, 0.999),
    gradients are clipped at a norm of 1 (official: 10). The scale that divides Eq. 2 is at least
    1e-6 (official: no bound, and NaNs become 0);
  * on `shapes`, where a training is minutes, the teacher's ln sigma is N(0, 1.8^2): N(-1.2, 1.2^2)
    is hardly ever where shapes are decided. The generator is called at sigma 10, where the teacher
    already draws (at 80: a mean image; the paper's one-step SDXL is called at 399 of 1000). Levels
    that show nothing are left out, and 2 fake-score updates go with each of the generator (at equal
    rates five had 0.107 after 600 updates, one 0.108). The GAN's gradient at the image is kept no
    larger than that of Eq. 2: with 3 times its norm, a colour was gone after 1000 updates;
  * there, too, the generator first learns 4096 of the teacher's noise-image pairs, of 8 Heun steps
    (the paper's one-step SDXL has such a warm-up, F.4), which gives it all colours in their shares
    (later calls learn to denoise these images), and the GAN has a head on every map of the encoder
    and, for the generator, a weight that counts: matching alone draws some colours ever more often
    (red and yellow: from an eighth to a fifth in 300 updates);
  * one pass of the fake score serves its denoising loss and the fake logit, one of the noised
    image the difference of scores and the generator's logit: they share sigma and eps, which the
    official code draws apart. The sums of the losses have the same expectation, but that the
    generator's logit sees the range of Eq. 2 (2 to 98 % of the levels), not all of it.
    The generator's update and the fake score's first share the images, but no pass;
  * the generator has an EMA, which is what is scored (the raw weights too); official: none;
  * its labels are those of the batch of real images; official: uniform. Real images are mirrored
    where the preset says so; official: never;
  * elsewhere the head sits on the encoder's last features, as in the official code (paper: middle
    block). At 32x32 the GAN weighs 6e-3, twice what it does at 64x64 (paper: 3e-3): Eq. 2, a mean
    over pixels, has twice the gradient at an image of half the side;
  * the multi-step generator (in the paper of SDXL) is in pixels, too. Its calls after the first are
    at SDXL's levels times the data's deviation, 2.0, 0.81 and 0.35: EDM's table has as little
    as 0.17 at the index of the last, where nothing is left to draw. Each call has its share of the
    images of every update (official: an update is of one call). Fake score and discriminator are
    told which call an image is of (--tell-call; official: they see those of all calls as one): else
    they are content when all together have the data's colours, and each call paints one ground.
    Several calls want a lower --lr: what is wrong with one is wrong with its successors' input;
  * the regression (DMD, 2311.18828) is a plain squared error, not LPIPS: that needs a download.
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

METHOD = "dmd2"
SIGMA_MIN, SIGMA_MAX, RHO, LEVELS = 0.002, 80.0, 7, 1000        # the table of noise levels
SIGMA_DATA = 0.5                                                # deviation of the images

PRESETS = dict(
    #            shapes     cifar10    folder     imagenet64
    teacher_iters=(6000,    200_000,   100_000,   400_000),
    teacher_batch=(16,      256,       64,        256),
    teacher_lr =(5e-3,      1e-3,      2e-3,      5e-4),
    teacher_ema=(0.995,     0.9995,    0.999,     0.9999),
    p_mean     =(0.0,       -1.2,      -1.2,      -1.2),
    p_std      =(1.8,       1.2,       1.2,       1.2),
    pairs      =(4096,      10_000,    10_000,    10_000),
    pairs_iters=(1500,      0,         0,         0),
    iters      =(1500,      20_000,    10_000,    40_000),
    batch      =(16,        256,       64,        256),
    lr         =(3e-4,      1e-4,      1e-4,      2e-5),
    fake_lr    =(2e-3,      1e-4,      1e-4,      2e-5),
    ema        =(0.998,     0.999,     0.999,     0.999),
    fake_updates=(2,        5,         5,         5),
    start_sigma=(10.0,      80.0,      80.0,      80.0),
    dm_levels  =((.15, .8), (.02, .98), (.02, .98), (.02, .98)),
    fake_levels=((.15, .8), (0., 1.),  (0., 1.),  (0., 1.)),
    gan_weight =(1.0,       6e-3,      6e-3,      3e-3),
    gan_cap    =(1.0,       0.0,       0.0,       0.0),
    disc_maps  =(0,         1,         1,         1),
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
STEPS = ()                      # what the generator is trained for


def shares(text):
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two shares, as 0.02,0.98") from None


def method_options(add):
    add("--teacher", type=lambda path: str(pathlib.Path(path)),
        help="folder of another run, to take its teacher instead of training one; options of the "
        "teacher's training then have no effect")
    add("--teacher-iters", type=int, help="length of the teacher's training")
    add("--teacher-batch", type=int, help="its images per update")
    add("--teacher-lr", type=float, help="its peak learning rate")
    add("--teacher-ema", type=float, help="its decay of the running mean")
    add("--p-mean", type=float, help="mean of ln sigma in its training (EDM Table 1)")
    add("--p-std", type=float, help="deviation of ln sigma in its training")
    add("--teacher-steps", type=int, help="Heun steps to score the teacher with, of two calls "
        "each; 0: do not [18, until its picture is there]")
    add("--train-steps", type=int, help="calls that the generator learns to sample in [the largest "
        "of --steps, which are 1 unless given]")
    add("--backward-simulation", action=argparse.BooleanOptionalAction, default=True,
        help="train later steps on the generator's own images; if not, on noised real ones")
    add("--tell-call", action=argparse.BooleanOptionalAction, default=True,
        help="tell the fake score, and so the discriminator, which call an image is of")
    add("--start-sigma", type=float, help="noise level of the generator's first call")
    add("--fake-updates", type=int, help="fake-score updates to one of the generator")
    add("--fake-lr", type=float, help="the fake score's peak learning rate")
    add("--dm-weight", type=float, default=1.0, help="of the distribution matching gradient")
    add("--gan-weight", type=float, help="of the generator's GAN loss, w_g; 0: no GAN")
    add("--gan-cap", type=float, help="bound of the GAN's gradient at the images, in norms of "
        "distribution matching's; 0: none")
    add("--disc-weight", type=float, default=0.01, help="of the discriminator in L_fake, "
        "w_d (0.01 is the official code's; the paper does not say)")
    add("--disc-maps", type=int, help="how many of the encoder's maps it sees, from the deepest; "
        "0: all")
    add("--dm-levels", type=shares, help="part of the table of noise levels that the generator's "
        "losses see")
    add("--fake-levels", type=shares, help="part that the fake score and discriminator learn")
    add("--regression", type=float, default=0.0, help="weight of DMD's regression loss")
    add("--pairs", type=int, help="noise-image pairs of the teacher's sampler, for this loss")
    add("--pairs-iters", type=int, help="updates on this loss alone, before the distillation")
    add("--pairs-lr", type=float, default=2e-3, help="their peak learning rate")
    add("--cfg", type=float, default=1.0, help="guidance of the teacher; 1: off")
    add("--label-dropout", type=float, default=0.1, help="share of null labels, with --cfg")


def variant(given):
    """What the name of the default run folder says besides method and data."""
    steps = given.get("train_steps") or max(given.get("steps") or (1,))
    return f"-{steps}step" if steps > 1 else ""


def check_method(args):
    if args.train_steps is None:
        args.train_steps = max(args.steps, default=1)
    for option, n in *(("steps", n) for n in args.steps), ("train-steps", args.train_steps):
        if not 1 <= n <= 16:
            raise UserError(f"--{option} {n}: a generator has 1 to 16 calls")
    args.steps = args.steps or (args.train_steps,)
    for n in args.steps:
        if args.train_steps % n:
            able = [i for i in range(1, args.train_steps + 1) if args.train_steps % i == 0]
            raise UserError(f"--steps {n}: a generator trained for {args.train_steps} "
                            f"samples in {show(able)}")
    expect(args, "teacher_iters teacher_batch fake_updates pairs", "1 or more",
           lambda n: 1 <= n < 2 ** 31)
    expect(args, "teacher_steps pairs_iters disc_maps", "0 or more", lambda n: 0 <= n < 2 ** 31)
    expect(args, "teacher_lr fake_lr pairs_lr", "a number between 0 and 1", lambda x: 0 < x < 1)
    expect(args, "teacher_ema label_dropout", "a number from 0 to below 1", lambda x: 0 <= x < 1)
    expect(args, "dm_weight gan_weight gan_cap disc_weight regression cfg", "at least 0",
           lambda x: 0 <= x < math.inf)
    expect(args, "dm_levels fake_levels", "two shares of the table, ascending, as 0.02,0.98",
           lambda part: len(part) == 2 and 0 <= part[0] < part[1] <= 1)
    if args.disc_maps > len(args.mult):
        raise UserError(f"--disc-maps {args.disc_maps}: the encoder has {len(args.mult)}, one for "
                        "each of --mult")
    if args.resolution >> (len(args.mult) - 1) < 2:
        raise UserError(f"--mult {show(args.mult)}: the discriminator needs a coarsest stage of "
                        "2x2 or more")
    args.nulls = args.cfg != 1                              # the teacher must know the null label
    if args.nulls and args.label_dropout == 0:
        raise UserError(f"--cfg {args.cfg}: needs a teacher that knows the null label; give a "
                        "--label-dropout above 0")
    low = SIGMA_MIN if args.train_steps == 1 else 0.1       # room for the other calls' levels
    if not low < args.start_sigma <= SIGMA_MAX:
        raise UserError(f"--start-sigma {args.start_sigma}: expected at most {SIGMA_MAX}, and more "
                        f"than {low}" + " with several calls" * (args.train_steps > 1))
    if not (-10 < args.p_mean < 10 and 0 < args.p_std < 10):
        raise UserError(f"--p-mean {args.p_mean} --p-std {args.p_std}: expected logarithms, the "
                        "second above 0")
    if args.dm_weight == args.gan_weight == args.regression == 0:
        raise UserError("--dm-weight 0 --gan-weight 0: nothing is left for the generator to learn "
                        "from; give one of them or --regression")


# ---- schedule: noise levels ----------------------------------------------------------------------

def karras(n, start=SIGMA_MAX):
    """n noise levels, ascending from 0.002 to `start` [n] (EDM Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / RHO), start ** (1 / RHO)
    down = torch.arange(n, dtype=torch.float64).flip(0) / max(1, n - 1)     # 0: the highest
    return (high + down * (low - high)) ** RHO


def call_levels(steps, start=SIGMA_MAX):
    """The levels at which a generator of so many steps is called, falling (section 4.4): `start`,
    then evenly down SDXL's table (official code: 999, 749, 499, 249 of 1000 for four), times the
    data's deviation."""
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)
    table = SIGMA_DATA * ((1 - alpha_bar) / alpha_bar).sqrt()   # those four: 7.3, 2.0, 0.81, 0.35
    n = int((table < start).sum())                              # levels below it
    return [float(start)] + [float(table[n - 1 - k * n // steps]) for k in range(1, steps)]


def draw_levels(table, part, n):
    """n random levels [n] of this part (two shares) of the table of ascending levels."""
    low, high = (min(int(share * len(table)), len(table) - 1) for share in part)
    return table[torch.randint(low, high + 1, (n,), device=table.device)]


def draw_calls(n, calls):
    """Which of its calls the generator makes for each of n images [n] int64, on the CPU: a block
    of n / calls for each, in turn from a random one, so that all of `slices` have all calls."""
    return (torch.arange(n) * calls // n + torch.randint(calls, ())) % calls


# ---- the networks --------------------------------------------------------------------------------

class Denoiser(nn.Module):
    """mu(x, sigma, y) = c_skip x + c_out net(c_in x, c_noise, y): the image expected behind
    x = x0 + sigma eps [B, 3, R, R], of sigma [B], in sampling 0.002 .. 80 (EDM Eq. 7, its D).
    `encode` gives the features, a map [B, C, H, W] of each stage, `decode` what comes of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def encode(self, x, sigma, y):
        c_in = (sigma ** 2 + SIGMA_DATA ** 2).rsqrt()
        return self.net.encode(expand(c_in) * x, sigma.log() / 4, y=y)  # expand: [B, 1, 1, 1]

    def decode(self, features, x, sigma, y):
        variance = sigma ** 2 + SIGMA_DATA ** 2
        c_skip, c_out = SIGMA_DATA ** 2 / variance, sigma * SIGMA_DATA * variance.rsqrt()
        return expand(c_skip) * x + expand(c_out) * self.net.decode(features, sigma.log() / 4, y=y)

    def forward(self, x, sigma, y):
        return self.decode(self.encode(x, sigma, y), x, sigma, y)


class Discriminator(nn.Module):
    """Logits [B, heads x P] from the features of the fake score's encoder (section 4.3): one of the
    whole image from its deepest map, and of places, from the maps above it. Those of smaller maps
    are repeated, P a map, so that all maps weigh the same in a mean.

    channels: of the encoder's stages. side: of the deepest map. maps: how many are judged; 0: all.
    """

    def __init__(self, channels, side, maps=0):
        super().__init__()

        def head(c, *whole):
            down = nn.Conv2d(c, c, 4, stride=2, padding=1), nn.GroupNorm(max(1, c // 16), c)
            return nn.Sequential(*down, nn.SiLU(), *whole, nn.Conv2d(c, 1, 1))

        c = channels[-1]
        self.heads = nn.ModuleList(map(head, channels[-maps:-1]))           # [-0:-1]: all above
        self.heads.append(head(c, nn.Conv2d(c, c, side // 2), nn.GroupNorm(max(1, c // 16), c),
                               nn.SiLU()))

    def forward(self, features):
        maps = zip(self.heads, features[-len(self.heads):])
        logits = [head(h).float().flatten(1) for head, h in maps]
        most = max(l.shape[1] for l in logits)
        return torch.cat([l.repeat(1, most // l.shape[1]) for l in logits], 1)


# ---- losses --------------------------------------------------------------------------------------
# Networks, "scores" too, are denoisers (x, sigma, y) -> images mu; x0 (generated; real where the
# teacher learns, the teacher's in `regression_loss`), real, eps [B, 3, R, R]; sigma [B]; y [B]
# int64, a label of None is the null class. Losses are means over batch and pixels or logits.

def guided(teacher, x, sigma, y, cfg_scale=1.0):
    """mu of the teacher with classifier-free guidance; 1: off."""
    mu = teacher(x, sigma, y)
    if cfg_scale == 1:
        return mu
    mu_null = teacher(x, sigma, None)
    return mu_null + cfg_scale * (mu - mu_null)


def weighted_error(denoised, x0, sigma):
    """The mean of (1/sigma^2 + 1/sigma_data^2) |denoised - x0|^2: EDM's weight, and that of the
    fake score in DMD2."""
    return (expand(sigma ** -2 + SIGMA_DATA ** -2) * (denoised - x0) ** 2).mean()


def denoising_loss(net, x0, sigma, eps, y):
    """EDM Eq. 2: of the teacher on real images, of the fake score (without GAN) on generated."""
    return weighted_error(net(x0 + expand(sigma) * eps, sigma, y), x0, sigma)


def dm_gradient(x0, mu_real, mu_fake):
    """The gradient of Eq. 2 at an image [B, 3, R, R], from what the two denoisers make of its
    noised self.

    With s = (mu - x_t) / sigma^2 (Eq. 1), s_fake - s_real is this up to a factor, which DMD's
    normaliser (2311.18828, Eq. 8) takes out: what is left is of order one at every sigma.
    """
    scale = (x0 - mu_real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)     # DMD's Eq. 8
    return (mu_fake - mu_real) / scale                                              # Eq. 2, by 1


def generator_losses(real_score, fake_score, disc, x0, sigma, eps, y, dm=True, gan=True):
    """-> the loss whose gradient at the generator's images x0 is Eq. 2, and the GAN's (Eq. 4).

    Both denoisers see the same x_t, without gradient; the logit reuses the fake score's encoder.
    dm, gan: a loss that is not wanted is 0.
    """
    x_t = x0 + expand(sigma) * eps
    loss_dm, loss_gan = 0 * x0.sum(), 0 * x0.sum()
    with torch.set_grad_enabled(gan):
        features = fake_score.encode(x_t, sigma, y)
    if dm:
        with torch.no_grad():
            mu_real, mu_fake = real_score(x_t, sigma, y), fake_score.decode(features, x_t, sigma, y)
            target = x0 - dm_gradient(x0, mu_real, mu_fake)
        loss_dm = 0.5 * (x0 - target).square().mean()       # the gradient: dm_gradient / elements
    if gan:
        loss_gan = F.softplus(-disc(features)).mean()       # Eq. 4
    return loss_dm, loss_gan


def fake_score_losses(fake_score, disc, x0, real, sigma, eps, y):
    """-> the fake score's denoising loss on images x0 of the generator, and its discriminator's
    (Eq. 4).

    sigma, eps, y [2B]: for the fake, then for the real images. The encoder sees both at once; its
    features of the fake ones go on to be denoised and judged.
    """
    n = len(x0)
    x_t = torch.cat([x0, real]) + expand(sigma) * eps
    features = fake_score.encode(x_t, sigma, y)
    denoised = fake_score.decode([f[:n] for f in features], x_t[:n], sigma[:n], y[:n])
    logits = disc(features)
    loss_disc = F.softplus(logits[:n]).mean() + F.softplus(-logits[n:]).mean()
    return weighted_error(denoised, x0, sigma[:n]), loss_disc


def regression_loss(G, x_t, sigma, y, x0):
    """Eq. 3, DMD's regression loss (2311.18828), which DMD2 leaves out: the generator's images
    against the teacher's of one noise."""
    return (G(x_t, sigma, y) - x0).square().mean()


# ---- samplers ------------------------------------------------------------------------------------

def simulated(G, noise, y, k, taus):
    """Backward simulation (section 4.5): what the generator's call number k sees, its own image of
    call k - 1, noised afresh; call 0 sees noise. The sampler is the same lines.

    noise: callable -> fresh unit noise [B, 3, R, R]. k [B] int64, on the CPU: images may be at
    different calls. taus: the levels of all calls, falling.
    """
    x = taus[0] * noise()
    for i in range(int(k.max())):
        rows = (k > i).nonzero()[:, 0].to(x.device, non_blocking=True)  # another call is to come
        sigma = torch.full(rows.shape, taus[i], device=x.device)
        x[rows] = G(x[rows], sigma, y[rows]) + taus[i + 1] * noise()[rows]
    return x                                                                    # [B, 3, R, R]


def noised_for_call(x0, k, eps, tau_of):
    """What the calls k [B] see of images that are given and not `simulated`: these, noised; call 0,
    noise alone. tau_of [calls]: the calls' levels, a tensor, on the images' device as k is."""
    return expand(k > 0) * x0 + expand(tau_of[k]) * eps                         # [B, 3, R, R]


@torch.no_grad()
def sample(G, noise, y, taus):
    """Images of labels y [B], in len(taus) calls of the generator."""
    x = simulated(G, noise, y, torch.full(y.shape, len(taus) - 1, device="cpu"), taus)
    return G(x, torch.full(y.shape, taus[-1], device=x.device), y)


@torch.no_grad()
def heun(teacher, z, y, steps, start=SIGMA_MAX):
    """The teacher's sampler: EDM Algorithm 1 from unit noise z [B, 3, R, R], 2 steps - 1 calls."""
    sigmas = [*karras(steps, start).tolist()[::-1], 0.0]
    level = lambda sigma: torch.full(y.shape, sigma, device=z.device)           # [B]
    x = sigmas[0] * z
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        slope = (x - teacher(x, level(sigma), y)) / sigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next:
            slope_next = (x_next - teacher(x_next, level(sigma_next), y)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
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

def teacher_pairs(run, generate, null_class, begins):
    """DMD's pairs: noise z and labels [N], and what the teacher's deterministic sampler makes of
    them, x0 in [-1, 1], from the level where the generator begins. Computed when first needed, and
    kept in the run's folder. begins: the phase does, so what lies there is of another training."""
    n, path = run.args.pairs, run.folder / "pairs.npz"
    y = (torch.arange(n) % max(1, null_class)).to(run.device)
    z = noise_of(range(10 ** 8, 10 ** 8 + n), run.args, run.device)()       # none of the samples'
    if fid.gather(torch.tensor([int(begins or not path.exists())])).any():  # one must: all do
        most = at_once(run.args)
        x0 = [generate(lambda: z[i:i + most], y[i:i + most]).cpu()
              for i in tqdm(range(0, n, most), "pairs", disable=fid.quiet())]
        run.make()
        run.write("pairs.npz", lambda path: np.savez(path, images=to_uint8(torch.cat(x0)).numpy()))
    x0 = torch.from_numpy(fid.read_arrays(path)["images"])
    return z, y, from_uint8(x0).to(run.device)


def draw(run, generator, real_score, fake_score, y, taus, name):
    """A picture of the training so far, of fixed noise: the generator's images (without EMA, as
    the fake score follows it), and what the teacher and the fake score make of them once noised
    to sigma = 2."""
    y, noise = y.to(run.device), noise_of(range(10), run.args, run.device)
    x0 = sample(generator, noise, y, taus)
    sigma = torch.full((10,), 2.0, device=run.device)
    x_t = x0 + expand(sigma) * noise()
    with torch.no_grad():
        rows = [x0, real_score(x_t, sigma, y), fake_score(x_t, sigma, y)]
    save_grid(run, name, to_uint8(torch.cat(rows)).cpu())


def main(argv=None):
    args = parse_args(argv)
    device, autocast = set_up(args)
    images = fid.load_images(args.data, args.resolution)
    scorer, null_class = Scorer(args, device, images), len(images.classes)
    if args.cfg != 1 and not images.classes:
        raise UserError(f"--cfg {args.cfg}: {images.name} has no classes to guide to")
    pixels, labels = images.pixels, images.labels.to(device)
    if pixels.numel() < 2 ** 31:                            # more than 2 GB stay where they are
        pixels = pixels.to(device)

    torch.manual_seed(args.seed)
    sets = args.train_steps if args.tell_call else 1        # of labels, that the fake score knows
    teacher, generator, fake_score = (
        Denoiser(UNet(args.resolution, args.channels, args.mult, args.blocks, args.attention, null,
                      dropout=args.dropout, checkpoint=args.checkpoint_activations))
        .to(device, memory_format=torch.channels_last)
        for null in (null_class, null_class, sets * (null_class + 1) - 1))
    disc = Discriminator([args.channels * m for m in args.mult],
                         args.resolution >> len(args.mult) - 1, args.disc_maps)
    disc.to(device, memory_format=torch.channels_last)
    teacher_ema = AveragedModel(teacher, multi_avg_fn=get_ema_multi_avg_fn(args.teacher_ema))
    generator_ema = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    for net in (teacher_ema, generator, generator_ema, fake_score):     # from here on: no dropout
        net.eval()
    teacher_ema.requires_grad_(False)
    adam = lambda params, lr, beta1=0.0: torch.optim.AdamW(params, lr, (beta1, 0.99),
                                                           weight_decay=0.01, fused=True)
    opt_teacher = adam(teacher.parameters(), args.teacher_lr, 0.9)
    opt_generator = adam(generator.parameters(), args.lr)   # no momentum: two players
    opt_fake = adam([*fake_score.parameters(), *disc.parameters()], args.fake_lr)
    opt_pairs = adam(generator.parameters(), args.pairs_lr, 0.9)
    schedule_teacher = warmup_cosine(opt_teacher, args.teacher_iters)
    schedule_pairs = warmup_cosine(opt_pairs, max(1, args.pairs_iters))
    schedule_generator = warmup_cosine(opt_generator, args.iters, end=0.1)
    schedule_fake = warmup_cosine(opt_fake, args.iters, end=1.0)
    run = Run(args, device, images, dict(
        teacher=teacher, teacher_ema=teacher_ema, opt_teacher=opt_teacher,
        schedule_teacher=schedule_teacher, opt_pairs=opt_pairs, schedule_pairs=schedule_pairs,
        generator=generator, generator_ema=generator_ema,
        opt_generator=opt_generator, schedule_generator=schedule_generator, fake_score=fake_score,
        disc=disc, opt_fake=opt_fake, schedule_fake=schedule_fake))
    if args.teacher and not run.step:
        load_teacher(args.teacher, teacher_ema, run, args.nulls)
    taught = 0 if args.teacher else args.teacher_iters      # the steps where the phases end
    begin = taught + args.pairs_iters
    end = begin + args.iters
    trains = run.step < end                                 # if not, it is only sampled
    teacher_steps = args.teacher_steps
    if teacher_steps is None:                               # once, after the training
        teacher_steps = 0 if (run.folder / "teacher-18step.png").exists() else 18
    if args.compile:
        torch._dynamo.config.suppress_errors = True         # without a compiler: go on uncompiled
        torch._dynamo.config.recompile_limit = 64           # not 8: all nets are of one code
        for net in (teacher.net, teacher_ema.module.net, generator.net, generator_ema.module.net,
                    fake_score.net):
            net.encode, net.decode = torch.compile(net.encode), torch.compile(net.decode)

    def real_score(x, sigma, y):
        y = y % (null_class + 1)                            # the class alone, if `told` the call
        return guided(teacher_ema.module, x, sigma, y, args.cfg)

    def told(y, k):
        """The fake score's labels: it has a set of them for each call of the generator. (Those of a
        real image say the call of the generated one that it is compared with.)"""
        return y + k % sets * (null_class + 1)

    def teach(noise, y, steps, start=SIGMA_MAX):
        with autocast:
            return heun(real_score, noise(), y, steps, start)

    def sampler(net):
        def generate(noise, y, steps):
            with autocast:
                return sample(net, noise, y, call_levels(steps, args.start_sigma))
        return generate

    # Phase 1: the teacher.
    for step in run.steps(taught, "teacher", args.teacher_batch):
        x0, y = draw_batch(pixels, labels, args.teacher_batch, args.flip)
        if args.nulls:
            drop = torch.rand(len(y), device=device) < args.label_dropout
            y = torch.where(drop, null_class, y)
        sigma = (args.p_mean + args.p_std * torch.randn(len(y), device=device)).exp()
        eps = torch.randn_like(x0)
        for rows in slices(args, step):
            with autocast:
                loss = denoising_loss(teacher, x0[rows], sigma[rows], eps[rows], y[rows])
            (loss / args.accumulate).backward()
            run.add(loss_teacher=loss.detach())
        run.add(grad_norm=update(opt_teacher, schedule_teacher))
        teacher_ema.update_parameters(teacher)
        if (step + 1) % max(1, args.teacher_iters // 5) == 0:
            y = scorer.columns.to(device)
            x0 = teach(noise_of(range(10), args, device), y, teacher_steps or 18)
            save_grid(run, f"progress/teacher-{step + 1:07d}.png", to_uint8(x0).cpu())
    if run.step == taught:                                  # the other two begin as its mean
        state = teacher_ema.module.state_dict()
        generator.load_state_dict(state)
        fake_score.load_state_dict(state | {name: state[name].repeat(sets, 1) for name in (
            "net.embed_label.weight", "net.label_map.weight")})

    table = karras(LEVELS).float().to(device)
    taus = call_levels(args.train_steps, args.start_sigma)
    tau_of = torch.tensor(taus, device=device)
    if trains and (args.regression or run.step < begin):
        pairs = teacher_pairs(run, lambda noise, y: teach(noise, y, 8, taus[0]), null_class,
                              run.step == taught)

    def regression_batch(j, call, eps):
        """What the generator's calls see of the pairs j [B], and what they should make of it: the
        first call sees the pair's noise, later ones the teacher's image, noised by eps."""
        z, y, x0 = (t[j] for t in pairs)
        x_t = noised_for_call(x0, call, torch.where(expand(call > 0), eps, z), tau_of)
        return x_t, tau_of[call], y, x0

    # Phase 2: a short regression, so that the generator begins where the teacher's sampler ends.
    for step in run.steps(begin, "pairs", args.batch):
        j = torch.randint(args.pairs, (args.batch,), device=device)
        call = draw_calls(args.batch, args.train_steps).to(device, non_blocking=True)
        batch = regression_batch(j, call, torch.randn_like(pairs[0][j]))
        for rows in slices(args):
            with autocast:
                loss = regression_loss(generator, *(v[rows] for v in batch))
            (loss / args.accumulate).backward()
            run.add(loss_regression=loss.detach())
        run.add(grad_norm=update(opt_pairs, schedule_pairs))

    # Phase 3: the distillation. A step is one update of the generator and --fake-updates of the
    # fake score (4.2, TTUR).
    for step in run.steps(end, "distillation", args.batch * args.fake_updates):
        for i in range(args.fake_updates):
            real, y = draw_batch(pixels, labels, args.batch, args.flip)
            noise = lambda: torch.randn_like(real)
            k = draw_calls(len(y), args.train_steps)        # on the CPU, which asks how many are
            call = k.to(device, non_blocking=True)          # at a call: a GPU's would be waited for
            y_told = told(y, call)
            z = [noise() for _ in range(args.train_steps if args.backward_simulation else 1)]
            if i == 0:
                sigma, eps = draw_levels(table, args.dm_levels, len(y)), noise()
                if args.regression:
                    j = torch.randint(args.pairs, y.shape, device=device)
                    batch = regression_batch(j, call, noise())
            # [2, B, ...]: of the generated, then of the real images.
            sigma_both = draw_levels(table, args.fake_levels, 2 * len(y)).view(2, -1)
            eps_both = torch.randn_like(torch.stack([real, real]))
            generated = []
            for rows in slices(args):
                draws = iter(z)
                with torch.no_grad(), autocast:
                    if args.backward_simulation:
                        x = simulated(generator, lambda: next(draws)[rows], y[rows], k[rows], taus)
                    else:
                        x = noised_for_call(real[rows], call[rows], z[0][rows], tau_of)
                with torch.set_grad_enabled(i == 0), autocast:
                    x0 = generator(x, tau_of[call[rows]], y[rows])
                generated.append(x0.detach())
                if i:                                       # the generator's update is the first's
                    continue
                leaf = x0.detach().requires_grad_()
                with autocast:
                    loss_dm, loss_gan = generator_losses(
                        real_score, fake_score, disc, leaf, sigma[rows], eps[rows], y_told[rows],
                        args.dm_weight > 0, args.gan_weight > 0)
                # Both at the image, to be weighed and watched there, then one pass through G. (At
                # first the fake score is the teacher: grad_dm is 0 and, by the cap, grad_gan.)
                grad_dm = args.dm_weight * torch.autograd.grad(loss_dm, leaf)[0]
                grad_gan = args.gan_weight * torch.autograd.grad(loss_gan, leaf)[0]
                if args.gan_cap and args.dm_weight:
                    bound = args.gan_cap * norm(grad_dm) / norm(grad_gan)
                    grad_gan = torch.where(bound < 1, bound * grad_gan, grad_gan)
                x0.backward((grad_dm + grad_gan) / args.accumulate)
                if args.regression:
                    with autocast:
                        loss = regression_loss(generator, *(v[rows] for v in batch))
                    (args.regression / args.accumulate * loss).backward()
                    run.add(loss_regression=loss.detach())
                run.add(loss_dm=loss_dm.detach(), loss_gan=loss_gan.detach(),
                        grad_dm=norm(grad_dm), grad_gan=norm(grad_gan), **moments(leaf.detach()))
            if i == 0:
                run.add(grad_norm=update(opt_generator, schedule_generator))
                generator_ema.update_parameters(generator)

            for rows, x0 in zip(slices(args), generated):
                with autocast:
                    if args.gan_weight:
                        loss_fake, loss_disc = fake_score_losses(
                            fake_score, disc, x0, real[rows], sigma_both[:, rows].flatten(),
                            eps_both[:, rows].flatten(0, 1), y_told[rows].repeat(2))
                        run.add(loss_disc=loss_disc.detach())
                    else:
                        loss_fake, loss_disc = denoising_loss(
                            fake_score, x0, sigma_both[0, rows], eps_both[0, rows], y_told[rows]), 0
                ((loss_fake + args.disc_weight * loss_disc) / args.accumulate).backward()
                run.add(loss_fake=loss_fake.detach())
            run.add(grad_norm_fake=update(opt_fake))
        schedule_fake.step()
        done = step + 1 - begin
        run.counts = dict(generator_updates=done, fake_updates=done * args.fake_updates)
        if done % max(1, args.iters // 10) == 0:
            fake_of_last = lambda x, sigma, y: fake_score(x, sigma, told(y, args.train_steps - 1))
            with autocast:
                draw(run, generator, real_score, fake_of_last, scorer.columns, taus,
                     f"progress/{step + 1:07d}.png")
        if args.score_every and done % args.score_every == 0 and done < args.iters:
            evaluate(run, scorer, sampler(generator_ema.module), args.steps, "generator ema",
                     f"progress/{step + 1:07d}")

    if teacher_steps:
        evaluate(run, scorer, teach, [teacher_steps], "teacher ema", "teacher",
                 lambda n: (2 * n - 1) * (1 if args.cfg == 1 else 2))
    evaluate(run, scorer, sampler(generator), args.steps, "generator", "raw")
    evaluate(run, scorer, sampler(generator_ema.module), args.steps, "generator ema")


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
