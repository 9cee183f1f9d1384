"""add.py proved: score distillation sampling, exact denoisers of Gaussians, losses by hand,
and the loop's own counts."""
import math
import signal

import numpy as np
import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import add
import fid
from conftest import assert_same
from add import (Denoiser, Discriminator, adversarial_loss, ddim, discriminator_loss,
                 c_of_t, distillation_loss, guided, nfsd_loss, r1_penalty, sample, simulated,
                 teacher_loss, vp_schedule)
from nets import UNet

column = lambda v: v.view(-1, 1, 1, 1)
ALPHA, SIGMA = vp_schedule()


class Gaussian(Denoiser):
    """The exact denoiser of N(m + 0.1 y, s^2): v from E[x0 | x_t]."""
    def __init__(self, m=.2, s=.4, alpha=ALPHA.double(), sigma=SIGMA.double()):
        super().__init__(torch.nn.Identity(), alpha, sigma)
        self.m, self.s = m, s

    def v(self, x, t, y):
        y = torch.full_like(t, 10) if y is None else y
        a, b, m = column(self.alpha[t]), column(self.sigma[t]), column(self.m + 0.1 * y)
        gain = a * self.s ** 2 / (a ** 2 * self.s ** 2 + b ** 2)
        x0 = m + gain * (x - a * m)
        # b is 0 at t = 0 alone, which nothing asks for; v = (a x - x0) / b
        return (a * x - x0) / b


def network():
    torch.manual_seed(0)
    D = Denoiser(UNet(16, 16, (1, 2), (1, 1), num_classes=10), ALPHA, SIGMA).eval()
    torch.nn.init.normal_(D.net.conv_out.weight, std=.1)
    return D


# ---- schedule and parametrisation ----------------------------------------------------------------

def test_the_last_time_has_exactly_no_signal():
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, .02, 1000))
    assert ALPHA[1000] == 0 and SIGMA[1000] == 1 and ALPHA[0] == 1 and SIGMA[0] == 0
    assert_close(ALPHA ** 2 + SIGMA ** 2, torch.ones(1001))
    assert (ALPHA.diff() < 0).all()
    assert ALPHA[1].item() == approx(alpha_bar[0] ** .5)                # the first is as it was
    by_hand = (alpha_bar ** .5 - alpha_bar[-1] ** .5) * alpha_bar[0] ** .5 / (
        alpha_bar[0] ** .5 - alpha_bar[-1] ** .5)
    assert_close(ALPHA[1:], torch.from_numpy(by_hand).float())


def test_v_prediction_gives_images_noise_and_at_the_last_time_minus_v():
    D, y = network(), torch.arange(4)
    (x0, eps), t = torch.randn(2, 4, 3, 16, 16), torch.tensor([1, 300, 700, 1000])
    x_t = D.noised(x0, t, eps)
    assert torch.equal(x_t[3], eps[3])                      # pure noise: the image is not in it
    D.v = lambda x, t, y: column(ALPHA[t]) * eps - column(SIGMA[t]) * x0
    assert_close(D(x_t, t, y), x0, atol=1e-5, rtol=0)
    assert_close(D.eps(x_t, t, y), eps, atol=1e-5, rtol=0)
    assert torch.equal(D(x_t, t, y)[3], -D.v(x_t, t, y)[3])
    assert teacher_loss(D, x0, t, eps, y).item() == 0
    D.v = lambda x, t, y: torch.zeros_like(x)
    by_hand = (column(ALPHA[t]) * eps - column(SIGMA[t]) * x0).square().mean()
    assert_close(teacher_loss(D, x0, t, eps, y), by_hand)


@pytest.mark.parametrize("t", [50, 500, 1000])
def test_preconditioning_leaves_a_target_of_variance_one(t):
    """On images of deviation 0.5: (v - c_skip x_t) / c_out has variance 1 and no trace of x_t."""
    torch.manual_seed(0)
    x0, eps, t = .5 * torch.randn(1, 3, 400, 400), torch.randn(1, 3, 400, 400), torch.tensor([t])
    silent, loud = (Denoiser(lambda x, t, y, out=out: out + 0 * x, ALPHA, SIGMA) for out in (0, 1))
    x_t, y = silent.noised(x0, t, eps), torch.zeros(1, dtype=torch.long)
    rest = ALPHA[t] * eps - SIGMA[t] * x0 - silent.v(x_t, t, y)
    c_out = loud.v(x_t, t, y) - silent.v(x_t, t, y)
    assert (rest / c_out).var().item() == approx(1, abs=.01)
    assert (rest / c_out * x_t).mean().item() == approx(0, abs=.01)


# ---- distillation --------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_distillation_with_the_sds_weight_is_score_distillation_sampling(seed):
    """Appendix A: with c = alpha w / (2 sigma) the gradient of Eq. 4 is w (eps_hat - eps)
    dx/dtheta, here for random networks, schedules and times, in float64."""
    torch.manual_seed(seed)
    alpha = torch.rand(1001, dtype=torch.float64) * .9 + .05
    alpha[0] = 1
    conv = lambda: torch.nn.Conv2d(3, 3, 3, padding=1).double()
    teacher_net, student_net = conv(), torch.nn.Sequential(conv(), torch.nn.Tanh(), conv())
    teacher = Denoiser(lambda x, t, y: teacher_net(x) * column(t), alpha, (1 - alpha ** 2).sqrt())
    x_s, eps = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    t, y = torch.randint(1, 1000, (5,)), torch.zeros(5, dtype=torch.long)

    x_hat = student_net(x_s)
    c = c_of_t("sds", teacher.alpha[t], teacher.sigma[t])
    loss = distillation_loss(teacher, x_hat, t, eps, y, c)
    ours = torch.autograd.grad(loss, list(student_net.parameters()), retain_graph=True)

    w = column(teacher.sigma[t] ** 2)
    with torch.no_grad():
        eps_hat = teacher.eps(teacher.noised(x_hat, t, eps), t, y)
    sds = torch.autograd.grad(x_hat, list(student_net.parameters()),
                              grad_outputs=w * (eps_hat - eps) / x_hat.numel())
    for a, b in zip(ours, sds):
        assert_close(a, b, rtol=1e-10, atol=1e-14)
        assert a.abs().max() > 1e-6


def test_the_teacher_sees_the_students_image_noised_and_is_a_constant():
    teacher, y, seen = network(), torch.arange(4), []
    x_hat, eps = torch.randn(2, 4, 3, 16, 16)
    x_hat.requires_grad_()
    t, c = torch.tensor([1, 200, 600, 999]), torch.tensor([.1, .5, 2, 1.])
    v = teacher.v
    teacher.v = lambda x, t, y: seen.append(x) or v(x, t, y)
    loss = distillation_loss(teacher, x_hat, t, eps, y, c)
    assert len(seen) == 1
    assert_close(seen[0], column(ALPHA[t]) * x_hat.detach() + column(SIGMA[t]) * eps)
    target = column(ALPHA[t]) * seen[0] - column(SIGMA[t]) * v(seen[0], t, y)
    assert_close(loss, (column(c) * (x_hat - target) ** 2).mean())
    grad, *none = torch.autograd.grad(loss, [x_hat, *teacher.parameters()], allow_unused=True)
    assert_close(grad, (2 * column(c) * (x_hat - target) / x_hat.numel()).detach())
    assert set(none) == {None}


def test_weightings_by_hand():
    alpha, sigma = torch.tensor([.9, .5, .1]), torch.tensor([.2, .6, .95])
    assert torch.equal(c_of_t("exponential", alpha, sigma), alpha)
    assert_close(c_of_t("sds", alpha, sigma), alpha * sigma / 2)


def test_noise_free_score_distillation_by_hand():
    """Its gradient: sigma^2 (delta_D + s delta_C); delta_D is eps of the null class below t = 200,
    above it what sets the null class apart from the negative one."""
    teacher, t = network(), torch.tensor([50, 199, 200, 900])
    x_hat, eps = torch.randn(2, 4, 3, 16, 16)
    y, other, null = torch.arange(4), torch.tensor([5, 6, 7, 8]), torch.full((4,), 10)
    leaf = x_hat.clone().requires_grad_()
    grad, = torch.autograd.grad(nfsd_loss(teacher, leaf, t, eps, y, other, 7.5), leaf)
    x_t = teacher.noised(x_hat, t, eps)
    with torch.no_grad():
        e_y, e_null, e_other = (teacher.eps(x_t, t, label) for label in (y, null, other))
    delta_D = e_null.clone()
    delta_D[2:] -= e_other[2:]
    by_hand = column(SIGMA[t] ** 2) * (delta_D + 7.5 * (e_y - e_null)) / x_hat.numel()
    assert_close(grad, by_hand, rtol=1e-4, atol=1e-9)


def test_a_target_of_several_steps_is_ddims():
    teacher, (x_hat, eps) = Gaussian(), torch.randn(2, 3, 3, 4, 4, dtype=torch.float64)
    t, y = torch.tensor([100, 401, 999]), torch.zeros(3, dtype=torch.long)
    c = torch.ones(3, dtype=torch.float64)
    loss = distillation_loss(teacher, x_hat, t, eps, y, c, steps=2)
    x, mid = teacher.noised(x_hat, t, eps), t - t // 2
    x = teacher.noised(teacher(x, t, y), mid, teacher.eps(x, t, y))
    assert_close(loss, (x_hat - teacher(x, mid, y)).square().mean())


def test_guidance_extrapolates_from_the_null_label():
    D, x = Gaussian(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    t, y = torch.tensor([9, 99, 999]), torch.arange(3)
    null = D.v(x, t, torch.full((3,), 10))
    assert_close(guided(D, x, t, y, 2.5), null + 2.5 * (D.v(x, t, y) - null))
    assert torch.equal(guided(D, x, t, y), D.v(x, t, y))


# ---- samplers ------------------------------------------------------------------------------------

def test_ddim_follows_the_exact_flow_of_a_gaussian():
    """From pure noise z the flow ends at m + s z; one step ends at the mean m."""
    D, z = Gaussian(m=.2, s=.4), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    t, y = torch.full((4,), 1000), torch.zeros(4, dtype=torch.long)
    assert_close(ddim(D, z, t, y, 1), torch.full_like(z, .2))
    assert_close(ddim(D, z, t, y, 500), .2 + .4 * z, atol=.01, rtol=0)
    far, near = ((ddim(D, z, t, y, n) - .2 - .4 * z).abs().max() for n in (10, 100))
    assert near < far / 5


def test_sampling_predicts_and_noises_afresh_on_the_taus():
    G, y, seen = network(), torch.arange(3), []
    draws = torch.randn(3, 3, 3, 16, 16)
    recorded = lambda x, t, y: seen.append((x.clone(), t)) or G(x, t, y)
    recorded.noised = G.noised
    with torch.no_grad():
        image = sample(recorded, iter(draws).__next__, y, [1000, 500, 250])
        assert [t.tolist() for _, t in seen] == [[1000] * 3, [500] * 3, [250] * 3]
        assert torch.equal(seen[0][0], draws[0])
        for i in 1, 2:
            x_hat = G(*seen[i - 1], y)
            assert_close(seen[i][0], G.noised(x_hat, seen[i][1], draws[i]))
        assert torch.equal(image, G(*seen[2], y))
        assert torch.equal(sample(G, iter(draws).__next__, y, [1000]),
                           G(draws[0], torch.full((3,), 1000), y))


def test_simulated_inputs_are_those_of_the_sampler():
    """Row by row, whatever the calls of the others are."""
    G, taus, y = network(), [1000, 750, 500, 250], torch.arange(6) % 3
    eps, k, seen = torch.randn(4, 6, 3, 16, 16), torch.tensor([3, 0, 2, 1, 3, 0]), []
    kept, noise = eps.clone(), lambda: iter(eps).__next__
    recorded = lambda x, t, y: seen.append((x.clone(), t)) or G(x, t, y)
    recorded.noised = G.noised
    image = sample(recorded, noise(), y, taus)
    assert [t.tolist() for _, t in seen] == [[tau] * 6 for tau in taus]
    with torch.no_grad():
        assert torch.equal(image, G(*seen[3], y))
        for call, (x, _) in enumerate(seen):
            assert torch.equal(simulated(G, noise(), y, torch.full((6,), call), taus), x)
        x_s = simulated(G, noise(), y, k, taus)
    for i, call in enumerate(k.tolist()):
        assert_close(x_s[i], seen[call][0][i])
    assert torch.equal(eps, kept)                           # it is the caller's


# ---- the discriminator ---------------------------------------------------------------------------

def test_hinge_losses_by_hand():
    real = [torch.tensor([[[2., .5]], [[-1, 0]]]), torch.tensor([[[3.]], [[1]]])]
    fake = [torch.tensor([[[-2., .5]], [[-1, 0]]]), torch.tensor([[[-.5]], [[1]]])]
    assert adversarial_loss(fake).item() == approx((2 - .5 + 1 - 0) / 4 + (.5 - 1) / 2)
    by_hand = (0 + .5 + 2 + 1) / 4 + (0 + 1.5 + 0 + 1) / 4 + (0 + 0) / 2 + (.5 + 2) / 2
    assert discriminator_loss(real, fake).item() == approx(by_hand)


def test_r1_is_taken_at_the_heads_inputs():
    """Of logits <w, F> at every place, summed up: the gradient is w at each place."""
    w, features = torch.tensor([1., -2, .5], requires_grad=True), []
    features = [torch.randn(4, 3, 2, 5).requires_grad_(), torch.randn(4, 3, 1, 1).requires_grad_()]
    logits = [torch.einsum("c,bchw->bhw", w, f) for f in features]
    penalty = r1_penalty(logits, features)
    assert penalty.item() == approx(5.25 * 10 + 5.25)
    grad, = torch.autograd.grad(penalty, w)
    assert_close(grad, 2 * w.detach() * 11)


def heads(condition, calls=4):
    torch.manual_seed(0)
    disc = Discriminator([16, 32], 10, condition, calls).eval()
    if disc.unknown is not None:
        torch.nn.init.normal_(disc.unknown)
    return disc


@pytest.mark.parametrize("condition", ["none", "label", "image", "both"])
def test_the_heads_are_told_what_they_should_and_where(condition):
    """c_img is not told where s = T: there both hinges see a learned vector in its place."""
    disc, features = heads(condition), [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
    y, image, known = torch.arange(4), torch.randn(4, 32), torch.tensor([True, True, False, False])
    call = torch.arange(4)
    base = disc(features, y, image, known, call)
    assert [l.shape for l in base] == [(4, 8, 8), (4, 4, 4)]
    moved = lambda other: [(a - b).abs().amax((1, 2)) > 1e-4 for a, b in zip(base, other)]
    has_label, has_image = condition in ("label", "both"), condition in ("image", "both")
    for m in moved(disc(features, y + 1, image, known, call)):
        assert m.tolist() == [has_label] * 4
    for m in moved(disc(features, y, image.flip(1), known, call)):
        assert m.tolist() == [has_image, has_image, False, False]
    for m in moved(disc([f + 1 for f in features], y, image, known, call)):
        assert m.all()
    for m in moved(disc(features, y, image, known, call.flip(0))):
        assert m.all()
    without = heads(condition, 0)
    assert_close(without(features, y, image, known, call),
                 without(features, y, image, known, 0 * call))


def test_r1_trains_the_heads_alone():
    disc, features = heads("both"), [torch.randn(4, 16, 8, 8), torch.randn(4, 32, 4, 4)]
    features = [f.requires_grad_() for f in features]
    call = torch.arange(4)
    logits = disc(features, call, torch.randn(4, 32), torch.ones(4, dtype=torch.bool), call)
    r1_penalty(logits, features).backward()
    assert disc.label.weight.grad.abs().max() > 0 and disc.image[1].weight.grad.abs().max() > 0
    assert all(head.first[0].parametrizations.weight.original.grad.abs().max() > 0
               for head in disc.heads)


# ---- the loop ------------------------------------------------------------------------------------

TINY = "--device cpu --precision fp32 --resolution 16 --channels 16 --mult 1,1 --blocks 1,1 " \
       "--batch 4 --teacher-batch 4 --samples 0 --teacher-iters 2 --teacher-steps 2".split()


@pytest.fixture
def small(monkeypatch):
    drawn = fid.shapes(60, 16)
    monkeypatch.setattr(fid, "shapes", lambda resolution: drawn)


def last_row(out):
    text = (out / "log.csv").read_text().splitlines()
    return dict(zip(text[0].split(","), text[-1].split(",")))


def test_student_and_heads_are_updated_in_turn_and_the_teacher_is_not(small, tmp_path, monkeypatch):
    out, calls = tmp_path / "run", []
    for name in "discriminator_loss", "adversarial_loss", "distillation_loss":
        monkeypatch.setattr(add, name, lambda *a, name=name, real=getattr(add, name), **k:
                            calls.append(name) or real(*a, **k))
    add.main([*TINY, "--out", str(out), "--iters", "3", "--ema", "0"])
    assert calls == 3 * ["discriminator_loss", "adversarial_loss", "distillation_loss"]
    state = torch.load(out / "checkpoint.pt")
    updates = lambda opt: {int(v["step"]) for v in state[opt]["state"].values()}
    assert updates("opt_student") == {3} and updates("opt_disc") == {3}
    assert updates("opt_teacher") == {2}
    for name, weights in state["student"].items():
        assert_close(state["student_ema"][f"module.{name}"], weights)


@pytest.mark.parametrize("line", ["--distill-weight 0", "--adv-weight 0", "--distill-weight 100"])
def test_the_student_goes_down_both_gradients(small, monkeypatch, tmp_path, line):
    """Towards 1 by either, or to where they balance: the one pulls to 1, the other to -1."""
    means, one = [], "100" not in line
    monkeypatch.setattr(add, "adversarial_loss", lambda logits: means[-1])
    monkeypatch.setattr(add, "distillation_loss", lambda teacher, x_hat, *rest:
                        (x_hat - (1 if one else -1)).square().mean())
    real = add.Denoiser.encode
    def encode(self, x, t, y):
        if x.requires_grad:                                 # the student's images, noised
            means.append(3 * (encode.x_hat - 1).square().mean())
        return real(self, x, t, y)
    noised = add.Denoiser.noised
    def spy(self, x0, t, eps):
        if x0.requires_grad:
            encode.x_hat = x0
        return noised(self, x0, t, eps)
    seen, run_add = [], add.Run.add
    monkeypatch.setattr(add.Denoiser, "encode", encode)
    monkeypatch.setattr(add.Denoiser, "noised", spy)
    monkeypatch.setattr(add.Run, "add", lambda run, *rows, **scalars:
                        "mean" in scalars and seen.append(float(scalars["mean"]))
                        or run_add(run, *rows, **scalars))
    add.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "40", "--lr", "1e-2",
              *line.split()])
    moved = np.mean(seen[-5:]) - np.mean(seen[:5])
    assert moved > .3 if one else moved < -.1


def test_the_heads_learn_to_tell_and_weights_weigh(small, monkeypatch, tmp_path):
    """Against a student that stands still the heads' loss falls, the more R1 the less; lambda and
    the adversarial weight multiply the gradients at the image."""
    def run(name, *more, iters=60):
        add.main([*TINY, "--out", str(tmp_path / name), "--iters", str(iters), "--lr", "1e-9",
                  "--teacher", str(tmp_path / "teacher"), "--feature-noise", "0", *more])
        text = (tmp_path / name / "log.csv").read_text().splitlines()
        return [dict(zip(text[0].split(","), map(float, row.split(",")))) for row in text[1:]]
    add.main([*TINY, "--out", str(tmp_path / "teacher"), "--iters", "1"])
    plain, damped = run("plain", "--r1", "0", "--disc-lr", "1e-2"), run("damped", "--r1", "1",
                                                                       "--disc-lr", "1e-2")
    assert plain[-1]["loss_disc"] < plain[0]["loss_disc"] < 4       # two heads at chance: 4
    assert damped[-1]["loss_disc"] > plain[-1]["loss_disc"] and damped[-1]["d_real"] < 1
    felt = run("felt", "--r1", "1e-6", "--disc-lr", "1e-2")
    assert damped[-1]["r1"] < 0.5 * felt[-1]["r1"]          # what is penalised becomes less
    one, two = (run(name, "--disc-lr", "1e-9", "--distill-weight", weight, "--adv-weight", weight,
                    iters=10)[0] for name, weight in (("one", "1"), ("two", "2")))
    for name in "grad_adv", "grad_distill":
        assert two[name] == approx(2 * one[name], rel=1e-3)


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_the_student_begins_as_the_teacher_or_from_scratch(small, tmp_path, init):
    out = tmp_path / "run"
    add.main([*TINY, "--out", str(out), "--iters", "1", "--lr", "1e-9", "--student-init", init])
    state = torch.load(out / "checkpoint.pt")
    off = max((w - state["teacher_ema"][f"module.{n}"]).abs().max().item()
              for n, w in state["student"].items())
    assert (off < 1e-6) == (init == "teacher")


@pytest.mark.parametrize("line", [
    "--condition none", "--condition label", "--condition image", "--adv-weight 0",
    "--distill-weight 0", "--no-tell-call --condition none", "--weighting sds",
    "--weighting nfsd", "--teacher-denoise-steps 2",
    "--cfg 1.5", "--r1 0", "--feature-noise 0", "--taus 500,1000 --steps 1,2", "--steps 1,3,4",
    "--simulated 0", "--simulated 1", "--precision bf16"])
def test_every_switch_trains_and_samples(small, tmp_path, line):
    out = tmp_path / "run"
    add.main([*TINY, "--out", str(out), "--iters", "2", *line.split()])
    row = last_row(out)
    assert (float(row["grad_adv"]) == 0) == ("--adv-weight" in line) == ("loss_disc" not in row)
    assert (float(row["grad_distill"]) == 0) == ("--distill-weight" in line)
    assert ("loss_distill" in row) == ("--distill-weight" not in line)
    assert (float(row.get("r1", 1)) == 0) == ("--r1" in line)
    steps = line.split("--steps ")[1].split(",") if " --steps" in f" {line}" else "124"
    assert {p.name for p in out.iterdir()} >= {f"{who}-{n}step.png" for who in ("samples", "raw")
                                               for n in steps}


def test_stopped_and_resumed_in_each_phase_it_ends_the_same(small, monkeypatch, tmp_path):
    line = [*TINY, "--teacher-iters", "4", "--iters", "4", "--dropout", "0.2", "--flip",
            "--samples", "20", "--features", "random"]
    add.main([*line, "--out", str(tmp_path / "whole")])
    halves, real = [*line, "--out", str(tmp_path / "halves")], add.Run.add
    for stop in 2, 4, 6:
        def add_and_stop(run, **scalars):
            real(run, **scalars)
            if run.step == stop - 1:
                run.signal = signal.SIGTERM
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(add.Run, "add", add_and_stop)
            add.main(halves)
        assert torch.load(tmp_path / "halves" / "checkpoint.pt")["step"] == stop
    add.main(halves)
    assert_same(*(torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "halves")))
    for name in "samples-1step.png", "samples-4step.png", "raw-1step.png", "teacher-2step.png":
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()


@pytest.mark.parametrize("line, message", [
    ("--steps 5", "--steps 5: a student of 4 --taus samples in 1 to 4"),
    ("--steps 0", "--steps 0: a student of 4 --taus samples in 1 to 4"),
    ("--taus 250,500", "--taus 250,500: expected rising times from 1 to 1000, the last 1000"),
    ("--taus 500,250,1000", "expected rising times"), ("--taus none", "expected rising times"),
    ("--taus 0,1000", "expected rising times"),
    ("--teacher-iters 0", "--teacher-iters 0: expected 1 or more"),
    ("--teacher-steps 2000", "--teacher-steps 2000: expected 0 to 1000"),
    ("--feature-noise -1", "--feature-noise -1: expected 0 to 1000"),
    ("--simulated 1.5", "--simulated 1.5: expected a number from 0 to 1"),
    ("--disc-lr 0", "--disc-lr 0.0: expected a number"), ("--r1 nan", "--r1 nan: expected"),
    ("--weighting nfsd --label-dropout 0", "need a teacher that knows the null label"),
    ("--adv-weight 0 --distill-weight 0", "nothing is left for the student to learn from"),
    ("--weighting dmd", "--weighting: invalid choice"), ("--condition text", "invalid choice"),
    ("--teacher nowhere", "--teacher nowhere: holds no run of add.py"),
    ("--feature-net vit", "--feature-net vit: cannot be had")])
def test_a_mistake_is_one_line_and_touches_nothing(line, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for name in "teacher_loss", "distillation_loss":                    # nothing may train
        monkeypatch.setattr(add, name, None)
    with pytest.raises(fid.UserError) as error:
        add.main(["--device", "cpu", "--resolution", "16", *line.split()])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_vision_transformer_gives_maps_of_four_blocks(monkeypatch):
    real = add.torchvision.models.vit_b_16
    monkeypatch.setattr(add.torchvision.models, "vit_b_16", lambda weights: real(weights=None))
    net = add.VisionTransformer("vit").eval()
    x = torch.rand(1, 3, 16, 16).requires_grad_()
    maps = net(x)
    assert [m.shape for m in maps] == [(1, 768, 14, 14)] * 4
    maps[-1].mean().backward()
    assert x.grad.abs().sum() > 0 and math.isfinite(x.grad.abs().sum())


# ---- what main passes to the losses --------------------------------------------------------------

@pytest.mark.parametrize("share", [0, 0.5])
def test_what_the_losses_and_the_heads_are_given(small, monkeypatch, tmp_path, share):
    seen = dict(disc=[], encode=[], loss=[], student=[], maps=[], features=[])
    def heads(self, features, y, c_img, known, call, real=Discriminator.forward):
        seen["disc"].append((c_img, known, call))
        seen["features"].append(features)
        return real(self, features, y, c_img, known, call)
    def encode(self, x, t, y, real=Denoiser.encode):
        seen["encode"].append((t, y))
        seen["maps"].append(real(self, x, t, y))
        return seen["maps"][-1]
    def loss(teacher, x_hat, t, eps, y, c, *rest, real=distillation_loss):
        seen["loss"].append((t, c, rest))
        return real(teacher, x_hat, t, eps, y, c, *rest)
    def forward(self, x, t, y, real=Denoiser.forward):
        if torch.is_grad_enabled():                         # not in the simulation
            seen["student"].append((x, t))
        return real(self, x, t, y)
    monkeypatch.setattr(add.Discriminator, "forward", heads)
    monkeypatch.setattr(add.Denoiser, "encode", encode)
    monkeypatch.setattr(add.Denoiser, "forward", forward)
    monkeypatch.setattr(add, "distillation_loss", loss)
    for name in "draw", "evaluate":
        monkeypatch.setattr(add, name, lambda *args: None)
    add.main([*TINY, "--out", str(tmp_path / "run"), "--iters", "30", "--batch", "16", "--cfg", "3",
              "--weighting", "sds", "--teacher-denoise-steps", "2", "--simulated", str(share)])
    s = torch.cat([t for _, t in seen["student"]])
    assert set(s.tolist()) == {200, 400, 600, 1000} and len(seen["student"]) == 30
    for i, (x_s, t) in enumerate(seen["student"]):
        assert (x_s[t == 1000].std() - 1).abs() < .2        # nothing of the image is left
        told = seen["disc"][3 * i:3 * i + 3]                # real, fake, and the student's turn
        for c, known, call in told:
            real_image_behind = torch.arange(16) >= 16 * share
            assert torch.equal(known, (t < 1000) & real_image_behind)
            assert torch.equal(c, told[0][0])
            assert torch.equal(torch.tensor([1000, 600, 400, 200])[call], t)
        (t_fake, y1), (t_real, y2), (t_img, y3) = seen["encode"][16 + 3 * i:16 + 3 * i + 3]
        assert torch.equal(t_fake, t_real) and not t_img.any() and y1 is y2 is y3 is None
    noised = torch.cat([t for t, _ in seen["encode"]])
    assert noised.max() <= 250 and noised.max() > 200
    t, c = (torch.cat([row[i] for row in seen["loss"]]) for i in (0, 1))
    assert t.min() >= 1 and t.max() <= 999 and t.max() > 900
    assert_close(c, ALPHA[t] * SIGMA[t] / 2)
    assert {row[2] for row in seen["loss"]} == {(2, 3.0)}
    # The features: each channel less its mean over 16 batches of real images, in fifths of its
    # deviation over them; the real ones and the student's alike.
    first = [torch.stack(maps).double() for maps in zip(*seen["maps"][:16])]
    for i in range(30):
        (fake, real), (given_real, given_fake) = (seen[name][at:at + 2] for name, at in (
            ("maps", 16 + 3 * i), ("features", 3 * i)))
        for maps, given in (real, given_real), (fake, given_fake):
            for h, h0, h1 in zip(first, maps, given, strict=True):
                mean = h.mean((0, 1, 3, 4))[:, None, None]
                variance = h.var((1, 3, 4)).mean(0)[:, None, None]
                assert_close(h1, (5 * (h0 - mean) / (variance + 1e-5).sqrt()).float(), atol=1e-3,
                             rtol=1e-3)


def test_the_heads_are_told_the_call_unless_they_should_not(small, tmp_path):
    for name, more in ("told", []), ("not", ["--no-tell-call"]):
        add.main([*TINY, "--out", str(tmp_path / name), "--iters", "1", *more])
    told, not_ = (torch.load(tmp_path / name / "checkpoint.pt")["disc"] for name in ("told", "not"))
    assert told["call.weight"].shape == (4, 64) and "call.weight" not in not_


@pytest.mark.parametrize("line, message", [
    ("--channels 32", "was trained with --channels 16, not 32; give that here too"),
    ("--label-dropout 0.1", "was trained without null labels; train it with the same"),
    ("--label-dropout 0", "the heads see through the teacher's encoder with the null label")])
def test_a_teacher_that_does_not_fit(small, tmp_path, line, message):
    first = tmp_path / "first"
    add.main([*TINY, "--iters", "1", "--out", str(first), "--label-dropout", "0", "--adv-weight",
              "0"])
    with pytest.raises(fid.UserError, match=message):
        add.main([*TINY, "--iters", "1", *line.split(), "--teacher", str(first), "--out",
                  str(tmp_path / "second")])


def test_another_runs_teacher_is_taken_and_left_as_it_is(small, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    add.main([*TINY, "--out", str(first), "--iters", "1"])
    add.main([*TINY, "--out", str(second), "--iters", "2", "--teacher", str(first), "--lr", "1e-9",
              "--weighting", "nfsd"])
    theirs, ours = (torch.load(run / "checkpoint.pt") for run in (first, second))
    assert_same(theirs["teacher_ema"], ours["teacher_ema"])
    assert ours["step"] == 2
    for name, weights in ours["student"].items():
        assert_close(weights, theirs["teacher_ema"][f"module.{name}"], atol=1e-6, rtol=0)


def test_the_student_of_two_times_and_of_three_steps(small, tmp_path):
    assert add.call_times(3, (200, 400, 600, 1000)) == [1000, 600, 400]
    assert add.call_times(2, (200, 400, 600, 1000)) == [1000, 400]
    assert add.parse_args(["--taus", "500,1000"]).steps == (1, 2)
    assert add.parse_args([]).steps == (1, 2, 4)
