"""shortcut.py: One Step Diffusion via Shortcut Models (Frans et al. 2024, arXiv 2410.12557), all of it.

One network, one training: s(x_t, t, d) is the velocity that jumps by d, x_{t+d} = x_t + d s(x_t, t, d).

    L = | s(x_t, t, d) - (x_1 - x_0) |^2                     at the finest d = 1/128: flow matching
      + | s(x_t, t, 2d) - sg[s(x_t, t, d) + s(x_{t+d}, t+d, d)] / 2 |^2         self-consistency (Eq. 4, 5)

Time runs from noise to data: x_0 is noise, x_1 is the image, x_t = (1 - t) x_0 + t x_1.

    python shortcut.py --steps 1                     # shapes on two CPU cores: about 8 minutes
    python shortcut.py --data cifar10 --steps 1,4    # on a GPU
    python shortcut.py --k 0 --out runs/flow         # the flow-matching baseline, from the same file

Departs from the paper in:
  * pixels and a small UNet for latents and a DiT; the learning rate decays to zero, gradients are clipped;
  * the finest level is d = 1/128, as in the official code (the paper: d = 0, one more value, same losses);
  * the network sees log2 d on [0, 1], not d, and predicts what is left of s when ... ;
  * no clip of x' and targets at +-4 (official code): that is the range of SD latents;
  * every batch size trains every length: the lengths of a batch are dealt in turn from a random start
    (the official code gives small batches nothing but d = 1).
"""
import argparse
import csv
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
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import fid
from fid import UserError, from_uint8, to_uint8
from nets import UNet

METHOD = "shortcut"
M = 128                         # the finest grid: lengths 1/128, 1/64, ..., 1/2, 1
LEVELS = int(math.log2(M))      # 7 lengths above the finest

PRESETS = dict(
    #            shapes     cifar10    folder     imagenet64
    iters      =(5500,      200_000,   100_000,   400_000),
    batch      =(16,        256,       128,       256),
    lr         =(5e-3,      6e-4,      6e-4,      4e-4),
    samples    =(2048,      50_000,    10_000,    50_000),
    features   =("random",  "auto",    "auto",    "auto"),
    resolution =(32,        32,        32,        64),
    flip       =("no",      "yes",     "yes",     "yes"),
    channels   =(32,        96,        64,        128),
    mult       =((1, 2, 4), (1, 2, 2), (1, 2, 4), (1, 2, 3, 4)),
    blocks     =((1, 1, 1), (2, 2, 2), (1, 2, 2), (2, 2, 2, 2)),
    attention  =((),        (16,),     (8,),      (16, 8)),
    dropout    =(0.0,       0.1,       0.1,       0.0),
    ema        =(0.995,     0.999,     0.999,     0.9999),
)


def method_options(add):
    add("--k", type=float, default=0.25, help="share of a batch with self-consistency targets; 0: flow matching")
    add("--cfg", type=float, default=1.0, help="guidance scale at the finest level, baked into the longer "
        "jumps; 1: off")
    add("--label-dropout", type=float, default=0.1, help="share of labels replaced by the null class when "
        "--cfg is on")


def check_method(args):
    for n in args.steps:
        if n not in [2 ** i for i in range(LEVELS + 1)]:
            raise UserError(f"--steps {n}: a shortcut model jumps in 1, 2, 4, ... or {M} steps")
    if not 0 <= args.k <= 1:
        raise UserError(f"--k {args.k}: is a share of the batch, 0 to 1")
    if args.cfg < 0 or not 0 <= args.label_dropout < 1:
        raise UserError(f"--cfg {args.cfg} --label-dropout {args.label_dropout}: expected a scale of at least "
                        "0 and a share from 0 to below 1")


# ---- common: arguments ---------------------------------------------------------------------------------

FREE = ("steps samples labels features inception device precision compile npz").split()


def refuse(message):
    raise UserError(message)


def numbers(text):
    return tuple(int(n) for n in text.split(",") if n.strip())


def parse_args(argv=None):
    """Command line, over the stored arguments of an existing run, over the preset of the data set."""
    parser = argparse.ArgumentParser(prog=f"{METHOD}.py", description=__doc__.partition("\n")[0],
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    kinds, defaults = ("shapes", "cifar10", "folder", "imagenet64"), {}

    def add(flag, default=None, help="", **kwargs):
        name = flag[2:].replace("-", "_")
        defaults[name] = PRESETS.get(name, (default,) * len(kinds))
        show = lambda v: ",".join(map(str, v)) or "none" if isinstance(v, tuple) else v
        shown = ", ".join(f"{show(v)} ({k})" for k, v in zip(kinds, defaults[name])) \
            if name in PRESETS else show(default)
        note = "" if shown is None or kwargs.get("action") else f" [{shown}]"
        parser.add_argument(flag, help=(help + note).replace("%", "%%"), **kwargs)

    add("--steps", type=numbers, default=(1, 2, 4, 128), help="sampling steps (network calls), a comma list")
    add("--data", default="shapes", help="shapes, cifar10, a folder of images (subfolders are classes), or "
        "a folder of downsampled-ImageNet train_data_batch_*.npz")
    add("--out", help=f"run folder [runs/{METHOD}-DATA]")
    add("--iters", type=int, help="length of the training")
    add("--batch", type=int, help="images per update")
    add("--lr", type=float, help="peak learning rate; warms up, then decays to 0 by a cosine")
    add("--weight-decay", type=float, default=0.1, help="AdamW's")
    add("--ema", type=float, help="decay of the weights' running mean")
    add("--seed", type=int, default=0, help="of weights, training and samples")
    add("--device", default="auto", help="cpu, cuda, mps")
    add("--precision", default="auto", choices=["auto", "bf16", "fp32"], help="auto: bf16 where it is fast")
    add("--compile", action="store_true", default=False, help="torch.compile the networks")
    add("--samples", type=int, help="images to score for each of --steps; 0: pictures only")
    add("--labels", help="classes to draw, a comma list of names or numbers [all in turn]")
    add("--features", choices=["auto", "inception", "random"], help="of the score; auto: inception where "
        "its weights can be had")
    add("--inception", help="path of the Inception weights")
    add("--npz", action="store_true", default=False, help="keep the scored samples as samples-Nstep.npz")
    add("--resolution", type=int, help="side of the images")
    add("--flip", choices=["yes", "no"], help="mirror training images at random")
    add("--channels", type=int, help="width of the network's first stage")
    add("--mult", type=numbers, help="width of each stage, in --channels; each stage halves the resolution")
    add("--blocks", type=numbers, help="residual blocks of each stage")
    add("--attention", type=numbers, help="resolutions with self-attention")
    add("--dropout", type=float, help="in the residual blocks")
    method_options(add)
    given = vars(parser.parse_args(argv))

    given.setdefault("data", None)
    out = given.get("out") or f"runs/{METHOD}-{pathlib.Path(given['data'] or 'shapes').resolve().name}"
    stored = read_json(pathlib.Path(out) / "args.json").get("args", {})
    if stored and stored.get("method") != METHOD:
        raise UserError(f"{out}: holds a run of {stored.get('method')}.py; give another --out")
    given["data"] = given["data"] or stored.get("data", "shapes")
    kind = kinds.index(fid.kind_of(given["data"]))
    args = {name: values[kind] for name, values in defaults.items()}
    args |= {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items() if n not in FREE}
    for name, value in given.items():
        if stored and name not in FREE and name != "out" and args[name] != value:
            raise UserError(f"{out}: was trained with --{name.replace('_', '-')} {stored.get(name)}, not "
                            f"{value}; give another --out, or leave that option away")
    args = argparse.Namespace(**args | given | dict(out=out, method=METHOD))

    for name, low in dict(iters=1, batch=1, samples=0, channels=16, resolution=8).items():
        if getattr(args, name) < low:
            raise UserError(f"--{name} {getattr(args, name)}: expected at least {low}")
    if not args.steps or not 0 < args.lr < 1 or not 0 <= args.ema < 1 or not 0 <= args.dropout < 1:
        raise UserError("--steps needs a number; --lr, --ema and --dropout lie between 0 and 1")
    if args.channels % 16 or len(args.mult) != len(args.blocks) or min(args.mult + args.blocks) < 1:
        raise UserError("--channels is a multiple of 16; --mult and --blocks are as many numbers of 1 or more")
    if args.resolution % 2 ** (len(args.mult) - 1):
        raise UserError(f"--resolution {args.resolution}: cannot be halved {len(args.mult) - 1} times")
    check_method(args)
    return args


def read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def set_up(args):
    """-> device, autocast context for the networks."""
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: not available here "
                        f"({str(error).splitlines()[0]})") from None
    device, bf16 = torch.device(device), args.precision == "bf16"
    if args.precision == "auto":
        cpu = lambda: torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        bf16 = cpu() if device.type == "cpu" else device.type == "cuda" and torch.cuda.is_bf16_supported(False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    return device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


# ---- schedule --------------------------------------------------------------------------------------------

def expand(t):
    return t[:, None, None, None]                                                   # [B] -> [B, 1, 1, 1]


def draw_t_d(batch, k, device="cpu"):
    """Times and lengths of a batch: t, d [batch], and n, the number of self-consistency rows (the first).

    Rows from n on are flow matching: d = 1/M and t ~ U(0, 1). The first n have the lengths 1/64 ... 1 in
    turn from a random start, so every batch size trains every length alike; t is a multiple of d below 1.
    """
    n = int(k * batch + torch.rand(()).item())                                      # k batch on average
    t, d = torch.rand(batch, device=device), torch.full((batch,), 1 / M, device=device)
    level = (torch.arange(n, device=device) + torch.randint(LEVELS, (1,), device=device)) % LEVELS
    d[:n] = 0.5 ** level
    t[:n] = (t[:n] / d[:n]).floor() * d[:n]
    return t, d, n


# ---- losses ----------------------------------------------------------------------------------------------

def guided(s, x, t, d, y, cfg_scale=1.0, null_class=0):
    """Classifier-free guidance, at the finest length only: longer jumps have learned it. 1 = off."""
    v = s(x, t, d, y)
    if cfg_scale == 1:
        return v
    v_null = s(x, t, d, torch.full_like(y, null_class))
    return torch.where(expand(d <= 1 / M), v_null + cfg_scale * (v - v_null), v)


@torch.no_grad()
def two_half_steps(s, x_t, t, d, y, cfg_scale=1.0, null_class=0):
    """The target of a jump of length d: the mean velocity of two jumps of d/2 (Eq. 4). No gradient."""
    half = d / 2
    s_1 = guided(s, x_t, t, half, y, cfg_scale, null_class)
    x_mid = x_t + expand(half) * s_1                        # the model's own point, not one of the data's path
    s_2 = guided(s, x_mid, t + half, half, y, cfg_scale, null_class)
    return (s_1 + s_2) / 2


def shortcut_loss(s, s_ema, x_0, x_1, t, d, n, y, y_flow, cfg_scale=1.0, null_class=0):
    """Eq. 5, one batch mean over both parts.

    s, s_ema: callables (x, t, d, y) -> velocity; x_0 noise and x_1 images [B, 3, R, R]; t, d [B], of which the
    first n rows are self-consistency; y [B] labels, y_flow [B] the same with some dropped.
    Returns the scalar loss and its parts, detached.
    """
    x_t = torch.lerp(x_0, x_1, expand(t))                                           # Eq. 1
    target = x_1 - x_0
    if n:
        target[:n] = two_half_steps(s_ema, x_t[:n], t[:n], d[:n], y[:n], cfg_scale, null_class)
    y = torch.cat([y[:n], y_flow[n:]])
    error = (s(x_t, t, d, y) - target).square().mean((1, 2, 3))                     # [B]
    return error.mean(), dict(loss_flow=error[n:].mean().detach(), loss_shortcut=error[:n].mean().detach())


# ---- sampler ---------------------------------------------------------------------------------------------

@torch.no_grad()
def sample(s, x_0, y, steps, cfg_scale=1.0, null_class=0):
    """Algorithm 2: `steps` jumps of d = 1/steps from noise x_0 [B, 3, R, R] to images; labels y [B]."""
    x, d = x_0, torch.full((len(x_0),), 1 / steps, device=x_0.device)
    for i in range(steps):
        x = x + guided(s, x, i * d, d, y, cfg_scale, null_class) / steps
    return x


# ---- common: the run folder ------------------------------------------------------------------------------

class Run:
    """A run folder: its arguments, log and checkpoint, and the signals that end it.

    modules: all that must be as it was when the training goes on, by name. Each step draws from generators
    seeded by (seed, step), so the step is all the random state there is.
    """

    def __init__(self, args, modules, device):
        self.args, self.modules, self.device = args, modules, device
        self.folder, self.step, self.signal, self.sums, self.bar = pathlib.Path(args.out), 0, None, {}, None
        self.checkpoint = self.folder / "checkpoint.pt"
        try:
            (self.folder / "progress").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from None
        if self.checkpoint.exists():
            self.load()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)               # a second one ends it at once

    def write(self, name, write):
        """Write a file by write(temporary path) and rename it: whole or not at all."""
        path = self.folder / name
        temporary = path.with_name(f".{path.name}")         # keeps the suffix, by which writers choose a format
        try:
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"{path}: cannot be written ({error}); what was there is kept") from None

    def begin(self, kind):
        """Record what is about to run, before the first step."""
        git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                             cwd=pathlib.Path(__file__).parent)
        about = dict(args=vars(self.args), command=sys.argv, git=git.stdout.strip() or None,
                     python=platform.python_version(), torch=torch.__version__, images=kind,
                     device=torch.cuda.get_device_name() if self.device.type == "cuda"
                     else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
        self.write("args.json", lambda p: p.write_text(json.dumps(about, indent=1)))
        log = self.folder / "log.csv"                       # a run that was killed has logged too far
        rows = list(csv.DictReader(log.open())) if log.exists() else []
        self.rows = [row for row in rows if int(row["step"]) <= self.step]

    def save(self):
        state = {name: module.state_dict() for name, module in self.modules.items()}
        self.write("checkpoint.pt", lambda p: torch.save(dict(method=METHOD, step=self.step, **state), p))

    def load(self):
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            if state.get("method") != METHOD:
                raise UserError(f"{self.checkpoint}: is of {state.get('method')}.py, not {METHOD}.py")
            for name, module in self.modules.items():
                module.load_state_dict(state[name])
            self.step = state["step"]
        except UserError:
            raise
        except Exception as error:                          # torch raises anything on a bad file
            raise UserError(f"{self.checkpoint}: does not load ({str(error).splitlines()[0][:120]}); "
                            "remove it to train anew") from None

    def steps(self):
        """Yield the steps that are left; between them keep the checkpoint, and stop for a signal."""
        args, saved = self.args, time.time()
        self.bar = tqdm(total=args.iters, initial=self.step, desc="training", unit="it", disable=None)
        self.began = time.time(), self.step
        while self.step < args.iters:
            torch.manual_seed(args.seed * 1_000_003 + self.step)
            yield self.step
            self.step += 1
            self.bar.update()
            last = self.step == args.iters
            if self.step % 50 == 0 or last or self.signal:
                self.log()
            if last or self.signal or time.time() - saved > 60:
                self.save()
                saved = time.time()
            if self.signal:
                self.bar.close()
                print(f"stopped at step {self.step} of {args.iters}; the same command goes on from there")
                sys.exit(128 + self.signal)
        self.bar.close()

    def add(self, **scalars):
        """Collect the step's scalars; they stay on the device until the next log line."""
        for name, value in scalars.items():
            total, count = self.sums.get(name, (0, 0))
            self.sums[name] = total + value, count + 1

    def log(self):
        """One row of log.csv: means since the last row. A loss that is not finite ends the run."""
        (start, step), now = self.began, time.time()
        row = dict(step=self.step, **{name: float(total / count) for name, (total, count) in self.sums.items()},
                   img_per_s=round((self.step - step) * self.args.batch / (now - start), 1))
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if bad:
            self.bar.close()
            raise UserError(f"{bad[0]} is not finite at step {self.step}; the last checkpoint is kept: "
                            "start anew with a lower --lr, or with --precision fp32")
        self.rows.append({name: f"{value:.6g}" for name, value in row.items()})
        self.sums, self.began = {}, (now, self.step)
        self.bar.set_postfix({n: f"{v:.3g}" for n, v in row.items() if n.startswith("loss") or n == "img_per_s"})

        def write(path):
            names = list(dict.fromkeys(itertools.chain(*self.rows)))
            with open(path, "w", newline="") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader(), writer.writerows(self.rows)
        self.write("log.csv", write)


# ---- common: pictures and scores -------------------------------------------------------------------------

def noise(n, args, offset=0):
    """Noise [n, 3, R, R] of samples offset, offset + 1, ...: each has its own seed, so none depends on the
    batch it is drawn in, nor on the device."""
    shape, seeds = (3, args.resolution, args.resolution), range(offset, offset + n)
    rng = lambda i: torch.Generator().manual_seed(args.seed * 1_000_003 + i)
    return torch.stack([torch.randn(shape, generator=rng(i)) for i in seeds])


def labels_to_draw(args, images):
    """The classes that samples run through in turn, [C] int64; [0], the null class, without classes."""
    if not args.labels:
        return torch.arange(max(1, len(images.classes)))
    if not images.classes:
        raise UserError(f"--labels {args.labels}: {images.name} has no classes")
    picked = []
    for name in map(str.strip, args.labels.split(",")):
        if name in images.classes:
            picked.append(images.classes.index(name))
        elif name.isdecimal() and int(name) < len(images.classes):
            picked.append(int(name))
        else:
            known = ", ".join(images.classes[:12]) + (", ..." if len(images.classes) > 12 else "")
            raise UserError(f"--labels {name}: unknown class of {images.name}; there are {known}")
    return torch.tensor(picked)


def save_grid(run, name, rows):
    """rows: list of float images [C, 3, R, R] in [-1, 1], one list entry a row of the picture."""
    pixels = to_uint8(torch.cat(rows).cpu())
    grid = torchvision.utils.make_grid(pixels, nrow=len(rows[0]), padding=2, pad_value=40)
    scale = max(1, 64 // run.args.resolution)               # so that 32x32 images can be seen
    grid = grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    run.write(name, Image.fromarray(grid.permute(1, 2, 0).numpy()).save)


def draw(run, generate, classes, steps):
    """Rows of a progress picture: the same noise at each number of steps, columns = classes."""
    y = classes.repeat(10)[:10].to(run.device)
    z = noise(len(y), run.args).to(run.device)
    return [generate(z, y, n) for n in steps]


def evaluate(run, images, generate, steps, who):
    """Sample at each number of steps, save the pictures, and score against the training images.

    generate: (noise [B, 3, R, R], labels [B], steps) -> images in [-1, 1]. Prints a protocol line each.
    """
    args, classes = run.args, labels_to_draw(run.args, images)
    net = reference = None
    if args.samples:
        net = fid.load_features(args.features, run.device, args.inception)
        real = images.pixels[torch.isin(images.labels, classes)] if args.labels else images.pixels
        reference = fid.statistics(net, real, "features of the data")
    columns = classes[:10].repeat(10)[:10] if len(classes) < 10 else classes[:10]
    for n in steps:
        count = max(args.samples, 80)
        labels = torch.cat([columns.repeat(8), classes.repeat(count // len(classes) + 1)])[:count]
        pixels, spent = [], 0.0
        bar = tqdm(total=count, desc=f"sampling, {n} step{'s' * (n > 1)}", unit="img", leave=False, disable=None)
        for i in range(0, count, 256):
            y = labels[i:i + 256].to(run.device)
            z = noise(len(y), args, offset=i).to(run.device)
            start = time.perf_counter()
            pixels.append(to_uint8(generate(z, y, n)).cpu())                        # .cpu() waits for the device
            spent += time.perf_counter() - start
            bar.update(len(y))
            if run.signal:
                bar.close()
                print("stopped while sampling; the training is safe, the same command samples again")
                sys.exit(128 + run.signal)
        bar.close()
        pixels = torch.cat(pixels)
        save_grid(run, f"samples-{n}step.png", list(from_uint8(pixels[:80]).split(10)))
        if args.npz:
            run.write(f"samples-{n}step.npz", lambda p: np.savez(
                p, images=pixels.permute(0, 2, 3, 1).numpy(), labels=labels.numpy()))
        if not args.samples:
            continue
        pixels = pixels[:args.samples]
        value = fid.distance(fid.statistics(net, pixels, "features"), reference)
        line = (f"{net.label} {value:.4g} | {'inception' if net.label == 'FID' else 'random'} | {len(pixels)} samples "
                f"vs {reference.n} {images.name} | NFE {n} | {who} | {count / spent:.0f} img/s")
        print(line + " | fewer than 2048 samples: biased upward" * (len(pixels) < 2048))
        scores = run.folder / "scores.csv"
        old = scores.read_text() if scores.exists() else "step,nfe,metric,value,samples,reference,who,img_per_s\n"
        run.write("scores.csv", lambda p: p.write_text(
            f"{old}{run.step},{n},{net.label},{value:.6g},{len(pixels)},{reference.n} {images.name},{who},"
            f"{count / spent:.1f}\n"))


# ---- main ------------------------------------------------------------------------------------------------

class Shortcut(nn.Module):
    """s(x_t, t, d, y) = c_skip x_t + c_out net(c_in x_t, t, log2 d, y), EDM's preconditioning for this path.

    For images of variance a^2, x_t has variance S^2 = (1-t)^2 + (t a)^2; c_skip x_t is the best linear guess of
    x_1 - x_0, and c_out the deviation of what is left, so the network's target has variance one at every t. At
    t = 0, s = a net - x_0: one step gives x_1 = a net, an image that no noise has to pass through.
    """

    def __init__(self, net, a=0.5):
        super().__init__()
        self.net, self.a = net, a

    def forward(self, x, t, d, y):
        S = expand((1 - t) ** 2 + (t * self.a) ** 2).sqrt()
        c_skip = (expand(t) * (1 + self.a ** 2) - 1) / S ** 2
        return c_skip * x + self.a / S * self.net(x / S, t, d.log2() / -LEVELS, y)


def main(argv=None):
    args = parse_args(argv)
    device, autocast = set_up(args)
    images = fid.load_images(args.data, args.resolution)
    null_class, classes = len(images.classes), labels_to_draw(args, images)
    pixels, labels = images.pixels.to(device), images.labels.to(device)

    torch.manual_seed(args.seed)
    s = Shortcut(UNet(args.resolution, args.channels, args.mult, args.blocks, args.attention, null_class,
                      conditions=2, dropout=args.dropout)).to(device, memory_format=torch.channels_last)
    s_ema = AveragedModel(s, multi_avg_fn=get_ema_multi_avg_fn(args.ema))           # targets and evaluation
    s_ema.eval().requires_grad_(False)
    opt = torch.optim.AdamW(s.parameters(), args.lr, (0.9, 0.99), weight_decay=args.weight_decay, fused=True)
    warmup = min(100, args.iters // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: min(1, (i + 1) / warmup)
                                                 * (0.5 + 0.5 * math.cos(math.pi * i / args.iters)))
    run = Run(args, dict(s=s, s_ema=s_ema, opt=opt, schedule=schedule), device)
    cfg = dict(cfg_scale=args.cfg, null_class=null_class)

    def generate(z, y, steps):
        with autocast:
            return sample(s_ema, z, y, steps, **cfg)

    if run.step < args.iters:
        run.begin(images.name)
    for step in run.steps():
        i = torch.randint(len(pixels), (args.batch,)).to(device)
        x_1, y = from_uint8(pixels[i]), labels[i]
        if args.flip == "yes":
            x_1 = torch.where(expand(torch.rand(args.batch, device=device) < 0.5), x_1.flip(3), x_1)
        y_flow = y
        if args.cfg != 1:
            y_flow = torch.where(torch.rand(args.batch, device=device) < args.label_dropout, null_class, y)
        x_0 = torch.randn_like(x_1)
        t, d, n = draw_t_d(args.batch, args.k, device)
        with autocast:
            loss, parts = shortcut_loss(s, s_ema, x_0, x_1, t, d, n, y, y_flow, **cfg)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(s.parameters(), 1.0)
        opt.step(), schedule.step(), opt.zero_grad()
        s_ema.update_parameters(s)
        run.add(loss=loss.detach(), **parts, grad_norm=grad_norm)
        if (step + 1) % max(1, args.iters // 10) == 0:
            save_grid(run, f"progress/{step + 1:07d}.png", draw(run, generate, classes, (1, 2, 4, 128)))
    evaluate(run, images, generate, args.steps, "shortcut ema" if args.k else "flow ema")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{METHOD}.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:                               # before the training: nothing to save
        sys.exit(130)
