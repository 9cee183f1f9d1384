"""How fast the methods are, as ratios measured in one run. By hand, on an idle machine:

    python tests/benchmark.py                     # every row: 20 minutes on two cores
    python tests/benchmark.py dmd2 precision      # some of them

Steps are those of the scripts' own main(), with a clock in its loop. The variants of a row take
turns; a figure is the median of the rounds, with the smallest and the largest.
"""
import argparse
import contextlib
import functools
import importlib
import os
import statistics
import sys
import tempfile
import time
from unittest import mock

import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import add  # noqa: E402
import dmd2  # noqa: E402
import fid  # noqa: E402
import nets  # noqa: E402
import shortcut  # noqa: E402

# Options that go to the last phase at once.
METHODS = dict(shortcut="", dmd2="--teacher-iters 1 --teacher-steps 1 --pairs-iters 0",
               add="--teacher-iters 1 --teacher-steps 1")
NETWORK = "channels mult blocks attention dropout".split()


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# torch counts the fused attention of GPUs alone.
ATTENTION = "_scaled_dot_product_flash_attention"
for way in "", "_backward":
    flop_registry.setdefault(getattr(torch.ops.aten, f"{ATTENTION}_for_cpu{way}"),
                             flop_registry[getattr(torch.ops.aten, ATTENTION + way)])


class Flops(TorchDispatchMode):
    """Counts those of convolutions and matrix products. (torch's FlopCounterMode also counts by
    module, which torch.autograd.grad does not stand.)"""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


class Clock:
    """What a training's last phase takes: seconds of whole steps, and of their parts by name."""

    def __init__(self):
        self.steps, self.parts, self.flops, self.memory = [], {}, 0, 0

    def seconds(self):
        return statistics.median(self.steps)

    def timed(self, name, function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts.setdefault(name, []).append(now() - start)
        return call


def train(args, script, *options, steps=None, parts=False, flops=False):
    """-> the Clock of a few steps of script.main(), without pictures and scores.

    parts: time them too (a GPU is waited for at each). flops: count those of a step (it is slow).
    """
    clock, steps = Clock(), steps or args.steps
    every = 1 if parts or not torch.cuda.is_available() else args.every
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()                                   # its limit of graphs is a process's

    def watched(self, end, what, images, inner=script.Run.steps):
        if what not in ("training", "distillation"):
            yield from inner(self, end, what, images)
            return
        before = stop = 0
        for step in inner(self, end, what, images):
            due = (step - (end - steps)) % every == 0
            start = now() if due else time.perf_counter()
            if step > end - steps:                          # the first are for warming up
                clock.parts.setdefault("loop", []).append(start - stop)
                if due:
                    clock.steps.append((start - before) / every)
            elif step == end - steps:
                clock.parts.clear()
            before = start if due else before
            with Flops() if flops else contextlib.nullcontext() as counter:
                yield step
            stop = now() if parts else time.perf_counter()
            clock.flops += counter.total / (steps + 3) if flops else 0

    with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as patches:
        def patch(owner, name, value):
            patches.enter_context(mock.patch.object(owner, name, value))
        patch(script.Run, "steps", watched)
        for name, owner, function in [("sums for the log", script.Run, "add"),
                                      ("data", script, "draw_batch"),
                                      ("running mean", AveragedModel, "update_parameters")]:
            if parts:
                patch(owner, function, clock.timed(name, getattr(owner, function)))
        for name in ("draw", "evaluate", "save_grid"):
            patch(script, name, lambda *args, **kwargs: None)
        patch(fid, "quiet", lambda: True)
        patch(sys, "stdout", patches.enter_context(open(os.devnull, "w")))
        script.main([*METHODS[script.METHOD].split(), "--samples", "0", "--iters", str(steps + 3),
                     "--out", out, *args.options, *options])
    if torch.cuda.is_available():
        clock.memory = torch.cuda.max_memory_allocated()
    return clock


def parse(args, script, *options):
    """A run's arguments, whatever runs there are already."""
    with tempfile.TemporaryDirectory() as out:
        return script.parse_args([*args.options, *options, "--samples", "0", "--out", out])


def preset(script, column, *names):
    """The options of a preset's network, and of further names."""
    i, options = script.KINDS.index(column), []
    for name in (*NETWORK, *names):
        value = script.PRESETS[name][i]
        options += [f"--{name.replace('_', '-')}", script.show(value) or "none"]
    return options


def turns(args, variants):
    """Run the variants by turns -> each one's results, by round."""
    results = [[] for _ in variants]
    for _ in range(args.rounds):
        for result, variant in zip(results, variants):
            result.append(variant())
    return results


def clocked(args, script, *variants):
    """Seconds of a step of each variant (a tuple of options) -> a list of each, by rounds."""
    runs = [lambda options=options: train(args, script, *options).seconds() for options in variants]
    return turns(args, runs)


def line(name, values, unit=""):
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{name:<64}{middle:>9.4g}{unit:<10} [{low:.4g} - {high:.4g}]", flush=True)


def ratio(name, a, b):
    line(name, [x / y for x, y in zip(a, b)], " x")


# ---- the rows ------------------------------------------------------------------------------------

def row_shortcut(args):
    own, flow = clocked(args, shortcut, (), ("--k", "0"))
    ratio("shortcut: step over that of flow matching", own, flow)


def generator_losses_apart(real_score, fake_score, disc, x0, sigma, eps, y, dm=True, gan=True):
    """As the official code does: the logit has a noise and a pass of its own."""
    x_t = x0 + dmd2.expand(sigma) * eps
    with torch.no_grad():
        mu_real, mu_fake = real_score(x_t, sigma, y), fake_score(x_t, sigma, y)
        target = x0 - dmd2.dm_gradient(x0, mu_real, mu_fake)
    x_t = x0 + dmd2.expand(sigma) * torch.randn_like(x0)
    loss_gan = F.softplus(-disc(fake_score.encode(x_t, sigma, y))).mean()
    return 0.5 * (x0 - target).square().mean(), loss_gan


def fake_score_losses_apart(fake_score, disc, x0, real, sigma, eps, y):
    n = len(x0)
    loss_fake = dmd2.denoising_loss(fake_score, x0, sigma[:n], eps[:n], y[:n])
    logits = [disc(fake_score.encode(x + dmd2.expand(sigma[i]) * torch.randn_like(x), sigma[i],
                                     y[i]))
              for x, i in ((x0, slice(n)), (real, slice(n, None)))]
    return loss_fake, F.softplus(logits[0]).mean() + F.softplus(-logits[1]).mean()


def row_dmd2(args):
    def apart(*options):
        with mock.patch.object(dmd2, "generator_losses", generator_losses_apart), \
                mock.patch.object(dmd2, "fake_score_losses", fake_score_losses_apart):
            return train(args, dmd2, *options).seconds()
    for n in (5, 2):
        options = "--fake-updates", str(n)
        own, official = turns(args, [lambda: train(args, dmd2, *options).seconds(),
                                     lambda: apart(*options)])
        ratio(f"dmd2: cycle of 1 + {n} updates over that of separate passes", own, official)


def matrix_rate(args, device, precision):
    """FLOP/s of a matrix product."""
    a = torch.randn(args.matrix, args.matrix, device=device,
                    dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    times = []
    for _ in range(4):
        start = now()
        a @ a
        times.append(now() - start)
    return 2 * args.matrix ** 3 / min(times[1:])


def row_arithmetic(args):
    """A step's rate of arithmetic over that of the bare network's forward and backward pass."""
    p = parse(args, shortcut)
    device, autocast = shortcut.set_up(p)
    net = nets.UNet(p.resolution, p.channels, p.mult, p.blocks, p.attention, 10).to(
        device, memory_format=torch.channels_last)
    x, t = torch.randn(p.batch, 3, p.resolution, p.resolution, device=device), \
        torch.rand(p.batch, device=device)

    def passes():
        with autocast:
            loss = net(x, t).square().mean()
        loss.backward()

    def bare():
        every = args.every if device.type == "cuda" else 1  # as `train` looks at the clock
        passes(), passes()
        times = [now()]
        for i in range(args.steps):
            passes()
            if (i + 1) % every == 0:
                times.append(now())
        return statistics.median(b - a for a, b in zip(times, times[1:])) / every

    with Flops() as counter:
        passes()
    scripts = shortcut, dmd2, add
    flops = [train(args, script, flops=True).flops for script in scripts]
    peaks, bares, *own = turns(args, [
        lambda: matrix_rate(args, device, p.precision), bare,
        *(lambda script=script: train(args, script).seconds() for script in scripts)])
    line(f"matrix product of side {args.matrix}, {p.precision}", [v / 1e9 for v in peaks],
         " GFLOP/s")
    rates = [counter.total / v for v in bares]
    line(f"UNet, {sum(w.numel() for w in net.parameters()) / 1e6:.1f}M weights, batch {p.batch}: "
         "forward and backward", [v / 1e9 for v in rates], " GFLOP/s")
    ratio("    over the matrix product", rates, peaks)
    for script, count, seconds in zip(scripts, flops, own):
        name = script.METHOD
        line(f"{name}: step of {count / 1e9:.1f} GFLOP", [1e3 * v for v in seconds], " ms")
        ratio("    over its arithmetic at the bare UNet's rate", seconds,
              [count / v for v in rates])
        ratio("    its arithmetic over the matrix product",
              [count / v for v in seconds], peaks)


def row_precision(args):
    for column, batch in ("shapes", ()), ("cifar10", ("--batch", str(args.wide_batch))):
        options = *preset(shortcut, column), *batch, "--k", "0"
        fp32, bf16 = clocked(args, shortcut, (*options, "--precision", "fp32"),
                             (*options, "--precision", "bf16"))
        ratio(f"bf16: images a second over those of fp32, network of {column}", fp32, bf16)


def row_compile(args):
    for name in METHODS:
        script = importlib.import_module(name)
        eager, compiled = clocked(args, script, (), ("--compile",))
        ratio(f"{name} --compile: images a second over those of eager", eager, compiled)


def row_cifar10(args):
    """Whole steps at the preset of cifar10, for an accelerator; a CPU has a smaller batch. The
    figures are of five stretches of one training, as to compile anew each round would take long."""
    device = fid.pick_device("auto")
    for name in METHODS:
        script = importlib.import_module(name)
        names = "batch fake_updates dm_levels fake_levels disc_maps gan_weight gan_cap".split()
        options = preset(script, "cifar10", *(n for n in names if n in script.PRESETS))
        if device.type == "cpu":
            options += args.options or ["--batch", str(args.wide_batch)]
        p = parse(args, script, *options)
        script.set_up(p)
        images = p.batch * getattr(p, "fake_updates", 1)    # of a step, as log.csv counts them
        flops = train(args, script, *options, steps=1, flops=True).flops
        peak = matrix_rate(args, device, p.precision)
        for extra in ((), ("--compile",)) if device.type == "cuda" else ((),):
            clock = train(args, script, *options, *extra, steps=5 * args.every + 1)
            what = f"{name}{' '.join(['', *extra])}, cifar10's preset, batch {p.batch}: "
            line(f"{what}images a second", [images / s for s in clock.steps])
            line("    its arithmetic over the matrix product",
                 [flops / s / peak for s in clock.steps], " x")
            if clock.memory:
                print(f"    {flops / 1e9:.0f} GFLOP a step, peak memory "
                      f"{clock.memory / 2 ** 30:.1f} GiB", flush=True)


def row_overhead(args):
    for name in METHODS:
        shares = {}
        for _ in range(args.rounds):
            clock = train(args, importlib.import_module(name), steps=min(36, 3 * args.steps),
                          parts=True)                       # fewer than to a row of the log
            whole = sum(clock.steps) * (1 + 1 / len(clock.steps))   # the last has no successor
            parts = {part: sum(times) / whole for part, times in clock.parts.items()}
            for part, share in (parts | dict(total=sum(parts.values()))).items():
                shares.setdefault(part, []).append(100 * share)
        for part, values in shares.items():
            line(f"{name}: {part}, of a step", values, " %")


def row_sampler(args):
    p = parse(args, shortcut)
    device, autocast = shortcut.set_up(p)
    s = shortcut.Shortcut(nets.UNet(p.resolution, p.channels, p.mult, p.blocks, p.attention, 10,
                                    conditions=2)).to(device, memory_format=torch.channels_last)
    s.eval()
    for steps in (1, 2, 4, 128):
        n = args.images if steps < 128 else max(1, args.images // 16)
        x = torch.randn(n, 3, p.resolution, p.resolution, device=device)
        y = torch.zeros(n, dtype=torch.int64, device=device)
        values = []
        for _ in range(args.rounds + 1):
            start = now()
            with torch.no_grad(), autocast:
                shortcut.sample(s, x, y, steps)
            values.append(n * steps / (now() - start))
        line(f"sampler, {steps} step{'s' * (steps > 1)}: network calls of an image a second",
             values[1:])


def row_score(args):
    device = fid.pick_device("auto")
    for name, net, n in (("random", fid.RandomFeatures(), args.images),
                         ("Inception", fid.Inception(), max(2, args.images // 16))):
        net, values = net.to(device).eval(), []
        pixels = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8)
        for _ in range(args.rounds + 1):
            start = now()
            fid.statistics(net, pixels)
            values.append(n / (now() - start))
        line(f"{name} features, images a second", values[1:])
    import scipy.linalg
    a, b = (torch.cov(torch.randn(args.features, 2 * args.features, dtype=torch.float64))
            for _ in range(2))
    mu = torch.zeros(args.features, dtype=torch.float64)

    def seconds(function):
        start = now()
        function()
        return now() - start
    own, sqrtm = turns(args, [lambda: seconds(lambda: fid.frechet_distance(mu, a, mu, b)),
                              lambda: seconds(lambda: scipy.linalg.sqrtm((a @ b).numpy()))])
    ratio(f"distance of {args.features} features: scipy's sqrtm over it", sqrtm, own)


ROWS = {name[4:]: row for name, row in list(globals().items()) if name.startswith("row_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition(" By hand")[0])
    parser.error = lambda what: parser.exit(2, f"benchmark.py: {what}\n")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(ROWS) + " [all]")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    unknown = set(args.rows) - set(ROWS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    args.steps, args.matrix, args.images, args.features, args.wide_batch = 12, 4096, 256, 2048, 8
    args.options, args.every = [], 4                        # every: steps between looks at a GPU
    if torch.cuda.is_available():
        args.steps, args.matrix = 21, 8192
    if args.small:
        args.rounds, args.steps, args.matrix, args.images, args.features = 1, 2, 64, 2, 16
        args.every, args.wide_batch = 1, 4
        args.options = "--resolution 16 --channels 16 --mult 1,1 --blocks 1,1 --batch 4".split()
    load = functools.cache(fid.load_images)                 # drawn once
    with mock.patch.object(fid, "load_images", load):
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
              f"{'cuda' if torch.cuda.is_available() else 'cpu'}; median [min - max] of "
              f"{args.rounds}", flush=True)
        for name in args.rows or ROWS:
            ROWS[name](args)


if __name__ == "__main__":
    main()
