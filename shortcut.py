"""shortcut.py: One Step Diffusion via Shortcut Models (Frans et al. 2024, arXiv 2410.12557).

One network, one training. s(x_t, t, d) is the velocity of a jump of length d, and is trained on

    L = |s(x_t, t, d) - (x_1 - x_0)|^2    at the finest d = 1/128: flow matching
      + |s(x_t, t, 2d) - sg[s(x_t, t, d) + s(x'_{t+d}, t+d, d)] / 2|^2    self-consistency (Eq. 5)

averaged over pixels and a batch, a share k of whose rows are of the second kind.

Time runs from noise to data: x_0 is noise, x_1 the image, x_t = (1 - t) x_0 + t x_1.

    python shortcut.py --steps 1                      # coloured shapes, two CPU cores: 10 minutes
    python shortcut.py --data cifar10 --steps 1,4     # on a GPU
    python shortcut.py --k 0 --out runs/flow          # flow matching, the baseline, from this file

Departs from the paper in:
  * pixels and a UNet, not latents and a DiT. So no clip of x' and the targets at +-4 (official
    code: the range of latents), and the network's flow target has variance one (`Shortcut`);
  * the finest level is d = 1/128, as in the official code (the paper asks d = 0 in its place), and
    the network is told -log2(d) / 7;
  * every batch size trains every length: a batch's lengths are dealt in turn from a random start
    (the official code gives small batches nothing but d = 1);
  * everything is small; the learning rate is 5 to 50 times the official 1e-4, warms up and decays
    to zero (official: constant), Adam's second beta is 0.99 (official: 0.999), gradients are
    clipped at a norm of 1 (official: not), and on `shapes` the EMA's decay is 0.995, not 0.999;
  * on `shapes`, where a training is minutes, the targets are of the network itself, not of the EMA
    of its weights (--ema-targets): each of the eight lengths learns from the one below, one after
    the other, and behind a mean over the last 200 updates all of them lag (FD-random in one call,
    three seeds: 0.35 to 0.55, without 0.20 to 0.26);
  * labels are dropped for guidance only when there is guidance (--cfg), in the flow rows only.
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

METHOD = "shortcut"
M = 128                         # the finest grid; lengths are 1/128, 1/64, ..., 1/2, 1
LEVELS = int(math.log2(M))      # how many of these are above the finest: 7

PRESETS = dict(
    #            shapes     cifar10    folder     imagenet64
    iters      =(6000,      200_000,   100_000,   400_000),
    batch      =(16,        256,       64,        256),
    lr         =(5e-3,      1e-3,      2e-3,      5e-4),
    ema        =(0.995,     0.999,     0.999,     0.999),
    ema_targets=(False,     True,      True,      True),
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
STEPS = (1, 2, 4, 128)


def method_options(add):
    add("--k", type=float, default=0.25,
        help="share of a batch with self-consistency targets; 0: flow matching alone")
    add("--ema-targets", action=argparse.BooleanOptionalAction,
        help="targets of the running mean of the weights; if not, of the weights as they are")
    add("--cfg", type=float, default=1.0,
        help="guidance at the finest level, learned by the longer jumps; 1: off")
    add("--label-dropout", type=float, default=0.1, help="share of null labels, with --cfg")
    add("--weight-decay", type=float, default=0.1, help="AdamW's")


def variant(given):
    """What the name of the default run folder says besides method and data."""
    return ""


def check_method(args):
    for n in args.steps:
        if n not in [2 ** i for i in range(LEVELS + 1)]:
            raise UserError(f"--steps {n}: a shortcut model jumps in 1, 2, 4, ... or {M} steps")
    expect(args, "k label_dropout", "a number from 0 to below 1", lambda x: 0 <= x < 1)
    expect(args, "cfg weight_decay", "at least 0", lambda x: 0 <= x < math.inf)
    if args.cfg != 1 and args.label_dropout == 0:
        raise UserError(f"--cfg {args.cfg}: needs the null label to be learned; give a "
                        "--label-dropout above 0")


# ---- schedule: times and lengths -----------------------------------------------------------------

def draw_t_d(batch, k, device="cpu"):
    """Times t and lengths d [batch], and n: the first n rows are self-consistency, k on average.

    The other rows are flow matching: d = 1/M and t ~ U(0, 1). The first n have the lengths 1/64
    to 1 (the paper's 2d), in turn from a random start, each with a t on its grid 0, d, ..., 1 - d.
    """
    n = int(k * batch + torch.rand(()).item())
    t, d = torch.rand(batch, device=device), torch.full((batch,), 1 / M, device=device)
    start = torch.randint(LEVELS, (1,), device=device)
    d[:n] = 0.5 ** ((torch.arange(n, device=device) + start) % LEVELS)
    t[:n] = (t[:n] / d[:n]).floor() * d[:n]
    return t, d, n


# ---- the network ---------------------------------------------------------------------------------

class Shortcut(nn.Module):
    """s(x_t, t, d, y) = c_skip x_t + c_out net(x_t / S, t, -log2(d)/7, y), as EDM preconditions.

    For images of variance a^2 (EDM: a = 0.5), x_t has variance S^2 = (1-t)^2 + (t a)^2; c_skip x_t
    is the best linear guess of x_1 - x_0 and c_out the deviation of what is left, so the network's
    flow target has variance one at every t. At t = 0, s = a net - x_0: one step gives the image
    x_1 = a net, which no noise had to pass through.

    x [B, 3, R, R]; t in [0, 1] and d in [1/128, 1], both [B]; y [B] int64, None: the null class.
    """

    def __init__(self, net, a=0.5):
        super().__init__()
        self.net, self.a = net, a

    def forward(self, x, t, d, y):
        S = expand((1 - t) ** 2 + (t * self.a) ** 2).sqrt()             # expand: [B, 1, 1, 1]
        c_skip = (expand(t) * (1 + self.a ** 2) - 1) / S ** 2
        return c_skip * x + self.a / S * self.net(x / S, t, d.log2() / -LEVELS, y)


# ---- losses --------------------------------------------------------------------------------------
# s, s_target: callables (x, t, d, y) -> velocity. x_0 noise, x_1 images in [-1, 1], x and x_t
# between them, all [B, 3, R, R]; t, d [B], y [B] int64, a label of None is the null class.

def guided(s, x, t, d, y, cfg_scale=1.0):
    """The velocity with classifier-free guidance, at the finest length; longer jumps learn it from
    there, and the null pass of their rows is not used. A scale of 1: off."""
    v = s(x, t, d, y)
    if cfg_scale == 1:
        return v
    v_null = s(x, t, d, None)
    # Between 1/M and 2/M: on a GPU a power may be off by a bit.
    return torch.where(expand(d < 1.5 / M), v_null + cfg_scale * (v - v_null), v)


@torch.no_grad()
def self_consistency_target(s, x_t, t, d, y, cfg_scale=1.0):
    """What a jump of 2d should do: the mean velocity of two jumps of d. Carries no gradient."""
    s_t = guided(s, x_t, t, d, y, cfg_scale)
    x_next = x_t + expand(d) * s_t                          # Eq. 3: the model's own x'_{t+d}
    s_next = guided(s, x_next, t + d, d, y, cfg_scale)
    return (s_t + s_next) / 2                               # Eq. 4


def shortcut_loss(s, s_target, x_0, x_1, t, d, n, y, cfg_scale=1.0):
    """Eq. 5, as one mean over the batch -> the scalar loss, and the parts of it that the batch has.

    s_target makes the targets. The first n rows have those of self-consistency: their d is the
    paper's 2d.
    """
    x_t = torch.lerp(x_0, x_1, expand(t))                   # Eq. 1
    # Before the targets, which share autocast's bf16 weights: made there, without gradients, they
    # would serve here as well in torch 2.7.
    v = s(x_t, t, d, y)
    target = x_1 - x_0                                      # Eq. 2
    if n:
        target[:n] = self_consistency_target(s_target, x_t[:n], t[:n], d[:n] / 2, y[:n],
                                             cfg_scale)
    error = (v - target).square().mean((1, 2, 3))           # Eq. 5, [B]
    parts = dict(loss_flow=error[n:], loss_shortcut=error[:n])
    return error.mean(), {name: e.mean().detach() for name, e in parts.items() if len(e)}


# ---- sampler -------------------------------------------------------------------------------------

@torch.no_grad()
def sample(s, x_0, y, steps, d=None, cfg_scale=1.0):
    """`steps` equal jumps from noise x_0 [B, 3, R, R] to images, labels y [B] (Algorithm 2).

    d: the length that the network is told, 1/steps unless given: flow matching knows 1/M alone.
    """
    d = d or 1 / steps
    x, told = x_0, torch.full((len(x_0),), d, device=x_0.device)
    if d > 1 / M:
        cfg_scale = 1.0                                     # longer jumps have learned it
    for i in range(steps):
        t = torch.full_like(told, i / steps)
        x = x + guided(s, x, t, told, y, cfg_scale) / steps
    return x


# ---- training ------------------------------------------------------------------------------------

def draw(run, generate, y, name):
    """A picture of the training so far: rows = 1, 2, 4, 128 steps, labels y [10] = columns."""
    y = y.to(run.device)
    rows = [generate(noise_of(range(10), run.args, run.device), y, n) for n in STEPS]
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
    s = Shortcut(UNet(args.resolution, args.channels, args.mult, args.blocks, args.attention,
                      null_class, conditions=2, dropout=args.dropout,
                      checkpoint=args.checkpoint_activations))
    s.to(device, memory_format=torch.channels_last)
    s_ema = AveragedModel(s, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    s_ema.eval().requires_grad_(False)
    opt = torch.optim.AdamW(s.parameters(), args.lr, (0.9, 0.99), weight_decay=args.weight_decay,
                            fused=True)
    schedule = warmup_cosine(opt, args.iters)
    run = Run(args, device, images, dict(s=s, s_ema=s_ema, opt=opt, schedule=schedule))
    if args.compile:
        torch._dynamo.config.suppress_errors = True         # without a compiler: go on uncompiled
        torch._dynamo.config.recompile_limit = 64           # not 8: all nets are of one code
        graphs = "reduce-overhead" if device.type == "cuda" else None       # CUDA graphs
        for net in (s.net, s_ema.module.net):
            net.encode = torch.compile(net.encode, mode=graphs)
            net.decode = torch.compile(net.decode, mode=graphs)

    def own(x, t, d, y):
        s.eval()                                            # no dropout in a target
        v = s(x, t, d, y)
        s.train()
        return v
    s_target = s_ema if args.ema_targets else own

    @torch.compiler.set_stance("force_eager")               # each batch size would compile anew
    def generate(noise, y, steps):
        with autocast:
            return sample(s_ema, noise(), y, steps, None if args.k else 1 / M, args.cfg)
    who = "shortcut ema" if args.k else "flow ema"
    nfe = lambda n: 2 * n if args.cfg != 1 and (n == M or not args.k) else n

    # Algorithm 1. Rows [:n] of a batch are of self-consistency, the others of flow matching.
    for step in run.steps(args.iters, "training", args.batch):
        x_1, y = draw_batch(pixels, labels, args.batch, args.flip)
        x_0 = torch.randn_like(x_1)
        t, d, n = draw_t_d(args.batch, args.k, device)
        if args.cfg != 1:                                   # flow rows alone need the null class
            drop = torch.rand(len(y), device=device) < args.label_dropout
            y = torch.where(drop & (torch.arange(args.batch, device=device) >= n), null_class, y)
        for rows in slices(args, step):
            part = [v[rows] for v in (x_0, x_1, t, d)]
            n_part = len(range(n)[rows])                    # how many of these are of the first n
            with autocast:
                loss, parts = shortcut_loss(s, s_target, *part, n_part, y[rows], args.cfg)
            (loss / args.accumulate).backward()
            run.add(loss=loss.detach())
            run.add(len(part[0]) - n_part, loss_flow=parts.get("loss_flow", 0))
            run.add(n_part, loss_shortcut=parts.get("loss_shortcut", 0))
        run.add(grad_norm=update(opt, schedule))
        s_ema.update_parameters(s)
        if (step + 1) % max(1, args.iters // 10) == 0:
            draw(run, generate, scorer.columns, f"progress/{step + 1:07d}.png")
        if args.score_every and (step + 1) % args.score_every == 0 and step + 1 < args.iters:
            evaluate(run, scorer, generate, args.steps, who, f"progress/{step + 1:07d}", nfe)

    evaluate(run, scorer, generate, args.steps, who, nfe=nfe)


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
