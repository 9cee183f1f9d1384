"""dmd2.py proved: the official code's recorded numbers (DMD2, EDM), exact denoisers of Gaussians,
and the loop's own counts."""
import math
import pathlib
import signal

import numpy as np
import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import dmd2
import fid
from conftest import assert_same
from dmd2 import (Denoiser, Discriminator, call_levels, denoising_loss, dm_gradient,
                  fake_score_losses, generator_losses, guided, heun, karras, sample, simulated,
                  weighted_error)
from nets import UNet

FOLDER = pathlib.Path(__file__).parent / "golden"
DMD2, EDMS = ({k: torch.from_numpy(v) if v.ndim else float(v)
               for k, v in np.load(FOLDER / f"{name}_official.npz").items()}
              for name in ("dmd2", "edm"))
column = lambda v: v.view(-1, 1, 1, 1)


class Gaussian:
    """The exact denoiser of N(mean + 0.1 y, s^2), and golden/README.md's stub encoder."""
    def __init__(self, mean, s):
        self.mean, self.s = mean, s

    def __call__(self, x, sigma, y):
        y = torch.full_like(sigma, 10) if y is None else y  # the null class
        m, s2, sigma2 = column(self.mean + 0.1 * y), self.s ** 2, column(sigma) ** 2
        return (s2 * x + sigma2 * m) / (s2 + sigma2)

    def encode(self, x, sigma, y):
        return [x / (1 + column(sigma))]

    def decode(self, features, x, sigma, y):
        return self(x, sigma, y)


REAL, FAKE = Gaussian(.2, .5), Gaussian(-.1, .4)
head = lambda features: 3 * features[-1].mean((1, 2, 3)) + 0.2


# ---- the official numbers ------------------------------------------------------------------------

def test_noise_levels_are_the_official_table():
    assert_close(karras(1000).float(), DMD2["karras_sigmas"], rtol=1e-5, atol=0)
    assert call_levels(1) == [80] and len(call_levels(3)) == 3
    assert call_levels(2) == call_levels(4)[::2]


def test_calls_are_at_the_levels_of_sdxl():
    """999, 749, 499, 249 of the schedule of Stable Diffusion, whose sigmas are known: 14.615 at the
    top, of latents of unit deviation."""
    alpha, sigmas = 1, []
    for i in range(1000):
        alpha *= 1 - (0.00085 ** 0.5 + i / 999 * (0.012 ** 0.5 - 0.00085 ** 0.5)) ** 2
        sigmas.append(math.sqrt((1 - alpha) / alpha))
    assert sigmas[-1] == approx(14.6146, rel=1e-5)
    assert call_levels(4) == approx([80, *(0.5 * sigmas[i] for i in (749, 499, 249))], rel=1e-9)
    assert call_levels(4, 10.) == [10., *call_levels(4)[1:]]
    for start in 0.11, 1., 10., 80.:
        for steps in range(1, 17):
            levels = call_levels(steps, start)
            assert levels[0] == start and levels == sorted({*levels}, reverse=True)
            assert all(call_levels(n, start) == levels[::steps // n] for n in range(1, steps + 1)
                       if steps % n == 0 and start > 7.4)
    low = call_levels(4, 1.)                                # what begins lower goes down from there
    n = sum(0.5 * sigma < 1 for sigma in sigmas)
    assert low == approx([1, *(0.5 * sigmas[n - 1 - k * n // 4] for k in (1, 2, 3))], rel=1e-9)


def test_distribution_matching_is_the_official():
    x, y = DMD2["dm_x"].requires_grad_(), DMD2["dm_labels"]
    sigma = DMD2["karras_sigmas"][DMD2["dm_index"]]
    loss, _ = generator_losses(REAL, FAKE, head, x, sigma, DMD2["dm_noise"], y)
    grad, = torch.autograd.grad(loss, x)
    assert loss.item() == approx(DMD2["dm_loss"], rel=1e-5)
    assert_close(grad, DMD2["dm_grad_x"], rtol=1e-4, atol=1e-9)
    x_t = x.detach() + column(sigma) * DMD2["dm_noise"]
    difference = dm_gradient(x.detach(), REAL(x_t, sigma, y), FAKE(x_t, sigma, y))
    assert_close(difference, DMD2["dm_grad_pre"], rtol=1e-4, atol=1e-6)
    assert_close(grad, difference / x.numel(), rtol=1e-4, atol=1e-9)


def test_the_generators_gan_loss_is_the_official():
    x, sigma = DMD2["dm_x"].requires_grad_(), DMD2["karras_sigmas"][DMD2["gan_g_index"]]
    _, loss = generator_losses(REAL, FAKE, head, x, sigma, DMD2["gan_g_noise"], DMD2["dm_labels"])
    grad, = torch.autograd.grad(loss, x)
    assert loss.item() == approx(DMD2["gan_g_loss"], rel=1e-5)
    assert_close(grad, DMD2["gan_g_grad_x"], rtol=1e-5, atol=1e-9)


def test_the_fake_scores_losses_are_the_official():
    """Theirs draw noise for the denoising loss and for the logit apart: a call of ours for each."""
    level = lambda name: DMD2["karras_sigmas"][DMD2[f"{name}_index"]]
    real, y = DMD2["gan_d_real"], torch.cat([DMD2["dm_labels"], DMD2["gan_d_real_labels"]])
    def ours(fake):
        return fake_score_losses(FAKE, head, DMD2["dm_x"].detach(), real,
                                 torch.cat([level(fake), level("gan_d_real")]),
                                 torch.cat([DMD2[f"{fake}_noise"], DMD2["gan_d_real_noise"]]), y)
    assert ours("fake")[0].item() == approx(DMD2["fake_loss"], rel=1e-5)
    assert ours("gan_d_fake")[1].item() == approx(DMD2["gan_d_loss"], rel=1e-5)


class Tanh(torch.nn.Module):
    """The stub network of edm_official.npz, tanh(.7 x + .3 t), half of t in each half."""
    def encode(self, x, t, y=None):
        return [.7 * x + .15 * column(t)]

    def decode(self, features, t, y=None):
        return torch.tanh(features[0] + .15 * column(t))


def test_preconditioning_and_the_teachers_loss_are_edms():
    D, y = Denoiser(Tanh()), torch.zeros(5, dtype=torch.long)
    assert_close(D(EDMS["precond_x"], EDMS["precond_sigma"], y), EDMS["precond_D"], rtol=1e-4,
                 atol=1e-6)
    sigma = (-1.2 + 1.2 * EDMS["loss_rnd_normal"].flatten()).exp()
    for i in range(5):
        loss = denoising_loss(D, EDMS["loss_y"][i:i + 1], sigma[i:i + 1],
                            EDMS["loss_noise_unit"][i:i + 1], y[:1])
        assert loss.item() == approx(EDMS["loss_per_element"][i].mean().item(), rel=1e-5)


def test_the_teachers_sampler_is_edms():
    z, y = EDMS["heun_latents"].double(), torch.zeros(4, dtype=torch.long)
    gaussian = lambda x, sigma, y: (.25 * x + .2 * column(sigma) ** 2) / (.25 + column(sigma) ** 2)
    counted = lambda x, sigma, y: calls.append(1) or gaussian(x, sigma.double(), y)
    for steps in 5, 18:
        calls = []
        assert_close(heun(counted, z, y, steps), EDMS[f"heun_{steps}"], rtol=1e-6, atol=1e-8)
        assert len(calls) == 2 * steps - 1
    stub = Denoiser(Tanh())
    assert_close(heun(lambda x, sigma, y: stub(x, sigma.double(), y), z, y, 18),
                 EDMS["heun_stub_18"], rtol=1e-6, atol=1e-8)


# ---- closed forms --------------------------------------------------------------------------------

def test_the_weight_of_the_denoising_loss_is_edms():
    sigma, error = torch.tensor([.002, .3, 4, 80]), torch.tensor([1., 2, 3, 4])
    x = torch.zeros(4, 3, 2, 2)
    for s, e in zip(sigma, error):
        by_hand = (s ** 2 + .25) / (s * .5) ** 2 * e ** 2
        assert weighted_error(x[:1] + e, x[:1], s[None]).item() == approx(by_hand.item(), rel=1e-5)


def test_the_denoising_loss_is_least_at_the_exact_denoiser():
    """Of all D = a x + b on N(m, s^2): a = s^2 / (s^2 + sigma^2), b = (1 - a) m."""
    torch.manual_seed(0)
    m, s, n = .3, .4, 200_000
    x0, eps = m + s * torch.randn(n, 1, 1, 1), torch.randn(n, 1, 1, 1)
    for sigma in .2, 1.5:
        a, b = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        levels, y = torch.full((n,), sigma), torch.zeros(n, dtype=torch.long)
        loss = denoising_loss(lambda x, sigma, y: a * x + b, x0, levels, eps, y)
        ga, gb = torch.autograd.grad(loss, (a, b), create_graph=True)           # a quadratic form:
        rows = [torch.stack(torch.autograd.grad(g, (a, b), retain_graph=True)) for g in (ga, gb)]
        least = torch.linalg.solve(torch.stack(rows), -torch.stack([ga, gb]).detach())
        exact = s ** 2 / (s ** 2 + sigma ** 2)
        assert_close(least, torch.tensor([exact, (1 - exact) * m]), atol=4e-3, rtol=0)


@pytest.mark.parametrize("sigma", [.1, .7, 5.])
def test_the_gradient_is_that_of_the_kl_divergence_of_gaussians(sigma):
    """For x = m + s z: dKL/dm = (m - m_r) / (s_r^2 + sigma^2),
    dKL/ds = s / (s_r^2 + sigma^2) - s / (s^2 + sigma^2), of the noised distributions."""
    torch.manual_seed(0)
    n, (m, s), (m_r, s_r) = 400_000, (FAKE.mean, FAKE.s), (REAL.mean, REAL.s)
    z, y = torch.randn(n, 1, 1, 1, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    x0, level = m + s * z, torch.full((n,), sigma, dtype=torch.float64)
    x_t = x0 + sigma * torch.randn_like(x0)
    mu_real, mu_fake = REAL(x_t, level, y), FAKE(x_t, level, y)
    scale = (x0 - mu_real).abs().mean((1, 2, 3), keepdim=True)
    unscaled = dm_gradient(x0, mu_real, mu_fake) * scale / sigma ** 2
    by_hand = ((m - m_r) / (s_r ** 2 + sigma ** 2),
               s / (s_r ** 2 + sigma ** 2) - s / (s ** 2 + sigma ** 2))
    for ours, exact in zip((unscaled, unscaled * z), by_hand):
        assert ours.mean().item() == approx(exact, abs=4 * ours.std().item() / n ** .5)


def test_equal_scores_leave_the_generator_alone_and_the_normaliser_has_no_zero():
    x, y = torch.randn(4, 3, 8, 8, requires_grad=True), torch.arange(4)
    loss, _ = generator_losses(REAL, REAL, head, x, torch.ones(4), torch.randn(4, 3, 8, 8), y)
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()
    assert dm_gradient(x, x, x + 1).isfinite().all()


def test_the_gan_at_its_optimum():
    """Where images are alike the best logit is 0: log 4 for the discriminator, log 2 for G."""
    x, sigma, y = torch.randn(6, 3, 8, 8), torch.ones(12), torch.zeros(12, dtype=torch.long)
    eps = torch.randn(12, 3, 8, 8)
    zero = lambda features: 0 * features[-1].mean((1, 2, 3))
    assert fake_score_losses(FAKE, zero, x, x, sigma, eps, y)[1].item() == approx(math.log(4))
    assert generator_losses(REAL, FAKE, zero, x, sigma[:6], eps[:6], y[:6])[1].item() == approx(
        math.log(2))
    # Certain and right: nothing to learn for it, much for the generator; and the other way round.
    sure = lambda features: torch.cat([torch.full((6,), -9.), torch.full((6,), 9.)])
    assert fake_score_losses(FAKE, sure, x, x, sigma, eps, y)[1].item() < 1e-3
    assert generator_losses(REAL, FAKE, lambda f: sure(f)[:6], x, sigma[:6], eps[:6],
                            y[:6])[1].item() == approx(9, abs=1e-3)


def test_guidance_extrapolates_from_the_null_label():
    x, sigma, y = torch.randn(3, 3, 4, 4), torch.ones(3), torch.tensor([1, 2, 3])
    null = REAL(x, sigma, None)
    assert_close(guided(REAL, x, sigma, y, 2.5), null + 2.5 * (REAL(x, sigma, y) - null))
    assert torch.equal(guided(lambda x, sigma, y: x if len(set(y.tolist())) == 3 else None,
                              x, sigma, y), x)              # off: one call


# ---- real networks -------------------------------------------------------------------------------

def awake(seed=0):
    torch.manual_seed(seed)
    D = Denoiser(UNet(16, 16, (1, 2), (1, 1), num_classes=10)).eval()
    torch.nn.init.normal_(D.net.conv_out.weight, std=.1)
    return D


def inputs(n=4):
    torch.manual_seed(1)
    images = torch.randn(2 * n, 3, 16, 16) / 2
    return (images[:n], images[n:], torch.rand(2 * n) * 3 + .1, torch.randn(2 * n, 3, 16, 16),
            torch.arange(2 * n) % 10)


def test_the_shared_pass_is_the_two_separate_ones():
    D, disc, (x0, real, sigma, eps, y) = awake(), Discriminator([16, 32], 8), inputs()
    loss_fake, loss_disc = fake_score_losses(D, disc, x0, real, sigma, eps, y)
    x_t = x0 + column(sigma[:4]) * eps[:4]
    x_t_real = real + column(sigma[4:]) * eps[4:]
    by_hand = (column(sigma[:4] ** -2 + 4) * (D(x_t, sigma[:4], y[:4]) - x0) ** 2).mean()
    fakes, reals = (disc(D.encode(x, s, c)) for x, s, c in ((x_t, sigma[:4], y[:4]),
                                                            (x_t_real, sigma[4:], y[4:])))
    assert_close(loss_fake, by_hand, rtol=1e-5, atol=0)
    assert_close(loss_disc, (1 + fakes.exp()).log().mean() + (1 + (-reals).exp()).log().mean())


def test_every_map_that_is_judged_weighs_the_same():
    """A logit of the whole image beside those of places: in a mean of all each map has its part."""
    torch.manual_seed(0)
    maps = [torch.randn(3, 16, 16, 16), torch.randn(3, 32, 8, 8)]
    both, last = Discriminator([16, 32], 8), Discriminator([16, 32], 8, 1)
    assert last(maps).shape == (3, 1) and both(maps).shape == (3, 128)
    places, whole = (head(h).flatten(1) for head, h in zip(both.heads, maps))
    assert places.shape == (3, 64) and whole.shape == (3, 1)
    by_hand = ((1 + places.exp()).log().mean() + (1 + whole.exp()).log().mean()) / 2
    assert torch.nn.functional.softplus(both(maps)).mean().item() == approx(by_hand.item())


def test_gradients_reach_what_they_should_and_nothing_else():
    teacher, fake, disc = awake(0), awake(1), Discriminator([16, 32], 8)
    x0, _, sigma, eps, y = inputs()
    x0.requires_grad_()
    loss_dm, loss_gan = generator_losses(teacher, fake, disc, x0, sigma[:4], eps[:4], y[:4])
    params = [*teacher.parameters(), *fake.parameters(), *disc.parameters()]
    assert set(torch.autograd.grad(loss_dm, params, retain_graph=True, allow_unused=True)) == {None}
    grads = torch.autograd.grad(loss_gan, [*teacher.parameters(), x0], allow_unused=True)
    assert set(grads[:-1]) == {None} and grads[-1].abs().amax((1, 2, 3)).min() > 0
    x_t = x0.detach() + column(sigma[:4]) * eps[:4]
    with torch.no_grad():
        real_fake = [D(x_t, sigma[:4], y[:4]) for D in (teacher, fake)]
    difference = dm_gradient(x0.detach(), *real_fake)
    assert_close(torch.autograd.grad(loss_dm, x0)[0], difference / x0.numel(), rtol=1e-4, atol=1e-9)


def test_backward_simulation_sees_what_the_sampler_sees():
    """With the same noise, call k of the sampler has for its input what training gives call k."""
    G, y, levels = awake(), torch.arange(3), call_levels(4)
    draws = torch.randn(4, 3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    seen = []
    def recorded(x, sigma, y):
        seen.append((x, sigma))
        return G(x, sigma, y)
    noise = lambda: iter(draws).__next__
    image = sample(recorded, noise(), y, levels)
    assert len(seen) == 4
    with torch.no_grad():
        for k, (x, sigma) in enumerate(seen):
            assert torch.equal(simulated(G, noise(), y, torch.full((3,), k), levels), x)
            assert torch.equal(sigma, torch.full((3,), levels[k]))
        assert_close(seen[0][0], 80 * draws[0])
        assert torch.equal(image, G(*seen[3], y))
        assert_close(seen[2][0], G(*seen[1], y) + levels[2] * draws[2])     # fresh noise each time
        each = simulated(G, noise(), y, torch.tensor([3, 0, 2]), levels)    # a call for each image
        for i, k in enumerate((3, 0, 2)):
            assert_close(each[i], seen[k][0][i])
    once = G(80 * draws[0], torch.full((3,), 80.), y)
    assert torch.equal(sample(G, noise(), y, call_levels(1)), once)


# ---- the loop ------------------------------------------------------------------------------------

TINY = "--device cpu --precision fp32 --resolution 16 --channels 16 --mult 1,1 --blocks 1,1 " \
       "--batch 4 --teacher-batch 4 --samples 0 --teacher-iters 2 --teacher-steps 2 " \
       "--start-sigma 80 --dm-levels 0.02,0.98 --fake-levels 0,1 --gan-cap 0 " \
       "--disc-maps 1 --pairs-iters 0".split()                      # all this as the official


@pytest.fixture
def small(monkeypatch):
    drawn = fid.shapes(60, 16)
    monkeypatch.setattr(fid, "shapes", lambda resolution: drawn)


@pytest.mark.parametrize("ratio", [1, 5])
def test_two_time_scales_are_counted_and_true(small, monkeypatch, tmp_path, ratio):
    calls, out = [], tmp_path / "run"
    for name in "generator_losses", "fake_score_losses":
        monkeypatch.setattr(dmd2, name, lambda *args, name=name, real=getattr(dmd2, name):
                            calls.append(name) or real(*args))
    dmd2.main([*TINY, "--out", str(out), "--iters", "3", "--fake-updates", str(ratio),
               "--ema", "0"])
    assert calls == 3 * (["generator_losses"] + ratio * ["fake_score_losses"])
    row = (out / "log.csv").read_text().splitlines()
    last = dict(zip(row[0].split(","), row[-1].split(",")))
    counts = last["step"], last["generator_updates"], last["fake_updates"]
    assert counts == ("5", "3", str(3 * ratio))
    state = torch.load(out / "checkpoint.pt")
    updates = lambda opt: {int(v["step"]) for v in state[opt]["state"].values()}
    assert updates("opt_generator") == {3} and updates("opt_fake") == {3 * ratio}
    for name, weights in state["generator"].items():        # a mean over no past
        assert_close(state["generator_ema"][f"module.{name}"], weights)


@pytest.mark.parametrize("switch", ["--backward-simulation", "--no-backward-simulation"])
def test_later_calls_train_on_own_or_on_noised_real_images(small, monkeypatch, tmp_path, switch):
    seen = []
    monkeypatch.setattr(dmd2, "simulated", lambda *args: seen.append(args[3]) or simulated(*args))
    for name in "draw", "evaluate":                         # they sample too
        monkeypatch.setattr(dmd2, name, lambda *args: None)
    line = [*TINY, "--iters", "6", "--train-steps", "4", "--fake-updates", "2", switch]
    dmd2.main([*line, "--out", str(tmp_path / "run")])
    if switch == "--backward-simulation":                   # each call for its share of the images
        assert [sorted(k.tolist()) for k in seen] == 12 * [[0, 1, 2, 3]]
    else:
        assert not seen


def test_generator_and_fake_score_begin_as_the_teacher(small, monkeypatch, tmp_path):
    """And the teacher stays as it is; another run may take it."""
    seen = []
    def losses(real_score, fake_score, *rest):
        seen.append(fake_score.state_dict())
        return generator_losses(real_score, fake_score, *rest)
    monkeypatch.setattr(dmd2, "generator_losses", losses)
    first, second = tmp_path / "first", tmp_path / "second"
    dmd2.main([*TINY, "--out", str(first), "--iters", "1", "--lr", "1e-9", "--fake-lr", "1e-9"])
    state = torch.load(first / "checkpoint.pt")
    teacher = {k[7:]: v for k, v in state["teacher_ema"].items() if k.startswith("module.")}
    for name, weights in teacher.items():
        assert_close(seen[0][name], weights, atol=1e-6, rtol=0)
        assert_close(state["generator"][name], weights, atol=1e-6, rtol=0)
    seen.clear()
    dmd2.main([*TINY, "--out", str(second), "--iters", "2", "--teacher", str(first)])
    again = torch.load(second / "checkpoint.pt")
    for name, weights in state["teacher_ema"].items():
        assert torch.equal(again["teacher_ema"][name], weights)
    assert again["step"] == 2


def test_stopped_and_resumed_in_each_phase_it_ends_the_same(small, monkeypatch, tmp_path):
    """A teacher of 4 steps, 2 on its pairs and a distillation of 4, stopped in each and between."""
    line = [*TINY, "--teacher-iters", "4", "--iters", "4", "--dropout", "0.2", "--flip",
            "--pairs-iters", "2", "--pairs", "20", "--disc-maps", "0",
            "--steps", "1,2", "--samples", "20", "--features", "random"]
    dmd2.main([*line, "--out", str(tmp_path / "whole")])
    halves = [*line, "--out", str(tmp_path / "halves")]
    real = dmd2.Run.add
    for stop in 2, 4, 5, 6, 8:
        def add(run, **scalars):
            real(run, **scalars)
            if run.step == stop - 1:                        # within the step before it
                run.signal = signal.SIGTERM
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(dmd2.Run, "add", add)
            dmd2.main(halves)
        assert ended.value.code == 143
        assert torch.load(tmp_path / "halves" / "checkpoint.pt")["step"] == stop
    dmd2.main(halves)
    assert_same(*(torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "halves")))
    for name in "samples-1step.png", "samples-2step.png", "raw-1step.png", "teacher-2step.png":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


def test_pairs_are_the_teachers_whatever_is_drawn_later(small, monkeypatch, tmp_path):
    """DMD's regression: G(80 z; 80) of a label against the teacher's image of that z and label;
    the same after a resume with other --labels, and made again by another start."""
    seen, real = [], dmd2.teacher_pairs
    monkeypatch.setattr(dmd2, "teacher_pairs", lambda *a: seen.append(real(*a)) or seen[-1])
    line = [*TINY, "--iters", "4", "--regression", "1", "--pairs", "20", "--dm-weight", "0",
            "--gan-weight", "0", "--out", str(tmp_path / "run")]
    def add(run, step=dmd2.Run.add, **scalars):
        step(run, **scalars)
        run.signal = signal.SIGTERM if run.step == 3 else 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(dmd2.Run, "add", add)
        dmd2.main(line)
    dmd2.main([*line, "--labels", "heart"])
    (z, y, x0), again = seen
    assert_same([*seen[0]], [*again])
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["teacher_ema"]
    D = Denoiser(UNet(16, 16, (1, 1), (1, 1), num_classes=10)).eval()
    D.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("module.")})
    by_hand = fid.from_uint8(fid.to_uint8(heun(D, z, y, 8, 80)))
    assert_close(x0, by_hand, atol=1.1 / 127.5, rtol=0)     # quantised
    assert y.tolist() == [*range(10)] * 2
    dmd2.main(line)                                         # a finished run has no use for them
    assert len(seen) == 2


def test_pairs_that_were_half_written_are_no_foreign_file(tmp_path):
    (tmp_path / ".pairs.npz").write_bytes(b"half")
    assert dmd2.stored_args(tmp_path) == {}
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(fid.UserError, match="no run folder and not empty"):
        dmd2.stored_args(tmp_path)


@pytest.mark.parametrize("calls", [1, 4])
def test_the_generator_begins_as_the_regression_left_it(small, monkeypatch, tmp_path, calls):
    """--pairs-iters: |G(tau z) - x0|^2 of the pairs alone, from the teacher's weights, in later
    calls |G(x0 + tau eps) - x0|^2; then the distillation begins, with a fake score that is still
    the teacher."""
    seen, pairs, real = [], [], dmd2.teacher_pairs
    monkeypatch.setattr(dmd2, "teacher_pairs", lambda *a: pairs.extend(real(*a)) or pairs)
    forward = Denoiser.forward
    def spy(self, x, sigma, y):
        x0 = forward(self, x, sigma, y)
        if x0.requires_grad and self.training is False:
            seen.append((x, sigma, y, x0.detach()))
        return x0
    monkeypatch.setattr(Denoiser, "forward", spy)
    losses, add = [], dmd2.Run.add
    monkeypatch.setattr(dmd2.Run, "add", lambda run, **scalars:
                        losses.append(scalars.get("loss_regression")) or add(run, **scalars))
    means, averaged, begun = [], dmd2.AveragedModel, []
    monkeypatch.setattr(dmd2, "AveragedModel",
                        lambda *a, **k: means.append(averaged(*a, **k)) or means[-1])
    monkeypatch.setattr(dmd2, "generator_losses", lambda *a: begun.append(a[1]) or 1 / 0)
    noises, randn_like = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: len(x) == 20 and noises.append(randn_like(x))
                        or (noises[-1] if len(x) == 20 else randn_like(x)))
    with pytest.raises(ZeroDivisionError):
        dmd2.main([*TINY, "--start-sigma", "10", "--teacher-iters", "1", "--iters", "1", "--batch",
                   "20", "--pairs-iters", "3", "--pairs", "20", "--train-steps", str(calls),
                   "--no-tell-call", "--no-backward-simulation", "--out", str(tmp_path / "run")])
    z, y, target = pairs
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == 3 and len(seen) == 4              # the fourth: the distillation's call
    for (x, sigma, labels, x0), loss, eps in zip(seen[:3], losses, noises):
        tau = torch.tensor(call_levels(calls, 10.))
        k = (sigma[:, None] - tau).abs().argmin(1)
        assert k.bincount().tolist() == calls * [20 // calls]
        assert_close(sigma, tau[k])
        given = torch.where(dmd2.expand(k == 0), x / tau[0], x - dmd2.expand(sigma) * eps)
        row = [int(((target if n else z) - image).abs().amax((1, 2, 3)).argmin())
               for n, image in zip(k, given)]
        assert_close(given, torch.where(dmd2.expand(k == 0), z[row], target[row]), atol=1e-5,
                     rtol=1e-5)
        assert torch.equal(labels, y[row])
        assert loss.item() == approx((x0 - target[row]).square().mean().item(), rel=1e-4)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 4
    assert_same(dict(means[0].module.state_dict()), dict(begun[0].state_dict()))


def test_the_default_folder_says_how_many_calls(small):
    out = lambda line: dmd2.parse_args(line.split()).out
    assert out("--steps 1") == out("") == "runs/dmd2-shapes"
    assert out("--steps 1,4") == out("--steps 1 --train-steps 4") == "runs/dmd2-shapes-4step"


@pytest.mark.parametrize("line, message", [
    ("--steps 3 --train-steps 4", "--steps 3: a generator trained for 4 samples in 1,2,4"),
    ("--steps 0", "--steps 0: a generator has 1 to 16 calls"),
    ("--steps 32", "--steps 32: a generator has 1 to 16 calls"),
    ("--train-steps 17", "--train-steps 17: a generator has 1 to 16 calls"),
    ("--teacher-iters 0", "--teacher-iters 0: expected 1 or more"),
    ("--fake-updates 0", "--fake-updates 0: expected 1 or more"),
    ("--teacher-batch 0", "--teacher-batch 0: expected 1 or more"),
    ("--teacher-steps -1", "--teacher-steps -1: expected 0 or more"),
    ("--pairs 0", "--pairs 0: expected 1 or more"), ("--fake-lr 0", "--fake-lr 0.0: expected a"),
    ("--mult 1,1,1,1 --blocks 1,1,1,1 --resolution 8", "coarsest stage of 2x2"),
    ("--cfg 2 --label-dropout 0", "--cfg 2.0: needs a teacher that knows the null label"),
    ("--teacher-lr 2", "--teacher-lr 2.0: expected a number between 0 and 1"),
    ("--gan-weight -1", "--gan-weight -1.0: expected at least 0"),
    ("--dm-levels 0.02", "--dm-levels 0.02: expected two shares of the table"),
    ("--dm-levels a", "--dm-levels: 'a': expected two shares, as 0.02,0.98"),
    ("--fake-levels 0.5,0.5", "--fake-levels 0.5,0.5: expected two shares of the table, ascending"),
    ("--start-sigma 81", "--start-sigma 81.0: expected at most 80.0"),
    ("--start-sigma nan", "--start-sigma nan: expected at most 80.0"),
    ("--train-steps 4 --start-sigma 0.05", "and more than 0.1 with several calls"),
    ("--p-std 0", "--p-std 0.0: expected logarithms"),
    ("--regression nan", "--regression nan: expected at least 0"),
    ("--dm-weight 0 --gan-weight 0", "nothing is left for the generator to learn from"),
    ("--teacher nowhere", "--teacher nowhere: holds no run of dmd2.py"),
    ("--teacher FULL", "--teacher FULL: --out FULL: is no run folder and not empty"),
    ("--k 0.25", "unrecognized arguments: --k 0.25")])
def test_a_mistake_is_one_line_and_touches_nothing(line, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "text").write_text("text")
    monkeypatch.setattr(dmd2, "denoising_loss", None)                     # nothing may train
    with pytest.raises(fid.UserError) as error:
        dmd2.main(["--device", "cpu", "--resolution", "16", *line.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["text"]


@pytest.mark.parametrize("change, message", [
    ("--channels 32", "was trained with --channels 16, not 32; give that here too"),
    ("--cfg 2", "was trained without null labels"), ("data", "is of other data"),
    ("unfinished", "its training stands at 1 of 2"), ("broken", "does not load")])
def test_a_teacher_that_does_not_fit(small, monkeypatch, tmp_path, change, message):
    first, line = tmp_path / "first", [*TINY, "--iters", "1"]
    dmd2.main([*line, "--out", str(first)])
    path = first / "checkpoint.pt"
    if change == "unfinished":
        torch.save(torch.load(path) | dict(step=1), path)
    if change == "broken":
        for name in dmd2.CHECKPOINTS:                       # of two the whole one would do
            (first / name).write_bytes(path.read_bytes()[:1000])
    if change == "data":
        other = tuple(t[:50] for t in fid.shapes(16))
        monkeypatch.setattr(fid, "shapes", lambda resolution: other)
    more = change.split() if change.startswith("--") else []
    with pytest.raises(fid.UserError, match=message) as error:
        dmd2.main([*line, *more, "--teacher", str(first), "--out", str(tmp_path / "second")])
    assert "\n" not in str(error.value) and not (tmp_path / "second" / "checkpoint.pt").exists()


@pytest.mark.parametrize("line", [
    "--gan-weight 0", "--dm-weight 0", "--regression 0.25 --pairs 20", "--cfg 1.5",
    "--steps 1,2,4", "--steps 4 --no-backward-simulation", "--gan-weight 0 --fake-updates 1"])
def test_every_switch_trains_and_samples(small, tmp_path, line):
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "2", *line.split()])
    text = (tmp_path / "run" / "log.csv").read_text().splitlines()
    last = dict(zip(text[0].split(","), text[-1].split(",")))
    assert ("loss_disc" in last) == ("--gan-weight 0" not in line)
    assert (float(last["grad_gan"]) == 0) == ("--gan-weight 0" in line)
    assert (float(last["grad_dm"]) == 0) == ("--dm-weight 0" in line)
    assert ("loss_regression" in last) == ("--regression" in line)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    steps = line.split()[1].split(",") if "--steps" in line else ["1"]
    assert names >= {f"{who}-{n}step.png" for who in ("samples", "raw") for n in steps}


# ---- what main passes to the losses --------------------------------------------------------------

@pytest.mark.parametrize("line, generators, fakes, start", [
    ("", (20, 980), (0, 999), 80.),                                             # the official
    ("--dm-levels 0.1,0.6 --fake-levels 0.3,0.9 --start-sigma 10", (100, 600), (300, 900), 10.)])
def test_levels_and_calls_are_those_of_the_method(small, monkeypatch, tmp_path, line, generators,
                                                  fakes, start):
    """Noise levels over 2 to 98 % of the table for the generator, over all of it for the fake
    score; the generator is told the level of the call that its input is of."""
    levels, events, drawn = karras(1000).float(), [], dict(generator=[], fake=[])
    def simulate(G, noise, y, k, tau):
        x = simulated(G, noise, y, k, tau)
        events.append(("simulated", k.tolist()))
        return x
    def forward(self, x, sigma, y, real=Denoiser.forward):
        events.append(("called", sigma.tolist()))
        return real(self, x, sigma, y)
    def record(name, at):
        real = getattr(dmd2, name)
        def losses(*args):
            drawn[name.split("_")[0]].append(args[at])
            return real(*args)
        monkeypatch.setattr(dmd2, name, losses)
    monkeypatch.setattr(dmd2, "simulated", simulate)
    monkeypatch.setattr(dmd2.Denoiser, "forward", forward)
    record("generator_losses", 4)
    record("fake_score_losses", 4)
    for name in "draw", "evaluate":
        monkeypatch.setattr(dmd2, name, lambda *args: None)
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "40", "--batch", "32",
               "--train-steps", "4", "--fake-updates", "2", *line.split()])
    for name, (low, high) in ("generator", generators), ("fake", fakes):
        index = torch.cat(drawn[name])[:, None].sub(levels).abs().argmin(1)
        assert low <= index.min() < low + 15 and high - 15 < index.max() <= high
        assert index.double().mean().item() == approx((low + high) / 2, abs=40)
    pairs = [(a[1], b[1]) for a, b in zip(events, events[1:]) if a[0] == "simulated"]
    assert len(pairs) == 80
    for k, sigma in pairs:
        assert sorted(k) == 8 * [0] + 8 * [1] + 8 * [2] + 8 * [3]
        assert sigma == approx([call_levels(4, start)[n] for n in k], rel=1e-5)


@pytest.mark.parametrize("more, told", [([], True), (["--no-tell-call"], False),
                                        (["--no-backward-simulation"], True)])
def test_the_fake_score_is_told_the_call(small, monkeypatch, tmp_path, more, told):
    """It has labels of its own for each of the generator's four calls, which begin as the
    teacher's; its losses and the generator's of a call see those of this call."""
    levels, seen, checked = [], [], []
    monkeypatch.setattr(dmd2.Denoiser, "forward", lambda self, x, sigma, y, real=Denoiser.forward: (
        levels.append(sigma), real(self, x, sigma, y))[1])
    for name in "generator_losses", "fake_score_losses":
        def losses(*args, real=getattr(dmd2, name), at=name == "generator_losses"):
            x, sigma, _, y = args[3:7]                      # for the fake score, only y is this
            if at:
                just = torch.tensor(call_levels(4))         # drawn at one of these
                G = levels[-1][:, None].sub(just).abs().argmin(1)
                seen.append((G, y))
            else:
                assert torch.equal(y, seen[-1][1].repeat(2))        # of the one fake update
            if at and not checked:
                for k in range(4 if told else 1):
                    own = y % 11 + 11 * k
                    checked.append(assert_close(args[1](x, sigma, own), args[0](x, sigma, y)))
            return real(*args)
        monkeypatch.setattr(dmd2, name, losses)
    for name in "draw", "evaluate":
        monkeypatch.setattr(dmd2, name, lambda *args: None)
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "12", "--train-steps", "4",
               "--start-sigma", "80", "--fake-updates", "1", *more])
    assert len(seen) == 12 and len(checked) == (4 if told else 1)
    for k, y in seen:
        assert sorted(k.tolist()) == [0, 1, 2, 3]
        assert torch.equal(y // 11, k if told else 0 * k)


@pytest.mark.parametrize("slot", [0, 1])
def test_the_generator_goes_down_both_gradients(small, monkeypatch, tmp_path, slot):
    means = []
    def losses(real_score, fake_score, disc, x0, *rest):
        means.append(x0.mean().item())
        pair = [0 * x0.sum(), 0 * x0.sum()]
        pair[slot] = (x0 - 1).square().mean()
        return pair
    monkeypatch.setattr(dmd2, "generator_losses", losses)
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "30", "--lr", "1e-2",
               "--gan-weight", "1", "--fake-updates", "1"])
    assert np.mean(means[-5:]) > np.mean(means[:5]) + .3


def test_weights_weigh(small, tmp_path):
    """Twice the weight, twice the gradient: at the images, and in the norms before clipping."""
    def row(name, *more):
        dmd2.main([*TINY, "--out", str(tmp_path / name), "--iters", "1", "--fake-updates", "1",
                   "--pairs", "10", "--teacher", str(tmp_path / "teacher"), *more])
        text = (tmp_path / name / "log.csv").read_text().splitlines()
        return dict(zip(text[0].split(","), map(float, text[1].split(","))))
    dmd2.main([*TINY, "--out", str(tmp_path / "teacher"), "--iters", "1"])
    one, two = (row(f"w{w}", "--dm-weight", w, "--gan-weight", w) for w in "12")
    for name in "grad_dm", "grad_gan":
        assert two[name] == approx(2 * one[name], rel=1e-3)
    alone = "--dm-weight", "0", "--gan-weight", "0", "--regression"
    one, two = (row(f"r{w}", *alone, w) for w in "12")
    assert two["grad_norm"] == approx(2 * one["grad_norm"], rel=1e-3)
    one, two = (row(f"d{w}", "--gan-weight", "1", "--disc-weight", w) for w in ("1e5", "2e5"))
    assert two["grad_norm_fake"] == approx(2 * one["grad_norm_fake"], rel=1e-2)


@pytest.mark.parametrize("cap, share", [("0.5", .5), ("1e9", None), ("0", None)])
def test_the_gans_gradient_has_a_bound(small, tmp_path, cap, share):
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "6", "--gan-weight", "1e4",
               "--gan-cap", cap])
    text = (tmp_path / "run" / "log.csv").read_text().splitlines()
    row = dict(zip(text[0].split(","), text[-1].split(",")))
    ratio = float(row["grad_gan"]) / float(row["grad_dm"])
    assert ratio > 5 if share is None else ratio == approx(share, rel=1e-4)


def test_the_ema_is_the_closed_form_and_is_what_is_scored(small, monkeypatch, tmp_path):
    history, scored = [], {}
    def update(self, net, real=dmd2.AveragedModel.update_parameters):
        history.append({n: p.clone() for n, p in net.named_parameters()})
        real(self, net)
    def evaluate(run, scorer, generate, steps, who, *rest):
        y = torch.arange(4)
        scored[who] = generate(dmd2.noise_of(range(4), run.args), y, 1), run.args
    monkeypatch.setattr(dmd2, "evaluate", evaluate)
    monkeypatch.setattr(dmd2.AveragedModel, "update_parameters", update)
    dmd2.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "3", "--ema", "0.7",
               "--teacher-ema", "0.2", "--lr", "1e-2"])
    state = torch.load(tmp_path / "run" / "checkpoint.pt")
    (t1, t2), (g1, g2, g3) = history[:2], history[2:]
    G = Denoiser(UNet(16, 16, (1, 1), (1, 1), num_classes=10)).eval()
    for name in t1:
        ema = lambda key: state[key][f"module.{name}"]
        assert_close(ema("teacher_ema"), .2 * t1[name] + .8 * t2[name], atol=1e-6, rtol=0)
        assert_close(ema("generator_ema"), .49 * g1[name] + .21 * g2[name] + .3 * g3[name],
                     atol=1e-6, rtol=0)
    for who, key in ("generator", "generator"), ("generator ema", "generator_ema"):
        G.load_state_dict({k.removeprefix("module."): v for k, v in state[key].items()
                           if k != "n_averaged"})
        images, args = scored[who]
        assert_close(images, sample(G, dmd2.noise_of(range(4), args), torch.arange(4),
                                    call_levels(1)))
    assert scored.keys() == {"teacher ema", "generator", "generator ema"}
