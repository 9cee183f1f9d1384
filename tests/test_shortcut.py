"""shortcut.py proved: exact flows, hand-written formulas, and the official code's recorded numbers.

Data that is one Gaussian N(m, a^2 I) has a flow in closed form: with S(t)^2 = (1-t)^2 + (t a)^2
the marginal at t is N(t m, S^2), and the flow carries x_t to x_u = u m + S(u)/S(t) (x_t - t m).
Every jump is then known.
"""
import pathlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from shortcut import (LEVELS, M, Shortcut, draw_t_d, expand, guided, sample,
                      self_consistency_target, shortcut_loss)

GOLDEN = pathlib.Path(__file__).parent / "golden" / "shortcut_official.npz"
MEAN, STD = 0.3, 0.6


def spread(t):
    return ((1 - t) ** 2 + (t * STD) ** 2) ** 0.5


def exact_jump(x, t, d, y=None):
    """(x_{t+d} - x_t) / d on the exact flow of N(MEAN, STD^2)."""
    t, d = expand(t), expand(d)
    x_next = (t + d) * MEAN + spread(t + d) / spread(t) * (x - t * MEAN)
    return (x_next - x) / d


def exact_velocity(x, t, d=None, y=None):
    """E[x_1 - x_0 | x_t], the limit of the jump for d -> 0."""
    t = expand(t)
    return MEAN + (t * STD ** 2 - (1 - t)) / spread(t) ** 2 * (x - t * MEAN)


def batch(n=64, side=4, dtype=torch.float64):
    torch.manual_seed(0)
    x_0 = torch.randn(n, 3, side, side, dtype=dtype)
    return x_0, MEAN + STD * torch.randn_like(x_0), torch.arange(n) % 10


# ---- the target ----------------------------------------------------------------------------------

@pytest.mark.parametrize("level", range(LEVELS))
def test_target_of_the_exact_jump_is_the_exact_jump(level):
    """Two half steps = one step at each of the seven lengths above the finest,
    at every t of its grid."""
    d = torch.full((2 ** level,), 0.5 ** level, dtype=torch.float64)
    t = torch.arange(2 ** level, dtype=torch.float64) * d
    x = torch.randn(len(t), 3, 4, 4, dtype=torch.float64)
    assert_close(self_consistency_target(exact_jump, x, t, d / 2, None), exact_jump(x, t, d))


def test_target_by_hand():
    """A velocity field that is no flow:
    the second half step starts at the model's own point, at t + d/2."""
    s = lambda x, t, d, y: 2 * x + expand(3 * t + 5 * d + y)
    x, t, d, y = (torch.full((1, 3, 1, 1), 0.5), torch.tensor([0.25]),
                  torch.tensor([0.5]), torch.tensor([1]))
    s_1 = 2 * 0.5 + 3 * 0.25 + 5 * 0.25 + 1                                         # 4
    s_2 = 2 * (0.5 + 0.25 * s_1) + 3 * 0.5 + 5 * 0.25 + 1                           # 6.75
    assert (s_1, s_2) == (4.0, 6.75)
    assert_close(self_consistency_target(s, x, t, d / 2, y),
                 torch.full((1, 3, 1, 1), (s_1 + s_2) / 2))


def test_target_has_no_gradient_and_the_loss_reaches_only_the_network():
    s, s_ema = torch.nn.Parameter(torch.tensor(0.7)), torch.nn.Parameter(torch.tensor(0.4))
    x_0, x_1, y = batch(8, dtype=torch.float32)
    t, d, n = torch.zeros(8), torch.ones(8), 8
    loss, _ = shortcut_loss(lambda x, t, d, y: s * x, lambda x, t, d, y: s_ema * x,
                            x_0, x_1, t, d, n, y)
    loss.backward()
    assert s_ema.grad is None
    # By hand at t = 0, d = 1: target = c x_0 with c the mean of w and w (1 + w/2), w = .4.
    c = (0.4 + 0.4 * 1.2) / 2
    assert_close(loss.detach(), (0.7 - c) ** 2 * x_0.square().mean())
    assert_close(s.grad, 2 * (0.7 - c) * x_0.square().mean())


def test_the_pass_with_a_gradient_comes_first():
    """If not, torch 2.7's autocast keeps bf16 weights for it that the targets made without one."""
    calls, (x_0, x_1, y) = [], batch(8, dtype=torch.float32)
    net = lambda x, t, d, y: calls.append(torch.is_grad_enabled()) or x
    shortcut_loss(net, net, x_0, x_1, torch.zeros(8), torch.ones(8), 4, y)
    assert calls == [True, False, False]


@pytest.mark.parametrize("case, cfg_scale", [("plain", 1.0), ("cfg", 1.5)])
def test_targets_equal_the_official_codes(case, cfg_scale):
    """kvfrans/shortcut-models, targets_shortcut.py, run on a closed formula:
    x_t, targets, guidance.

    Two of its choices are not ours: noise is scaled by 1 - (1 - 1e-5) t, put in here, and x' and
    the target are clipped to +-4, which the comparison leaves out (one value of 3072, in x').
    """
    z = {k.removeprefix(case + "_"): v for k, v in np.load(GOLDEN).items() if k.startswith(case)}
    nchw = lambda a: torch.from_numpy(a).permute(0, 3, 1, 2)
    x_0, x_1 = nchw(z["noise"]), nchw(z["images"])
    t, d = torch.from_numpy(z["t"]), 0.5 ** torch.from_numpy(z["dt_base"])
    y = torch.from_numpy(z["labels_before_dropout"]).long()
    n = int((d > 1 / M).sum())
    assert n == 16 and abs(z["v"][:n]).max() < 4

    def s(x, t, d, y):
        y = torch.full_like(d, 10) if y is None else y.float()
        return 0.3 * x + expand(t - 0.05 * (-d.log2())) + 0.02 * expand(y)
    x_t = (1 - (1 - 1e-5) * expand(t)) * x_0 + expand(t) * x_1
    assert_close(x_t, nchw(z["x_t"]), rtol=1e-5, atol=1e-6)
    target = self_consistency_target(s, x_t[:n], t[:n], d[:n] / 2, y[:n], cfg_scale)
    official, half = nchw(z["v"])[:n], d[:n] / 2
    x_mid = x_t[:n] + expand(half) * guided(s, x_t[:n], t[:n], half, y[:n], cfg_scale)
    inside = (x_mid.abs() < 4) & (official.abs() < 4)
    assert inside.sum() == inside.numel() - 1
    assert_close(target[inside], official[inside], rtol=1e-5, atol=1e-6)
    assert_close((x_1 - (1 - 1e-5) * x_0)[n:], nchw(z["v"])[n:], rtol=1e-5, atol=1e-6)
    # And the loss takes exactly these targets: a network that returns them has none left.
    _, parts = shortcut_loss(lambda x, t, d, y: nchw(z["v"]), s, x_0, x_1, t, d, n, y,
                             cfg_scale)
    assert parts["loss_flow"] < 1e-9 and parts["loss_shortcut"] < 2e-6      # the one clipped value


def test_guidance_is_at_the_finest_length_only():
    s = lambda x, t, d, y: x if y is None else 3 * x
    x, d = torch.ones(LEVELS + 1, 3, 2, 2), 0.5 ** torch.arange(LEVELS + 1.0)
    y = torch.zeros(len(d), dtype=torch.long)
    v = guided(s, x, torch.zeros_like(d), d, y, cfg_scale=2.5)[:, 0, 0, 0]
    assert v.tolist() == [3.0] * LEVELS + [1 + 2.5 * (3 - 1)]
    assert_close(guided(s, x, d, d, y, cfg_scale=1.0), 3 * x)               # 1 = off
    # A power of 1/2 may be off by a bit, on a GPU.
    next_to = torch.nextafter(torch.full_like(d, 1 / M), torch.ones(()))
    v = guided(s, x, next_to, next_to, y, cfg_scale=2.5)
    assert_close(v, guided(s, x, next_to, torch.full_like(d, 1 / M), y, cfg_scale=2.5))


# ---- times and lengths ---------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2, 4, 7, 16, 28, 32, 64, 256])
def test_all_eight_lengths_are_drawn_at_every_batch_size(size):
    torch.manual_seed(0)
    counts, k = torch.zeros(LEVELS + 1), 0.25
    rounds = 14_000 // size
    for _ in range(rounds):
        t, d, n = draw_t_d(size, k)
        level = -d.log2()
        assert (level == level.round()).all() and d.min() >= 1 / M and d.max() <= 1
        assert (level[:n] < LEVELS).all() and (level[n:] == LEVELS).all()
        assert ((t + d)[:n] <= 1).all() and (t >= 0).all() and (t < 1).all()
        assert ((t / d)[:n] == (t / d)[:n].round()).all()                   # on the grid of d
        counts += torch.bincount(level.long(), minlength=LEVELS + 1)
    share = counts / (rounds * size)
    assert_close(share[LEVELS].item(), 1 - k, atol=0.02, rtol=0)
    assert_close(share[:LEVELS], torch.full((LEVELS,), k / LEVELS), atol=0.006, rtol=0)


def test_times_are_uniform_on_the_grid_of_their_length():
    torch.manual_seed(0)
    t, d, n = draw_t_d(70_000, 1.0)
    for length in (1.0, 0.5, 0.25):
        at, cells = t[d == length], int(1 / length)
        share = torch.bincount((at / length).long(), minlength=cells) / len(at)
        assert_close(share, torch.full((cells,), length), atol=0.02, rtol=0)


# ---- the loss ------------------------------------------------------------------------------------

def test_k_0_is_flow_matching():
    torch.manual_seed(0)
    t, d, n = draw_t_d(64, 0.0)
    x_0, x_1, y = batch()
    t, s = t.double(), lambda x, t, d, y: x.sin()
    loss, parts = shortcut_loss(s, None, x_0, x_1, t, d, n, y)          # no target network needed
    x_t = (1 - expand(t)) * x_0 + expand(t) * x_1
    assert n == 0 and (d == 1 / M).all()
    assert_close(loss, ((x_t.sin() - (x_1 - x_0)) ** 2).mean())
    assert_close(parts["loss_flow"], loss)


def test_loss_of_the_exact_flow_is_at_its_floor():
    """Self-consistency: zero. Flow matching: the variance of v given x_t, a^2 / S(t)^2;
    anything else is worse."""
    torch.manual_seed(0)
    x_0, x_1, y = batch(20_000, side=2)
    t, d, n = draw_t_d(len(x_0), 0.25)
    t, d = t.double(), d.double()
    exact = lambda x, t, d, y: torch.where(expand(d) > 1 / M,
                                           exact_jump(x, t, d), exact_velocity(x, t))
    _, parts = shortcut_loss(exact, exact_jump, x_0, x_1, t, d, n, y)
    assert parts["loss_shortcut"] < 1e-20
    floor = (STD / spread(t[n:])).square().mean()
    assert_close(parts["loss_flow"], floor, rtol=0.02, atol=0)
    for off in (-0.1, 0.1):
        _, worse = shortcut_loss(lambda *a: exact(*a) + off, exact_jump, x_0, x_1, t, d, n, y)
        assert_close(worse["loss_shortcut"].item(), 0.01, rtol=1e-6, atol=0)
        assert_close(worse["loss_flow"] - parts["loss_flow"], torch.tensor(0.01).double(),
                     atol=0.004, rtol=0)


@pytest.mark.parametrize("n, names", [(0, {"loss_flow"}), (3, {"loss_flow", "loss_shortcut"}),
                                      (8, {"loss_shortcut"})])
def test_the_loss_is_one_mean_over_the_batch_and_names_the_parts_it_has(n, names):
    x_0, x_1, y = batch(8)
    t = torch.zeros(8).double()
    d = torch.where(torch.arange(8) < n, 1.0, 1 / M).double()
    loss, parts = shortcut_loss(lambda x, t, d, y: x, exact_jump, x_0, x_1, t, d, n, y)
    assert parts.keys() == names
    means = n * parts.get("loss_shortcut", 0) + (8 - n) * parts.get("loss_flow", 0)
    assert_close(loss, means / 8)


# ---- the sampler ---------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [2 ** i for i in range(LEVELS + 1)])
def test_every_number_of_steps_carries_noise_to_data_exactly(steps):
    """With the exact jump, 1 step = 128 steps: x_1 = m + a x_0, as the flow of a Gaussian must."""
    x_0, _, y = batch(4)
    calls = []

    def s(x, t, d, y):
        calls.append((t[0].item(), d[0].item()))
        return exact_jump(x, t.double(), d.double())
    assert_close(sample(s, x_0, y, steps), MEAN + STD * x_0)
    assert calls == [(i / steps, 1 / steps) for i in range(steps)]                  # NFE, t and d


class Record(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.seen = value, []
    def forward(self, x, t, d, y):
        self.seen.append((x, d))
        return torch.full_like(x, self.value)


def test_preconditioning_is_the_best_linear_guess_and_leaves_unit_variance():
    """On N(0, a^2) a silent network is exact, its input has variance one,
    and so has what it should add."""
    torch.manual_seed(0)
    a, net = 0.5, Record(0.0)
    x_0 = torch.randn(4000, 3, 4, 4, dtype=torch.float64)
    x_1 = a * torch.randn_like(x_0)
    for time in (0.0, 0.25, 0.6, 0.95, 1.0):
        t = torch.full((len(x_0),), time, dtype=torch.float64)
        x_t = torch.lerp(x_0, x_1, expand(t))
        S = ((1 - time) ** 2 + (time * a) ** 2) ** 0.5
        v = Shortcut(net, a)(x_t, t, torch.full_like(t, 1 / M), None)
        assert_close(v, (time * a ** 2 - (1 - time)) / S ** 2 * x_t)
        left = Shortcut(Record(1.0), a)(x_t, t, torch.full_like(t, 1 / M), None) - v        # c_out
        assert_close(((x_1 - x_0 - v) / left).var().item(), 1.0, rtol=0.01, atol=0)
        assert_close(net.seen[-1][0].var().item(), 1.0, rtol=0.01, atol=0)


def test_one_step_is_the_networks_image_and_the_network_sees_log2_d():
    net = Record(0.25)
    x_0 = torch.randn(5, 3, 2, 2)
    assert_close(sample(Shortcut(net), x_0, None, 1), torch.full_like(x_0, 0.5 * 0.25))
    d = 0.5 ** torch.arange(LEVELS + 1.0)
    Shortcut(net)(torch.zeros(len(d), 3, 2, 2), 0 * d, d, None)
    assert_close(net.seen[-1][1], torch.linspace(0, 1, LEVELS + 1))
