"""What the three loops do with the losses: down, not up; the right images, labels and networks."""
import math

import pytest
import torch
from pytest import approx
from torch.testing import assert_close

import add
import dmd2
import fid
import shortcut

TINY = "--device cpu --precision fp32 --resolution 16 --channels 16 --mult 1,1 --blocks 1,1 " \
       "--samples 0 --batch 16".split()
TEACHER = "--teacher-batch 16 --teacher-iters 8 --teacher-steps 2".split()
PIXELS, LABELS = fid.shapes(60, 16)
DATA = fid.from_uint8(PIXELS).flatten(1)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(fid, "shapes", lambda resolution: (PIXELS, LABELS))
    for module in shortcut, dmd2, add:
        for name in "draw", "evaluate":
            monkeypatch.setattr(module, name, lambda *args, **kwargs: None)


def of_the_data(x):
    return torch.cdist(x.flatten(1), DATA).amin(1) < .05    # cdist rounds


def labels_of(x):
    assert of_the_data(x).all()
    return LABELS[torch.cdist(x.flatten(1), DATA).argmin(1)]


class Pull(dict):
    """Losses that are least where a bias is 1, and which of them fell, by name."""
    def __call__(self, name, bias):
        loss = (bias - 1).square().sum()
        self.setdefault(name, []).append(loss.item())
        return loss

    def fell(self):
        return {name for name, values in self.items() if values[-1] < values[0]}


def drawn_by(module, monkeypatch):
    """-> a list that fills with the batches that a script draws."""
    batches = []
    def draw_batch(*args, real=module.draw_batch):
        batches.append(real(*args))
        return batches[-1]
    monkeypatch.setattr(module, "draw_batch", draw_batch)
    return batches


# ---- what is common to them ----------------------------------------------------------------------

def test_a_batch_has_its_own_labels_and_mirrored_images_where_asked():
    torch.manual_seed(0)
    x, y = shortcut.draw_batch(PIXELS, LABELS, 200, False)
    assert torch.equal(labels_of(x), y) and len(set(y.tolist())) == 10
    x, y = shortcut.draw_batch(PIXELS, LABELS, 200, True)
    straight, mirrored = of_the_data(x), of_the_data(x.flip(3))
    assert (straight | mirrored).all() and .3 < (straight & ~mirrored).float().mean() < .7
    back = torch.where(straight[:, None, None, None], x, x.flip(3))
    assert torch.equal(labels_of(back), y)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    for end in 0.0, 0.1:
        opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        schedule, rates = shortcut.warmup_cosine(opt, 5000, end), []
        for _ in range(5001):
            rates.append(opt.param_groups[0]["lr"])
            opt.step()
            schedule.step()
        cosine = lambda i: 2 * (end + (1 - end) * (1 + math.cos(math.pi * i / 5000)) / 2)
        assert rates[0] == approx(2 / 100, rel=1e-3) and rates[49] == approx(cosine(49) / 2)
        assert [rates[i] for i in (100, 2500, 4999, 5000)] == approx(
            [cosine(100), 1 + end, cosine(4999), 2 * end], abs=1e-9)


def test_an_update_goes_down_gradients_clipped_at_norm_1_and_then_forgets_them():
    for scale, clipped in (3.0, 1.0), (0.1, 0.5):
        p = torch.zeros(25, requires_grad=True)
        opt = torch.optim.SGD([p], lr=2.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.5 ** i)
        p.grad = torch.full((25,), scale)
        assert shortcut.update(opt, schedule).item() == approx(5 * scale)
        assert (p < 0).all() and p.norm().item() == approx(2 * clipped, rel=1e-4)
        assert p.grad is None and schedule.get_last_lr() == [1.0]
        p.grad = torch.full((25,), scale)
        shortcut.update(opt)                                # at half the rate, which stays
        assert p.norm().item() == approx(3 * clipped, rel=1e-4)
        assert schedule.get_last_lr() == [1.0]


# ---- shortcut.py ---------------------------------------------------------------------------------

def test_shortcut_learns_from_noise_to_images_with_null_labels_in_the_flow_rows(tmp_path,
                                                                                monkeypatch):
    dropped, rows, pull = 0, 0, Pull()
    def loss(s, s_target, x_0, x_1, t, d, n, y, cfg_scale=1.0):
        nonlocal dropped, rows
        own = labels_of(x_1)
        assert abs(x_0.std() - 1) < .05 and cfg_scale == 2
        assert torch.equal(y[:n], own[:n]) and ((y == own) | (y == 10)).all()
        dropped, rows = dropped + int((y[n:] == 10).sum()), rows + len(y) - n
        return pull("s", s.net.conv_out.bias), {}
    monkeypatch.setattr(shortcut, "shortcut_loss", loss)
    shortcut.main([*TINY, "--iters", "20", "--cfg", "2", "--label-dropout", "0.5", "--out",
                   str(tmp_path)])
    assert pull.fell() == {"s"} and .3 < dropped / rows < .7


def test_shortcut_samples_the_mean_with_its_guidance(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(shortcut, "evaluate", lambda run, scorer, generate, *rest, **more:
                        generate(shortcut.noise_of(range(2), run.args), torch.arange(2), 128))
    monkeypatch.setattr(shortcut, "sample", lambda s, x, y, steps, d=None, cfg_scale=1.0:
                        calls.append((type(s), steps, d, cfg_scale)) or x)
    shortcut.main([*TINY, "--iters", "1", "--cfg", "2", "--out", str(tmp_path)])
    assert calls == [(shortcut.AveragedModel, 128, None, 2.0)]


# ---- dmd2.py -------------------------------------------------------------------------------------

@pytest.mark.parametrize("gan", ["1", "0"])
def test_dmd2_learns_the_teacher_from_images_and_the_fake_score_from_generated(tmp_path,
                                                                                monkeypatch, gan):
    levels, labels, pull, batches = [], [], Pull(), drawn_by(dmd2, monkeypatch)
    def denoising(D, x0, sigma, eps, y):
        if D.training:                                      # the teacher
            own = labels_of(x0)
            assert ((y == own) | (y == 10)).all()
            levels.append(sigma.log())
            labels.append(y)
        else:
            assert not of_the_data(x0).any()
        return pull("teacher" if D.training else "fake", D.net.conv_out.bias)
    def generators(real_score, fake_score, disc, x0, *rest):
        return 0 * x0.sum(), 0 * x0.sum()
    def fakes(fake_score, disc, x0, real, sigma, eps, y):
        assert torch.equal(labels_of(real), y[:len(real)] % 11)     # which say the call, too
        assert not of_the_data(x0).any()
        return pull("fake", fake_score.net.conv_out.bias), pull("disc", disc.heads[-1][-1].bias)
    for name, f in dict(denoising_loss=denoising, generator_losses=generators,
                        fake_score_losses=fakes).items():
        monkeypatch.setattr(dmd2, name, f)
    seen, forward = [], dmd2.Denoiser.forward
    def watched(self, x, sigma, y):
        if torch.is_grad_enabled():                         # the generator, in its own update
            seen.append((x, sigma, y))
        return forward(self, x, sigma, y)
    monkeypatch.setattr(dmd2.Denoiser, "forward", watched)
    dmd2.main([*TINY, *TEACHER, "--iters", "6", "--gan-weight", gan, "--disc-weight", "1", "--cfg",
               "2", "--label-dropout", "0.5", "--pairs-iters", "0", "--p-mean", "-3", "--p-std",
               "0.5", "--train-steps", "4", "--no-backward-simulation", "--fake-updates", "2",
               "--out", str(tmp_path)])
    assert pull.fell() == {"teacher", "fake", *["disc"] * int(gan)}
    levels, labels = torch.cat(levels), torch.cat(labels)
    assert abs(levels.mean() + 3) < .3 and abs(levels.std() - .5) < .15
    assert .3 < (labels == 10).float().mean() < .7
    highest = torch.cat([sigma for _, sigma, _ in seen]).max()
    for (x, sigma, y), (real, own) in zip(seen, batches[8::2], strict=True):
        assert torch.equal(y, own)
        x0 = real * (sigma < highest)[:, None, None, None]          # the first call's: noise alone
        eps = (x - x0) / sigma[:, None, None, None]
        assert abs(eps.square().mean((1, 2, 3)) - 1).max() < .25
    last = torch.load(tmp_path / "checkpoint.pt")
    rate = lambda name: last[f"opt_{name}"]["param_groups"][0]["lr"]
    assert rate("generator") == approx(0.1 * dmd2.parse_args([]).lr) and rate("teacher") == 0


# ---- add.py --------------------------------------------------------------------------------------

def test_add_shows_each_network_what_is_its_own(tmp_path, monkeypatch):
    times, labels, heads, seen, scored = [], [], [], [], []
    pull, batches = Pull(), drawn_by(add, monkeypatch)
    def teachers(D, x0, t, eps, y):
        own = labels_of(x0)
        assert ((y == own) | (y == 10)).all()
        times.append(t)
        labels.append(y)
        return pull("teacher", D.net.conv_out.bias)
    def simulated(student, noise, y, k, taus, real=add.simulated):
        assert taus == [1000, 600, 400, 200]
        return real(student, noise, y, k, taus)
    def hinge(real, fake, was=add.discriminator_loss):
        heads.append(real)
        return was(real, fake)
    def r1(logits, features, was=add.r1_penalty):
        assert logits is heads[-1]                          # of the real images
        return was(logits, features)
    def distillation(teacher, *args, was=add.distillation_loss):
        assert not any(p.requires_grad for p in teacher.parameters())
        return was(teacher, *args)
    def encode(self, x, t, *args, was=add.Denoiser.encode):
        assert not any(p.requires_grad for p in self.parameters())
        if not t.any():                                     # c_img
            assert torch.equal(x, batches[-1][0])
        return was(self, x, t, *args)
    def noised(self, x0, t, eps, was=add.Denoiser.noised):
        assert not t.any() or abs(eps.std() - 1) < .1
        return was(self, x0, t, eps)
    def forward(self, x, t, y, was=add.Denoiser.forward):
        if torch.is_grad_enabled():
            seen.append((x[8:], t[8:], y[8:]))              # not the simulated half
            assert torch.equal(y, batches[-1][1])
        return was(self, x, t, y)
    def told(self, features, y, *rest, was=add.Discriminator.forward):
        assert torch.equal(y, batches[-1][1])
        return was(self, features, y, *rest)
    for name, f in dict(teacher_loss=teachers, simulated=simulated, discriminator_loss=hinge,
                        r1_penalty=r1, distillation_loss=distillation).items():
        monkeypatch.setattr(add, name, f)
    for name, f in dict(encode=encode, noised=noised, forward=forward).items():
        monkeypatch.setattr(add.Denoiser, name, f)
    monkeypatch.setattr(add.Discriminator, "forward", told)
    monkeypatch.setattr(add, "sample", lambda net, *rest: scored.append(net.state_dict()))
    monkeypatch.setattr(add, "evaluate", lambda run, scorer, generate, steps, who, *rest, **more:
                        who == "student ema" and generate(None, torch.arange(2), 1))
    add.main([*TINY, *TEACHER, "--iters", "6", "--label-dropout", "0.5", "--out", str(tmp_path)])
    assert pull.fell() == {"teacher"}
    last, name = torch.load(tmp_path / "checkpoint.pt"), "net.conv_out.weight"
    assert not torch.equal(last["student"][name], last["student_ema"][f"module.{name}"])
    assert [torch.equal(s[name], last["student_ema"][f"module.{name}"]) for s in scored] == [True]
    times, labels = torch.cat(times), torch.cat(labels)
    assert times.min() < 100 and times.max() > 900
    assert .3 < (labels == 10).float().mean() < .7
    alpha, sigma = add.vp_schedule()
    for (x, t, y), (x0, own) in zip(seen, batches[8 + 16:], strict=True):
        for x, t, x0 in zip(x, t, x0[8:]):                  # unit noise, once its image is gone
            assert abs(((x - alpha[t] * x0) / sigma[t]).square().mean() - 1) < .25


def test_adds_other_class_is_another(tmp_path, monkeypatch):
    pairs = []
    def nfsd(teacher, x_hat, t, eps, y, y_other, scale, real=add.nfsd_loss):
        pairs.append((y, y_other))
        return real(teacher, x_hat, t, eps, y, y_other, scale)
    monkeypatch.setattr(add, "nfsd_loss", nfsd)
    add.main([*TINY, *TEACHER, "--iters", "6", "--weighting", "nfsd", "--out", str(tmp_path)])
    y, other = (torch.cat(rows) for rows in zip(*pairs))
    assert (y != other).all() and set(((other - y) % 10).tolist()) == set(range(1, 10))


def test_adds_weighting_is_that_of_its_time(tmp_path, monkeypatch):
    seen = []
    def loss(teacher, x_hat, t, eps, y, c, *rest, real=add.distillation_loss):
        seen.append((t, c))
        return real(teacher, x_hat, t, eps, y, c, *rest)
    monkeypatch.setattr(add, "distillation_loss", loss)
    add.main([*TINY, *TEACHER, "--iters", "2", "--out", str(tmp_path)])
    for t, c in seen:
        assert_close(c, add.vp_schedule()[0][t])            # exponential: alpha
