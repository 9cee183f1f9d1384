"""fid.py proved: pytorch-fid's recorded features and distances, closed forms, SciPy, sums by hand.

Shapes are held against geometry (areas, centroids), files against pixels the tests wrote. What a
user or a stranger gets wrong in a file is one line of UserError and runs no code. All is offline.
"""
import hashlib
import itertools
import math
import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.error
import zipfile
import zlib

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import torchvision
from PIL import EpsImagePlugin, Image
from pytest import approx
from torch.nn import functional as F
from torch.testing import assert_close

import fid
from fid import (Inception, RandomFeatures, Statistics, UserError, frechet_distance, from_uint8,
                 inception_state, load_features, load_images, read_batches, read_folder, statistics,
                 to_uint8)

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "pytorch_fid.npz")
nchw = lambda images: torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)
normal = lambda *shape, seed=0: np.random.default_rng(seed).standard_normal(shape)
dots = lambda *shape, seed=0: np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def near(ours, by_hand, off=0.0):
    """Of one shape and type, and nowhere further apart than `off`."""
    assert_close(torch.as_tensor(ours), torch.as_tensor(by_hand), rtol=0, atol=off)


def refuses(call, *words):
    """The call raises a UserError whose message is one line and says all the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and [w for w in words if str(w) not in message] == [], message


def offline(*_, **__):
    raise urllib.error.URLError("no route to host")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


class Hostile:
    """Unpickled, it makes a folder."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# ---- the distance --------------------------------------------------------------------------------

@pytest.mark.parametrize("other", "23")         # 3 has rank 39 of 64
def test_distance_is_that_of_pytorch_fid(other):
    gaussians = [GOLDEN[k] for k in ("mu1", "sigma1", "mu" + other, "sigma" + other)]
    assert frechet_distance(*gaussians) == approx(float(GOLDEN["fd1" + other]), rel=1e-6)


@pytest.mark.parametrize("axes", [np.eye(6), np.linalg.qr(normal(6, 6))[0]], ids=["own", "turned"])
def test_distance_of_gaussians_that_commute(axes):
    """|mu1 - mu2|^2 + sum (sqrt a - sqrt b)^2, a and b variances along shared axes, some zero."""
    a, b = np.array([4, 1, .25, 9, 0, 2]), np.array([1, 1, 4, 0, 0, 3.])
    by_hand = 6 * .5 ** 2 + 1 + 0 + 2.25 + 9 + 0 + (3 ** .5 - 2 ** .5) ** 2
    ours = frechet_distance(np.zeros(6), axes * a @ axes.T, np.full(6, .5), axes * b @ axes.T)
    assert ours == approx(by_hand, rel=1e-7)


def test_distance_of_gaussians_that_do_not_commute():
    """2x2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)), M = sigma1 sigma2. 20x20: SciPy's root."""
    s1, s2 = np.array([[2., .5], [.5, 1]]), np.array([[1., -.8], [-.8, 3]])
    cross = math.sqrt(2 * 1 - .5 * .8 * 2 + 3 + 2 * math.sqrt((2 - .25) * (3 - .64)))
    assert frechet_distance([1, 2], s1, [0, 4], s2) == approx(1 + 4 + 3 + 4 - 2 * cross, rel=1e-12)

    (mu1, mu2), f, g = normal(2, 20), normal(50, 20), normal(60, 20, seed=2) * np.arange(1, 21)
    s1, s2 = f.T @ f / 50, g.T @ g / 60
    scipys = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    tensors = [torch.from_numpy(a) for a in (mu1, s1, mu2, s2)]
    assert frechet_distance(mu1, s1, mu2, s2) == approx(scipys, rel=1e-10)
    assert frechet_distance(mu2, s2, mu1, s1) == approx(scipys, rel=1e-10)
    assert frechet_distance(*tensors) == approx(scipys, rel=1e-10)
    single = [t.float() for t in tensors]       # rounded on the way in, but computed in float64
    assert frechet_distance(*single) == frechet_distance(*(t.double() for t in single))


def test_distance_without_full_rank_and_to_itself():
    """10 images, 40 features: tr sqrt(sigma1 sigma2) is the nuclear norm of centred F G^T / 9."""
    f, g, a, b = normal(10, 40), 1 + 2 * normal(10, 40, seed=1), Statistics(40), Statistics(40)
    a.update(torch.from_numpy(f))
    b.update(torch.from_numpy(g))
    cf, cg = f - f.mean(0), g - g.mean(0)
    traces = ((cf ** 2).sum() + (cg ** 2).sum() - 2 * np.linalg.norm(cf @ cg.T, "nuc")) / 9
    by_hand = ((f.mean(0) - g.mean(0)) ** 2).sum() + traces
    assert fid.distance(a, b) == approx(by_hand, rel=1e-7)
    assert fid.distance(b, a) == approx(by_hand, rel=1e-7)
    assert fid.distance(b, b) == approx(0, abs=1e-6)


def test_distance_where_neither_covariance_has_a_cholesky_factor():
    """One lacks full rank, the other, both: tr sqrt(sigma1 sigma2) is a nuclear norm again."""
    for n, m in (10, 200), (200, 10), (10, 20), (200, 300):
        f, g = 1 + normal(n, 40), 2 * normal(m, 40, seed=1)
        cf, cg = (a - a.mean(0) for a in (f, g))
        s1, s2 = cf.T @ cf / (n - 1), cg.T @ cg / (m - 1)
        cross = np.linalg.norm(cf @ cg.T, "nuc") / math.sqrt((n - 1) * (m - 1))
        by_hand = ((f.mean(0) - g.mean(0)) ** 2).sum() + s1.trace() + s2.trace() - 2 * cross
        assert frechet_distance(f.mean(0), s1, g.mean(0), s2) == approx(by_hand, rel=1e-7)
    assert frechet_distance([1, 2], np.zeros((2, 2)), [1, 0], np.eye(2)) == approx(4 + 2)


@pytest.mark.parametrize("dim", [1, 2, 64, 2048])
def test_distance_in_one_to_2048_dimensions(dim):
    """Turned by one and the same reflection: |mu1 - mu2|^2 + sum (sqrt a - sqrt b)^2."""
    a, b, mu, axis = (normal(dim, seed=i) for i in range(4))
    a, b, axis = a ** 2 + .01, b ** 2, axis / np.linalg.norm(axis)
    mirror = np.eye(dim) - 2 * np.outer(axis, axis)
    ours = frechet_distance(mu, mirror * a @ mirror.T, 2 * mu, mirror * b @ mirror.T)
    assert ours == approx((mu ** 2).sum() + ((a ** .5 - b ** .5) ** 2).sum(), rel=1e-9)


# ---- KID, precision, recall ----------------------------------------------------------------------

def test_kernel_distance_by_loops():
    """Unbiased squared MMD: diagonals left out; the mean over three parts, and its error."""
    f, g, values = normal(12, 5), normal(9, 5, seed=1) + .3, []
    k = lambda x, y: (x @ y / 5 + 1) ** 3
    pairs = lambda x: np.mean([k(a, b) for a, b in itertools.permutations(x, 2)])
    for x, y in zip(np.split(f, 3), np.split(g, 3)):
        values.append(pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a in x for b in y]))
    ours = fid.kernel_distance(torch.from_numpy(f), torch.from_numpy(g), blocks=3)
    assert ours == approx((np.mean(values), np.std(values, ddof=1) / 3 ** .5), rel=1e-12)


def test_kernel_distance_is_unbiased_and_its_error_honest():
    """Two samples of one Gaussian: 0 on average, and the errors are as large as they claim."""
    sample = lambda seed: torch.from_numpy(normal(60, 4, seed=seed))
    found = [fid.kernel_distance(sample(i), sample(i + 1)) for i in range(0, 400, 2)]
    values, errors = np.array(found).T
    assert abs(values.mean()) < 3 * values.std() / 200 ** .5
    assert np.sqrt((errors ** 2).mean()) == approx(values.std(), rel=.15)


def test_precision_and_recall_by_loops():
    g, f = normal(40, 3), np.concatenate([normal(20, 3, seed=1), normal(7, 3, seed=2) + 9])
    d = lambda a, b: np.linalg.norm(a - b)
    def covered(x, y):
        radii = [sorted(d(a, b) for b in y)[3] for a in y]          # the 0th is itself
        return np.mean([any(d(a, b) <= r for b, r in zip(y, radii)) for a in x])
    ours = fid.precision_recall(torch.from_numpy(f), torch.from_numpy(g))
    assert ours == approx((covered(f, g), covered(g, f)))
    assert ours[0] <= 20 / 27                                       # seven are far from all
    # On a line: balls of radius 3 about -9 .. 0, so all samples are real, and cover half.
    line, half = torch.arange(-9, 1.)[:, None], torch.arange(-4, 1.)[:, None]
    assert fid.precision_recall(half, line) == approx((1, .8))      # -9 and -8 are not reached
    far = fid.precision_recall(torch.from_numpy(f + 1e8), torch.from_numpy(g + 1e8))
    assert far == ours                                              # where squares have no digits


# ---- statistics ----------------------------------------------------------------------------------

@pytest.mark.parametrize("offset,dtype,off", [      # 1e6 squared leaves 4 of 16 digits
    (0, torch.float64, 1e-13), (1e6, torch.float64, 1e-8), (1e3, torch.float32, 1e-11)])
def test_streamed_statistics_are_those_of_all_at_once(offset, dtype, off):
    f = torch.from_numpy(offset + normal(1000, 7) @ normal(7, 7, seed=1)).to(dtype)
    streamed, left, right = Statistics(7), Statistics(7), Statistics(7)
    for part in f.split([1, 499, 3, 497]):
        streamed.update(part)
    left.update(f[:300])
    right.update(f[300:])
    left.merge(right.n, right.mean, right.scatter)
    f = f.double().numpy() - offset
    for stats in streamed, left:
        assert stats.n == 1000
        near(stats.mean, f.mean(0) + offset, 1e-13 * max(1, 10 * offset))
        near(stats.cov, np.cov(f, rowvar=False), off)


def test_statistics_of_images_without_tf32_and_open_to_more(monkeypatch):
    net, (pixels, _), seen = RandomFeatures(), fid.shapes(50, 32), []
    f = net(pixels).double().numpy()
    monkeypatch.setattr(net, "batch", 7)        # the last of the batches has one image
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    stats = statistics(net, pixels)
    assert seen == [False] * 8 and torch.backends.cudnn.allow_tf32
    near(stats.mean, f.mean(0), 1e-6)
    near(stats.cov, np.cov(f, rowvar=False), 1e-6)
    stats.merge(stats.n, stats.mean.clone(), stats.scatter.clone())
    near(stats.cov, np.cov(np.tile(f, (2, 1)), rowvar=False), 1e-6)
    refuses(lambda: statistics(net, pixels[:1]), "1 images", "at least 2")


def test_fifty_thousand_images_in_two_orders():
    f = torch.from_numpy(3 + normal(50_000, 48)).float()
    a, b = Statistics(48), Statistics(48)
    for part in f.split(1000):
        a.update(part)
    for part in f.flip(0).split(1024):
        b.update(part)
    assert a.n == b.n == 50_000
    assert (a.mean - b.mean).norm() <= 1e-12 * a.mean.norm()
    assert (a.cov - b.cov).norm() <= 1e-12 * a.cov.norm()
    zero = np.zeros(48), np.eye(48)
    assert frechet_distance(a.mean, a.cov, *zero) == approx(frechet_distance(b.mean, b.cov, *zero),
                                                            rel=1e-9)


def test_kept_features_are_of_different_images_in_random_order():
    net, (pixels, _) = RandomFeatures(), fid.shapes(60, 16)
    f, (stats, some) = net(pixels), (statistics(net, pixels, keep=k) for k in (100, 20))
    assert stats.size == (16, 16) and stats.network == "random"
    at = torch.cdist(stats.kept, f).argmin(1)
    near(stats.kept, f[at], 1e-5)
    assert sorted(at.tolist()) == list(range(60)) and at.tolist() != sorted(at.tolist())
    near(some.kept, stats.kept[:20])
    assert len(statistics(net, pixels).kept) == 0


def gathered(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=3)
    own = Statistics(7)
    part = torch.from_numpy(normal(100, 7)).tensor_split([40, 40])[rank]        # rank 1 has none
    if len(part):
        own.update(part)
    total = own.gather()
    torch.save([total.n, total.mean, total.cov], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_statistics_of_several_processes(tmp_path):
    torch.multiprocessing.spawn(gathered, (str(tmp_path),), nprocs=3)
    f = normal(100, 7)
    for rank in range(3):
        n, mean, cov = torch.load(tmp_path / f"{rank}.pt")
        assert n == 100
        near(mean, f.mean(0), 1e-14)
        near(cov, np.cov(f, rowvar=False), 1e-14)


# ---- the cache, files of statistics --------------------------------------------------------------

def test_reference_statistics_are_computed_once_and_never_stale(cache, monkeypatch):
    net, (pixels, _), calls = RandomFeatures(), fid.shapes(60, 16), []
    monkeypatch.setattr(fid, "statistics", lambda *args: calls.append(1) or statistics(*args))
    first, again = fid.reference(net, pixels), fid.reference(net, pixels)
    assert len(calls) == 1 and len(list(cache.iterdir())) == 1
    near(again.mean, first.mean)
    near(again.cov, first.cov, 1e-15)
    assert (again.n, again.network) == (60, "random")

    other = pixels.clone()
    other[7, 1, 2, 3] ^= 1                                          # one bit of one pixel
    changes = [(net, other), (net, pixels[:59]), (net, pixels.view(60, 3, 8, 32)),
               (RandomFeatures(seed=1), pixels)]
    for i, change in enumerate(changes):
        fid.reference(*change)
        assert len(calls) == 2 + i
    near(fid.reference(net, pixels).kept, statistics(net, pixels, keep=fid.KEEP).kept)
    changed = cache / "fid.py"
    changed.write_bytes(pathlib.Path(fid.__file__).read_bytes() + b"# changed\n")
    monkeypatch.setattr(fid, "__file__", str(changed))
    calls.clear()
    fid.reference(net, pixels)
    assert len(calls) == 1


def test_a_damaged_or_unwritable_cache_costs_time_and_no_more(cache, monkeypatch):
    net, (pixels, _) = RandomFeatures(), fid.shapes(60, 16)
    first = fid.reference(net, pixels)
    file, = cache.iterdir()
    for content in b"", file.read_bytes()[:-500], b"garbage":
        file.write_bytes(content)
        near(fid.reference(net, pixels).cov, first.cov, 1e-15)
        near(fid.load_statistics(file).cov, first.cov, 1e-15)       # and mended
    monkeypatch.setattr(fid, "CACHE", file / "no folder")
    near(fid.reference(net, pixels).cov, first.cov, 1e-15)
    assert [p.name for p in cache.iterdir()] == [file.name]
    monkeypatch.setattr(fid, "CACHE", cache)                # there, and another user's
    refused = []
    def denied(path, *args):
        refused.append(pathlib.Path(path).name)
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(fid, "open", denied, raising=False)
    near(fid.reference(net, pixels).cov, first.cov, 1e-15)
    assert refused == [file.name]


def test_the_cache_keeps_the_twenty_newest(cache):
    net, (pixels, _) = RandomFeatures(), fid.shapes(60, 16)
    for i in range(25):
        np.savez(cache / f"{i}.npz", i)
        os.utime(cache / f"{i}.npz", (i, i))
    fid.reference(net, pixels)
    names = {p.name for p in cache.iterdir()}
    assert len(names) == 20 and names > {f"{i}.npz" for i in range(6, 25)}


def test_files_of_statistics_are_those_of_pytorch_fid(tmp_path):
    stats, ours, theirs = (Statistics(5, "random", (8, 9)), tmp_path / "ours.npz",
                           tmp_path / "theirs.npz")
    f = normal(20, 5)
    stats.update(torch.from_numpy(f))
    fid.save_statistics(ours, stats)
    with np.load(ours) as file:
        near(file["mu"], f.mean(0), 1e-15)
        near(file["sigma"], np.cov(f, rowvar=False), 1e-15)
    loaded = fid.load_statistics(ours)
    assert (loaded.n, loaded.network, loaded.size) == (20, "random", (8, 9))
    assert [p.name for p in tmp_path.iterdir()] == ["ours.npz"]
    np.savez(theirs, mu=f.mean(0), sigma=np.cov(f, rowvar=False))
    loaded = fid.load_statistics(theirs)
    assert (loaded.n, loaded.network, loaded.size) == (0, None, None)
    assert fid.distance(loaded, stats) == approx(0, abs=1e-12)
    for folder in "none", "ours.npz":
        refuses(lambda: fid.save_statistics(tmp_path / folder / "x.npz", stats), folder, "written")


@pytest.mark.parametrize("arrays", [
    {}, dict(mu=np.zeros(3)), dict(mu=np.zeros(3), sigma=np.eye(4)),
    dict(mu=np.zeros((3, 3)), sigma=np.eye(3)), dict(mu=np.full(3, np.nan), sigma=np.eye(3)),
    dict(mu=np.zeros(3), sigma=np.full((3, 3), np.inf)), dict(mu=np.zeros(3, int), sigma=np.eye(3)),
    dict(mu=np.zeros(3), sigma=np.eye(3), n=-1), dict(mu=np.zeros(3), sigma=np.eye(3), n=[1, 2]),
    dict(mu=np.zeros(3), sigma=np.eye(3), n="many"), dict(mu=np.zeros(3), sigma=np.eye(3), n=2.5),
    dict(mu=np.zeros(3), sigma=-np.eye(3)), dict(mu=np.zeros(3), sigma=np.tri(3)),
    dict(mu=np.zeros(3), sigma=np.eye(3), size=[1, 2, 3]),
    dict(mu=np.zeros(3), sigma=np.eye(3), size=["a", "b"]),
    dict(mu=np.zeros(3), sigma=np.eye(3), kept=np.zeros((2, 4)))])
def test_files_that_are_no_statistics(tmp_path, arrays):
    np.savez(tmp_path / "s.npz", **arrays)
    refuses(lambda: fid.load_statistics(tmp_path / "s.npz"), "s.npz", "no statistics")


# ---- the command ---------------------------------------------------------------------------------

PROTOCOL = (r"(?P<label>[\w-]+) (?P<value>\S+)( \+- \S+)? \| (?P<features>\S+) \| "
            r"(?P<n>\S+) samples vs (?P<m>\S+) (?P<data>.+) \| NFE \? \| (?P<who>.+) \| "
            r"(?P<speed>\S+) img/s(?P<more>.*)")


def scores(capsys, *argv):
    """Run the command -> its protocol lines, as dicts by label."""
    fid.main([str(a) for a in argv])
    lines = [re.fullmatch(PROTOCOL, line) for line in capsys.readouterr().out.splitlines()]
    return {line["label"]: line for line in lines if line}


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(fid, "shapes", lambda n=400, resolution=32, seed=0, draw=fid.shapes:
                        draw(min(n, 400), resolution, seed))


def test_the_command_on_every_kind_of_samples(few_shapes, tmp_path, capsys):
    pixels, net = fid.shapes(300, 32, seed=3)[0], RandomFeatures()
    nhwc = pixels.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "nhwc.npz", images=nhwc, labels=np.zeros(300, int))
    np.savez(tmp_path / "arr.npz", nhwc)
    np.save(tmp_path / "nchw.npy", pixels.numpy())
    for i, image in enumerate(nhwc):
        save(tmp_path / "folder" / f"{i:03}.png", image)
    real = statistics(net, fid.shapes()[0], keep=400)
    own = statistics(net, pixels, keep=300)
    value = f"{fid.distance(own, real):.4g}"
    precision, recall = fid.precision_recall(own.kept, real.kept)
    for name in "nhwc.npz", "arr.npz", "nchw.npy", "folder":
        lines = scores(capsys, tmp_path / name, "--data", "shapes", "--features", "random")
        assert [*lines] == ["FD-random", "KD-random", "precision-random", "recall-random"]
        fd = lines["FD-random"]
        assert (fd["value"], fd["n"], fd["m"], fd["data"]) == (value, "300", "400", "shapes train")
        assert fd["who"] == str(tmp_path / name) and "fewer than 2048" in fd["more"]
        assert not lines["KD-random"]["more"]               # KID has no bias to warn of
        assert float(lines["precision-random"]["value"]) == approx(precision, abs=1e-4)
        assert float(lines["recall-random"]["value"]) == approx(recall, abs=1e-4)
        assert float(lines["KD-random"]["value"]) == approx(
            fid.kernel_distance(own.kept, real.kept)[0], rel=.01)
    other = scores(capsys, tmp_path / "nchw.npy", "--data", "shapes", "--split", "test",
                   "--features", "random")["FD-random"]
    assert other["data"] == "shapes test" and other["value"] != value


def test_the_command_with_files_of_statistics(few_shapes, tmp_path, capsys):
    pixels = fid.shapes(300, 32, seed=3)[0]
    np.save(tmp_path / "samples.npy", pixels.numpy())
    random = "--features", "random"
    for i, image in enumerate(fid.shapes()[0].permute(0, 2, 3, 1).numpy()):
        save(tmp_path / "folder" / f"{i:03}.png", image)    # the same as --data shapes
    whole = scores(capsys, tmp_path / "samples.npy", "--data", "shapes", *random)["FD-random"]
    fid.main(["--data", "shapes", *random, "--save-stats", str(tmp_path / "real.npz")])
    fid.main([str(tmp_path / "samples.npy"), *random, "--save-stats", str(tmp_path / "own.npz")])
    for samples, compare in (("samples.npy", ["--stats", tmp_path / "real.npz"]),
                             ("own.npz", ["--stats", tmp_path / "real.npz"]),
                             ("own.npz", ["--data", tmp_path / "folder"])):   # as the file's
        lines = scores(capsys, tmp_path / samples, *compare)
        assert [*lines] == ["FD-random"] and lines["FD-random"]["value"] == whole["value"]
        assert (lines["FD-random"]["n"], lines["FD-random"]["m"]) == ("300", "400")


def test_statistics_that_do_not_say_whose_they_are_are_inceptions_with_a_mark(tmp_path, capsys):
    """pytorch-fid's, EDM's and ADM's files are alike, but for how the images were resized."""
    theirs, ours = tmp_path / "theirs.npz", tmp_path / "ours.npz"
    np.savez(theirs, mu=np.ones(2048), sigma=np.eye(2048))
    stats = Statistics(2048, "inception", (32, 32))
    stats.n, stats.scatter = 3000, 4 * 2999 * torch.eye(2048, dtype=torch.float64)
    fid.save_statistics(ours, stats)
    for pair, features in ((ours, theirs), "inception?"), ((theirs, theirs), "inception?"), \
            ((ours, ours), "inception"):
        lines = scores(capsys, pair[0], "--stats", pair[1])
        assert [*lines] == ["FID"] and lines["FID"]["features"] == features
        distance = 4096 if pair == (ours, theirs) else 0
        assert float(lines["FID"]["value"]) == approx(distance, abs=1e-6)
        assert not lines["FID"]["more"]


def test_the_command_with_inception(golden_state, few_shapes, monkeypatch, tmp_path, capsys):
    """Labels without a suffix; and in `auto`, where there are no weights, random features."""
    np.save(tmp_path / "s.npy", dots(22, 16, 16, 3))
    for i in range(21):
        save(tmp_path / "real" / f"{i}.png", dots(16, 16, 3, seed=i))
    line = tmp_path / "s.npy", "--data", tmp_path / "real"
    assert [*scores(capsys, *line)] == [f"{s}-random" for s in ("FD", "KD", "precision", "recall")]
    monkeypatch.setattr(fid, "inception_state", lambda path: golden_state)
    lines = scores(capsys, *line)
    assert [*lines] == ["FID", "KID", "precision", "recall"]
    assert {l["features"] for l in lines.values()} == {"inception"}


def test_of_few_samples_the_distance_alone(few_shapes, tmp_path, capsys):
    np.save(tmp_path / "s.npy", dots(19, 32, 32, 3))
    fid.main([str(tmp_path / "s.npy"), "--data", "shapes"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FD-random") and said[1].startswith("no KID") and len(said) == 2


@pytest.mark.parametrize("label,n,m,few", [
    ("FID", 2048, 2048, ""), ("FID", 2047, 2048, "samples"),
    ("FD-random", 9000, 300, "real images"),
    ("FID", 300, 300, "samples and real images"), ("FID", 0, 0, ""), ("KID", 300, 300, "")])
def test_a_line_says_which_are_few(label, n, m, few):
    line = fid.protocol(label, "1", "random", n, m, "set", 1, "s", 1)
    said = f" | fewer than 2048 {few}: biased upward" if few else ""
    assert line.partition(" img/s")[2] == said


def test_the_command_refuses_in_one_line(few_shapes, tmp_path):
    ok, text = tmp_path / "ok.npy", tmp_path / "text.npz"
    np.save(ok, dots(30, 32, 32, 3))
    np.save(tmp_path / "float.npy", np.zeros((30, 32, 32, 3), np.float32))
    np.save(tmp_path / "grey.npy", dots(30, 32, 32, 1))
    np.save(tmp_path / "one.npy", dots(1, 32, 32, 3))
    np.save(tmp_path / "flat.npy", dots(30, 3072))
    np.save(tmp_path / "wide.npy", dots(30, 32, 48, 3))
    np.savez(tmp_path / "two.npz", a=dots(2, 8, 8, 3), b=dots(2, 8, 8, 3))
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "sized.npz", mu=np.zeros(480), sigma=np.eye(480), size=[64, 64])
    np.save(tmp_path / "nothing.npy", np.zeros((30, 0, 0, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as file:
        file.writestr("a.png", b"no array")
    np.save(tmp_path / "hostile.npy", np.array([Hostile(tmp_path / "ran")]), allow_pickle=True)
    text.write_text("no archive")
    (tmp_path / "cut.npy").write_bytes(ok.read_bytes()[:5000])
    save(tmp_path / "mixed" / "a.png", dots(8, 8, 3))
    save(tmp_path / "mixed" / "b.png", dots(9, 8, 3))
    (tmp_path / "empty").mkdir()
    alone = save(tmp_path / "alone" / "a.png", dots(32, 32, 3))
    shapes = ["--data", "shapes", "--features", "random"]
    cases = [([], "SAMPLES"), ([ok], "--data or --stats"), (["--data", "shapes"], "SAMPLES"),
             ([ok, "--data", "shapes", "--stats", ok], "one of them"),
             ([ok, "--data", "shapes", "--features", "magic"], "--features"),
             ([ok, *shapes, "--nonsense"], "--nonsense"), ([ok, "--data", "nowhere"], "nowhere"),
             ([tmp_path / "none.npz", *shapes], "none.npz", "No such file"),
             ([text, *shapes], "text.npz", "cannot be read", "begins as neither"),
             ([alone, *shapes], "a.png", "begins as neither"),     # NumPy would say: a pickle
             ([ok, "--data", alone.parent, *shapes[2:]], "alone: holds 1 images", "at least 2"),
             ([ok, "--data", ok, *shapes[2:]], "is a file", "--stats"),
             ([tmp_path / "cut.npy", *shapes], "cut.npy", "cannot be read"),
             ([tmp_path / "hostile.npy", *shapes], "hostile.npy", "allow_pickle=False"),
             ([tmp_path / "float.npy", *shapes], "float32", "uint8"),
             ([tmp_path / "grey.npy", *shapes], "[30, 32, 32, 1]", "uint8"),
             ([tmp_path / "one.npy", *shapes], "one.npy", "at least 2"),
             ([tmp_path / "flat.npy", *shapes], "0 arrays of images"),
             ([tmp_path / "two.npz", *shapes], "2 arrays of images"),
             ([tmp_path / "wide.npy", *shapes], "48x32", "the same"),
             ([tmp_path / "mixed", *shapes], "b.png", "8x9", "8x8"),
             ([tmp_path / "empty", *shapes], "no images"),
             ([ok, *shapes, "--resolution", "64"], "32x32", "64x64"),
             ([ok, *shapes, "--save-stats", ok / "s.npz"], "cannot be written"),
             ([ok, *shapes, "--resolution", "2"], "8 or more"),
             ([ok, "--data", str(tmp_path / "empty"), "--split", "test"], "no splits"),
             ([ok, "--stats", "s.npz", "--split", "test"], "--data, which is not given"),
             ([ok, "--stats", "s.npz", "--resolution", "32"], "--data, which is not given"),
             ([ok, *shapes, "--inception", "w.pth"], "of no use"),
             ([ok, *shapes, "--save-stats", ok], "would replace"),
             ([ok, *shapes, "--save-stats", tmp_path / "empty"], "is a folder"),
             (["--data", str(tmp_path / "mixed"), "--save-stats", "s.npz"], "of one size"),
             ([tmp_path / "zip.npz", *shapes], "not all of it is arrays"),
             ([tmp_path / "nothing.npy", *shapes], "[30, 0, 0, 3]"),
             ([tmp_path / "sized.npz", *shapes, "--resolution", "32"], "64x64", "32x32"),
             ([ok, *shapes, "--device", "warp"], "--device warp"),
             ([ok, "--stats", tmp_path / "none.npz"], "none.npz"),
             ([ok, "--stats", ok], "no statistics"),
             ([ok, "--stats", tmp_path / "inception.npz", *shapes[2:]], "2048 features"),
             ([ok, "--stats", tmp_path / "small.npz", *shapes[2:]], "64 features of an unknown"),
             ([tmp_path / "small.npz", "--stats", tmp_path / "inception.npz"], "expected 64"),
             ([ok, *shapes, "--save-stats", tmp_path / "none" / "s.npz"], "cannot be written"),
             ([ok, "--data", "shapes", "--inception", "w.pth"], "w.pth")]
    before = sorted(p.name for p in tmp_path.iterdir())
    for argv, *words in cases:
        refuses(lambda: fid.main([str(a) for a in argv]), *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_command_from_a_shell(tmp_path):
    run = subprocess.run([sys.executable, fid.__file__, "none.npz", "--data", "shapes"],
                         capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("fid.py: none.npz: ") and run.stderr.count("\n") == 1
    np.savez(tmp_path / "s.npz", mu=np.zeros(480), sigma=np.eye(480))
    with subprocess.Popen([sys.executable, fid.__file__, "s.npz", "--stats", "s.npz"], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as run:
        run.stdout.close()                                  # as `| head` does
        assert (run.stderr.read(), run.wait()) == ("", 141)


HUB = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / fid.INCEPTION_FILE
CIFAR = pathlib.Path(__file__).parent.parent / "data" / "cifar-10-batches-py"


@pytest.mark.skipif(not HUB.exists(), reason=f"needs the Inception weights in {HUB}")
@pytest.mark.skipif(not CIFAR.exists(), reason=f"needs CIFAR-10 in {CIFAR}")
@pytest.mark.skipif(not (torch.cuda.is_available() or "FEWSTEP_SLOW" in os.environ),
                    reason="60,000 images: needs a GPU, or FEWSTEP_SLOW=1 and half an hour or more")
def test_cifar10_train_against_test():
    """3.1508 in TensorFlow, 3.1525 and 3.1457 in PyTorch ports
    (w86763777/pytorch-image-generation-metrics)."""
    net = Inception(inception_state(HUB)).to("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (load_images("cifar10", 32, split, CIFAR.parent).pixels
                   for split in ("train", "test"))
    assert fid.distance(statistics(net, test), statistics(net, train)) == approx(3.15, abs=.01)


# ---- Inception -----------------------------------------------------------------------------------

def torchvisions():
    return torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                           init_weights=False).eval()


@pytest.fixture(scope="module")
def golden_state():
    """The weights of golden/README.md, a formula of each tensor's name."""
    state = torchvisions().state_dict()
    assert sorted(state) == sorted(GOLDEN["keys"].tolist())
    for name, tensor in state.items():
        v = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        tensor.copy_(torch.as_tensor(
            0 if name.endswith("num_batches_tracked") else
            1 + .1 * v if name.endswith("bn.weight") else
            1 + .1 * abs(v) if name.endswith("bn.running_var") else
            .1 * v if name.endswith(("bn.bias", "bn.running_mean")) or name == "fc.bias" else
            v * math.sqrt(2 / math.prod(tensor.shape[1:]))))
    return state


def test_inception_features_are_those_of_pytorch_fid(golden_state):
    net, plain = Inception(golden_state), torchvisions()
    for size in "32", "64":
        images, theirs = nchw(GOLDEN["images" + size]), torch.from_numpy(GOLDEN["features" + size])
        off = lambda ours: (ours - theirs[:len(ours)]).norm(dim=1) / theirs[:len(ours)].norm(dim=1)
        near(off(net(images)), torch.zeros(4), 1e-5)
    plain.load_state_dict(golden_state)         # torchvision's own poolings are still unpatched
    plain.fc = torch.nn.Identity()
    with torch.no_grad():
        unpatched = plain(2 * F.interpolate(images[:1] / 255, (299, 299), mode="bilinear") - 1)
    assert off(unpatched).item() > .05


def test_weights_are_downloaded_once_checked_and_loaded(golden_state, monkeypatch, tmp_path):
    source, asked = tmp_path / "weights.pth", []
    torch.save(golden_state, source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()

    def download(url, file, hash_prefix):
        asked.append((url, hash_prefix))
        source.rename(file)
    assert fid.INCEPTION_FILE == f"pt_inception-2015-12-05-{fid.INCEPTION_SHA256[:8]}.pth"
    monkeypatch.setattr(fid, "INCEPTION_SHA256", digest)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    nets = load_features("inception"), load_features("auto")
    assert asked == [("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                      "pt_inception-2015-12-05-6726825d.pth", digest)]
    (tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE).unlink()            # 95 MB
    for net in nets:
        assert net.label == "FID"
        images, theirs = nchw(GOLDEN["images32"]), torch.from_numpy(GOLDEN["features32"])
        assert (net(images[:1]) - theirs[:1]).norm() / theirs[:1].norm() < 1e-5


def test_without_network_scores_fall_back_to_random_features(tmp_path, capsys):
    refuses(inception_state, "no route to host", fid.INCEPTION_FILE, "--inception PATH")
    refuses(lambda: load_features("inception"), "no route to host")
    assert load_features("random").label == "FD-random" and capsys.readouterr().out == ""
    assert load_features("auto").label == "FD-random"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("no FID: Inception's weights")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.save(tmp_path / "s.npy", dots(3, 8, 8, 3))           # what can only be of Inception
    refuses(lambda: fid.main([str(tmp_path / "s.npy"), "--stats", str(tmp_path / "theirs.npz")]),
            "no route to host")


def test_wrong_or_hostile_weights_are_refused(monkeypatch, tmp_path):
    file, marker = tmp_path / "w.pth", tmp_path / "ran"
    cached = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    for content in b"not weights", pickle.dumps(Hostile(marker)):
        file.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        for name in "auto", "inception":        # a file that was named is never passed over
            refuses(lambda: load_features(name, inception=file), file, "not the FID", digest[:12])
            with pytest.raises(UserError, match=r"\.\.\.\)$"):    # nor told to be removed
                load_features(name, inception=file)
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut short")
    refuses(inception_state, cached, "not the FID weights", "remove it")
    refuses(lambda: inception_state(tmp_path / "none.pth"), "none.pth", "No such file")
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: (_ for _ in ()).throw(
        PermissionError(13, "Permission denied")))          # another user's home
    assert load_features("auto").label == "FD-random"
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    refuses(lambda: inception_state(tmp_path), tmp_path, "directory")
    torch.save(Hostile(marker), file)           # and if the checksum let it through
    monkeypatch.setattr(fid, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError):
        inception_state(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()                      # it was a live one


# ---- random features -----------------------------------------------------------------------------

def test_random_features_are_fixed_and_as_written_out_in_numpy():
    net, i = RandomFeatures(), torch.arange(3 * 3 * 16 * 16)
    pixels = ((i * 37 + i // 97) % 256).to(torch.uint8).view(3, 3, 16, 16)
    features, x, by_hand = net(pixels), pixels[0].double().numpy() / 127.5 - 1, []
    for conv in net.convs:
        x = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
        x = np.einsum("ihwyx,oiyx->ohw", windows, conv.weight) + conv.bias.numpy()[:, None, None]
        x = np.where(x > 0, x, .2 * x)
        by_hand.extend(x.mean((1, 2)))
        x = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    assert features.shape == (3, 480)
    near(features[0], np.array(by_hand, np.float32), 1e-4)
    # Recorded once, so that a score of today can be set beside one of last year.
    fingerprint = [0.71767, 0.10129, -0.1659, -0.14574, -0.08758, 0.61207, -0.06106, 0.02511]
    near(features[0, [0, 31, 32, 95, 96, 223, 224, 479]], torch.tensor(fingerprint), 1e-4)
    near(net(pixels[1:2]), features[1:2], 1e-5)                 # whatever else is in the batch
    near(RandomFeatures()(pixels), features)
    assert (RandomFeatures(seed=1)(pixels) - features).abs().mean() > .1
    assert net(pixels[:, :, :4, :4]).shape == (3, 480)


def test_random_distance_rises_with_blur_noise_and_lost_classes():
    net, (pixels, labels) = RandomFeatures(), fid.shapes(2400, seed=1)
    real, fresh, fresh_labels = pixels[:300].numpy(), pixels[300:], labels[300:]
    reference, noise = statistics(net, pixels[:300]), normal(*real.shape)
    score = lambda x: fid.distance(statistics(net, torch.as_tensor(x)), reference)
    same = score(real)
    blurred = [score(scipy.ndimage.gaussian_filter(real, (0, 0, s, s))) for s in (.5, 1, 2)]
    noisy = [score((real + s * noise).clip(0, 255).astype(np.uint8)) for s in (8, 16, 32)]
    fewer = [score(fresh[fresh_labels < n][:200]) for n in (10, 5, 1)]
    again = [score(fresh[:n].repeat(960 // n, 1, 1, 1)) for n in (960, 240, 60, 15)]    # duplicates
    for scores in [same, *blurred], [same, *noisy], fewer, again:
        assert np.diff(scores).min() > 1e-3, scores
    assert same == approx(0, abs=1e-6)
    assert fewer[0] < .5 * min(blurred[2], fewer[2])            # another sample of the same images


# ---- pixels, shapes ------------------------------------------------------------------------------

def test_uint8_and_back():
    """floor(127.5 x + 128), held in 0..255: EDM's rule."""
    every = torch.arange(256, dtype=torch.uint8)
    near(to_uint8(from_uint8(every)), every)
    near(from_uint8(every), torch.linspace(-1, 1, 256), 1e-6)
    x = torch.tensor([-1, -.997, -.995, -.5, -1e-4, 0, .5, .995, .997, 1, 1.01, -1.01, 300, -300])
    by_hand = torch.tensor([0, 0, 1, 64, 127, 128, 191, 254, 255, 255, 255, 0, 255, 0]).byte()
    near(to_uint8(x), by_hand)
    near(to_uint8(x.bfloat16())[[0, 3, 5, 6, 9]], by_hand[[0, 3, 5, 6, 9]])


def lens(r, s, d):
    """Area common to two circles of radii r, s whose centres are d apart."""
    sector = lambda r, a: r * r * math.acos(a / r) - a * math.sqrt(r * r - a * a)
    a = (d * d + r * r - s * s) / (2 * d)       # from the first centre to the common chord
    return sector(r, a) + sector(s, d - a)


AREAS = dict(           # at radius 1, from the lengths in fid.py by school geometry
    circle=math.pi * .88 ** 2, ring=math.pi * (.94 ** 2 - .46 ** 2), square=2 * 1.1 ** 2,
    triangle=3 * math.sqrt(3) / 4 * 1.12 ** 2, diamond=2 * 1.15 * .72, cross=8 * .33 - 4 * .33 ** 2,
    star=5 * 1.15 * .5 * math.sin(math.pi / 5), arrow=.95 * 1.03 + .72 * 1.05,
    heart=1.55 ** 2 * (.5 + math.pi / 8),
    moon=math.pi * .98 ** 2 - lens(.98, .8, math.hypot(.46, .22)))


def test_shapes_are_what_where_and_as_large_as_drawn():
    """Labels, colours, radii and centres are drawn here again, in the same order; then geometry."""
    n, side, rng = 400, 96, torch.Generator().manual_seed(5)
    labels, ink, ground = (torch.randint(k, (n,), generator=rng) for k in (10, 8, 4))
    size, dx, dy, _ = torch.rand(4, n, generator=rng)
    rgb = lambda text: torch.tensor([[[list(bytes.fromhex(c))]] for c in text.split()]).mT.float()
    ink = rgb("ff4d4d ff9f1c ffe14d 5ddb5d 2ee6d6 4da3ff b67cff ff7ad9")[ink].transpose(1, 2)
    ground = rgb("10152e 2b1030 0c2a2a 2a1d12")[ground].transpose(1, 2)
    radius, ticks = .28 + .10 * size, (torch.arange(side) + .5) / side
    room = torch.minimum(.5 - 1.15 * radius, torch.tensor(.09))
    centre = torch.stack([.5 + room * (2 * dx - 1), .5 + room * (2 * dy - 1)], 1)

    pixels, found = fid.shapes(n, side, seed=5)
    near(found, labels)
    back = (ground * (.75 + .9 * ticks)[:, None]).expand(pixels.shape)
    cover = ((pixels - back) * (ink - back)).sum(1) / (ink - back).square().sum(1)          # 0 to 1
    area = cover.mean((1, 2))
    expected = torch.tensor([AREAS[shape] for shape in fid.SHAPES])[labels]
    near(area / radius ** 2 / expected, torch.ones(n), .02)
    rows, columns = [0, 0, -1, -1], [0, -1, 0, -1]
    near(pixels[:, :, rows, columns].float(), back[:, :, rows, columns].round())

    own = labels == 0                           # circles
    x, y = ((cover.mean(axis) * ticks).mean(1) / area for axis in (1, 2))
    near(torch.stack([x, y], 1)[own], centre[own], 5e-4)
    middle = [p[:, int(side * b), int(side * a)] for p, (a, b) in zip(pixels[own], centre[own])]
    near(torch.stack(middle).float(), ink[own, :, 0, 0])
    # Anti-aliased: a ramp one pixel wide, so as many pixels are part ink as the outline is long.
    soft = ((cover > .02) & (cover < .98)).sum((1, 2))[own]
    near(soft / (.96 * 2 * math.pi * .88 * radius[own] * side), torch.ones(len(soft)), .1)


def test_shapes_are_the_same_for_a_seed_and_balanced():
    before = torch.get_rng_state()
    images = load_images("shapes", 32)
    near(torch.get_rng_state(), before)         # the training's noise is not touched
    assert images.pixels.shape == (20_000, 3, 32, 32) and images.pixels.dtype == torch.uint8
    assert images[2:4] == (fid.SHAPES, "shapes train") and images.labels.dtype == torch.int64
    near(torch.bincount(images.labels), torch.full((10,), 2000), 200)       # sigma is 42
    (once, labels), (again, labels_again), (other, _) = (fid.shapes(200, seed=s) for s in (0, 0, 1))
    near(once, again)
    near(labels, labels_again)
    assert (once.float() - other.float()).abs().mean() > 10


# ---- a folder of images --------------------------------------------------------------------------

def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def test_class_folders(tmp_path):
    top, far = tmp_path / "set", tmp_path / "far"
    files = [top / "ant/1.png", top / "ant/deep/2.bmp", top / "bee/3.TIFF", far / "4.png"]
    for i, path in enumerate(files):
        save(path, dots(8, 8, 3, seed=i))
    (top / "cat").symlink_to(far)
    for passed_over in ".git/6.png", "__MACOSX/7.png", "ant/.8.png":
        save(top / passed_over, dots(8, 8, 3))
    for passed_over in "notes.txt", "ant/labels.csv", "features.h5", "film.mpg", "drawing.eps":
        (top / passed_over).write_text("no image")
    images = load_images(str(top), 8)
    assert images.classes == ["ant", "bee", "cat"] and images.name == str(top)
    near(images.labels, torch.tensor([0, 0, 1, 2]))
    near(images.pixels, nchw([dots(8, 8, 3, seed=i) for i in range(4)]))
    (top / "dog").symlink_to(far)                           # once more, and then a circle
    (top / "bee" / "all").symlink_to(top)
    images = load_images(str(top), 8)
    assert images.classes == ["ant", "bee", "cat", "dog"]
    near(images.labels, torch.tensor([0, 0, 1, 2, 3]))
    save(top / "__init__" / "1.png", dots(8, 8, 3))         # what a user calls a class is one
    assert load_images(str(top), 8).classes == ["__init__", "ant", "bee", "cat", "dog"]


def test_a_flat_folder_of_every_kind_of_file(tmp_path):
    palette, exif = Image.new("P", (8, 8), 1), Image.Exif()
    palette.putpalette([9, 9, 9, 200, 100, 50])
    exif[0x0112] = 6                            # the camera lay on its side: turn clockwise
    noise, white = dots(8, 8, 3), (255, 255, 255)
    kinds = [           # in the order of names: name, image, options, pixels by hand, tolerance
        ("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), {}, (255, 0, 0), 3),
        ("crop-even.png", dots(8, 12, 3), {}, dots(8, 12, 3)[:, 2:10], 0),
        ("crop-odd.png", dots(11, 8, 3), {}, dots(11, 8, 3)[1:9], 0),           # at whole pixels
        ("exif.png", noise, dict(exif=exif), np.rot90(noise, -1), 0),
        ("grey-clear.png", Image.new("LA", (8, 8), (10, 0)), {}, white, 0),
        ("grey.png", noise[..., 0], {}, noise[..., :1], 0),
        ("grey16.png", np.full((8, 8), 0xc0ff, np.uint16), {}, (0xc0, 0xc0, 0xc0), 0),
        ("palette-clear.png", palette, dict(transparency=1), white, 0),
        ("palette.gif", palette, {}, (200, 100, 50), 0),
        ("rgba-clear.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)), {}, white, 0),
        ("rgba-half.png", Image.new("RGBA", (8, 8), (255, 0, 51, 102)), {}, (255, 153, 173.4), 1),
        ("rgba.png", Image.new("RGBA", (8, 8), (200, 100, 50, 255)), {}, (200, 100, 50), 0)]
    for name, image, options, *_ in kinds:
        save(tmp_path / name, image, **options)
    pixels, labels, classes = read_folder(tmp_path, 8)
    assert classes == [] and labels.tolist() == [0] * len(kinds)
    for (name, _, _, by_hand, tolerance), ours in zip(kinds, pixels, strict=True):
        off = abs(ours.permute(1, 2, 0).numpy() - np.broadcast_to(by_hand, (8, 8, 3)).astype(float))
        assert off.max() <= tolerance, name


def test_downsampling_is_antialiased_lanczos_of_the_centre(tmp_path):
    """Weights sinc(x) sinc(x / 3), x the distance in small pixels, normalised at the edges."""
    x = (np.arange(20) + .5) / 2.5 - (np.arange(8)[:, None] + .5)
    weights = np.sinc(x) * np.sinc(x / 3) * (abs(x) < 3)
    weights /= weights.sum(1, keepdims=True)
    large = dots(20, 30, 3) // 2 + 64           # nothing is clipped between the two passes
    save(tmp_path / "a.png", large)
    by_hand = np.einsum("iy,jx,yxc->cij", weights, weights, large[:, 5:25])
    near(read_folder(tmp_path, 8)[0][0].double(), by_hand, 1.01)


def test_broken_images_are_named(tmp_path, monkeypatch):
    ran, whole = [], save(tmp_path / "whole.jpg", dots(64, 64, 3)).read_bytes()
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: ran.append(a))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for name, content in [("cut.jpg", whole[:len(whole) // 2]), ("empty.png", b""),
                          ("garbage.png", b"\x89PNG\r\n" * 20), ("program.png", eps)]:
        fine = save(tmp_path / name[:-4] / "fine.png", dots(8, 8, 3))
        (fine.parent / name).write_bytes(content)
        refuses(lambda: read_folder(fine.parent, 8), fine.parent / name, "cannot be read")
    assert ran == []            # PostScript is a program, and Pillow goes by content, not by name
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    refuses(lambda: read_folder(tmp_path / "link", 8), "gone.png", "No such file")
    save(tmp_path / "float" / "f.tiff", np.zeros((8, 8), np.float32))
    refuses(lambda: read_folder(tmp_path / "float", 8), "f.tiff", "floating-point")
    save(tmp_path / "wide" / "i.tiff", np.full((8, 8), 2 ** 20, np.int32))
    refuses(lambda: read_folder(tmp_path / "wide", 8), "i.tiff", "32-bit")
    with monkeypatch.context() as patch:
        def no_memory(*args, **kwargs):
            raise MemoryError
        patch.setattr(Image, "open", no_memory)
        refuses(lambda: read_folder(tmp_path / "wide", 8), "i.tiff", "MemoryError")
    save(tmp_path / "small" / "s.png", dots(9, 7, 3))
    refuses(lambda: read_folder(tmp_path / "small", 8), "s.png", "7x9", "8x8", "--resolution")


def test_paths_that_are_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(lambda: load_images(tmp_path / "empty", 8), "empty", "no images")
    save(tmp_path / "mixed" / "class" / "a.png", dots(8, 8, 3))
    save(tmp_path / "mixed" / "stray.png", dots(8, 8, 3))
    refuses(lambda: load_images(tmp_path / "mixed", 8), "mixed", "stray.png")
    refuses(lambda: load_images("no/such/folder", 8), "no/such/folder", "shapes, cifar10")
    refuses(lambda: load_images(300 * "x", 8), 300 * "x", "no such data set or folder")
    (tmp_path / "images.tar.gz").write_bytes(b"")
    refuses(lambda: load_images(tmp_path / "images.tar.gz", 8), "images.tar.gz", "is a file")


# ---- downsampled ImageNet, CIFAR-10 --------------------------------------------------------------

def write_batch(folder, number, data=None, labels=(1, 1000, 7)):
    file = folder / f"train_data_batch_{number}.npz"
    np.savez(file, data=dots(3, 192, seed=number) if data is None else data, labels=labels)
    return file


def test_batches_come_in_the_order_of_their_numbers(tmp_path):
    for number in 10, 2, 1:
        write_batch(tmp_path, number, labels=(1, 1000, number))
    images = load_images(tmp_path, 8)
    rows = np.concatenate([dots(3, 192, seed=n) for n in (1, 2, 10)])
    assert images.labels.tolist() == [0, 999, 0, 0, 999, 1, 0, 999, 9]
    assert images[2:4] == ([str(i) for i in range(1000)], f"{tmp_path.name} train")
    for channel, y, x in (0, 0, 0), (1, 2, 3), (2, 7, 7):       # planes of red, green, blue
        near(images.pixels[:, channel, y, x], rows[:, 64 * channel + 8 * y + x])


@pytest.mark.parametrize("word,arguments", [
    ("float64", dict(data=np.zeros((3, 192)))), ("(3, 48)", dict(data=np.zeros((3, 48), np.uint8))),
    ("()", dict(labels=1)), ("(2, 192)", dict(labels=[1, 2])), ("0 to 2", dict(labels=[0, 1, 2])),
    ("1 to 1001", dict(labels=[1, 2, 1001])), ("float64", dict(labels=[1., 2.5, 3])),
    ("<U1", dict(labels=[*"abc"])), ("(3, 1)", dict(labels=[[1], [2], [3]])),
    ("(0,)", dict(data=np.zeros((0, 192), np.uint8), labels=np.zeros(0, int)))])
def test_batches_of_another_kind_are_refused(tmp_path, word, arguments):
    write_batch(tmp_path, 1)
    file = write_batch(tmp_path, 2, **arguments)
    refuses(lambda: load_images(tmp_path, 8), file, word, "expected")


def test_broken_and_hostile_batches_are_refused(tmp_path):
    file, marker, array = write_batch(tmp_path, 1), tmp_path / "ran", tmp_path / "array.npy"
    whole = file.read_bytes()
    bit = whole.index(b"data.npy") + 300        # one pixel is off: the archive's checksum tells
    np.save(array, np.zeros((3, 192), np.uint8))
    for content in (b"", whole[:2], whole[:len(whole) // 2], whole[:-20], array.read_bytes(),
                    whole[:bit] + bytes([whole[bit] ^ 1]) + whole[bit + 1:],
                    pickle.dumps(Hostile(marker))):
        file.write_bytes(content)
        refuses(lambda: [*read_batches([file], 8)], file, "cannot be read")
    for key in "data", "labels":
        write_batch(tmp_path, 1, **{key: np.array([Hostile(marker)] * 3)})
        refuses(lambda: [*read_batches([file], 8)], file, "allow_pickle=False")
    assert not marker.exists()


def test_batches_become_one_array_once(tmp_path, cache, monkeypatch):
    """Which is on the disk, found again as long as the files are the same, and made anew if not."""
    data = tmp_path / "data"
    data.mkdir()
    file = [write_batch(data, n) for n in (1, 2)][1]
    reads, real = [], read_batches
    monkeypatch.setattr(fid, "read_batches", lambda *args: reads.append(1) or real(*args))
    first, again = load_images(data, 8), load_images(data, 8)
    rows = np.concatenate([dots(3, 192, seed=n) for n in (1, 2)])
    assert len(reads) == 1 and first.key == again.key == hashlib.sha256(rows).hexdigest()
    for images in first, again:
        near(images.pixels, rows.reshape(6, 3, 8, 8))
        assert images.labels.tolist() == [0, 999, 6] * 2
    array, = (cache / "batches").glob("*.npy")
    assert str(array) in pathlib.Path("/proc/self/maps").read_text() or sys.platform != "linux"
    assert len(np.load(array)) == 6                         # as any other .npy

    about, damages = array.with_suffix(".npz"), 0
    for path, content in [(array, array.read_bytes()[:-1]), (array, b"garbage"), (array, b""),
                          (array, None), (about, b""), (about, None)]:
        path.unlink() if content is None else path.write_bytes(content)
        damages += 1
        near(load_images(data, 8).pixels, rows.reshape(6, 3, 8, 8))
        assert len(reads) == 1 + damages

    for name, age in ("making-old", 2 * 86400), ("making-new", 0):  # a killed one's, another's
        (cache / "batches" / name).mkdir()
        os.utime(cache / "batches" / name, (time.time() - age,) * 2)
    state = file.stat()
    write_batch(data, 2, data=dots(3, 192, seed=5))         # of the same size and time
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    changed = load_images(data, 8)
    near(changed.pixels[3:], dots(3, 192, seed=5).reshape(3, 3, 8, 8))
    assert changed.key != first.key
    left = sorted(p.suffix for p in (cache / "batches").iterdir())
    assert left == ["", ".npy", ".npz"] and not array.exists()      # the old one is gone
    assert (cache / "batches" / "making-new").is_dir()

    net = RandomFeatures()
    stats = fid.reference(net, changed.pixels, key=changed.key)
    np.save(tmp_path / "s.npy", dots(3, 8, 8, 3))
    with monkeypatch.context() as patch:                    # the command finds it, too
        patch.setattr(fid, "statistics", lambda *args: calls.append(args) or statistics(*args))
        calls = []
        fid.main([str(tmp_path / "s.npy"), "--data", str(data), "--features", "random"])
    assert len(calls) == 1                                  # of the samples
    monkeypatch.setattr(fid, "statistics", None)            # known by the key alone
    near(fid.reference(net, 0 * changed.pixels, key=changed.key).mean, stats.mean)
    with pytest.raises(TypeError):
        fid.reference(net, changed.pixels, key="other")


@pytest.mark.parametrize("why", ["no folder", "disk full"])
def test_batches_that_cannot_be_kept_are_held_in_memory(tmp_path, cache, monkeypatch, capsys, why):
    write_batch(tmp_path, 1)
    if why == "no folder":
        (cache / "batches").write_text("a file")
    else:
        def full(*args, **arrays):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(np, "savez", full)
    images = load_images(tmp_path, 8)
    near(images.pixels, dots(3, 192, seed=1).reshape(3, 3, 8, 8))
    said = capsys.readouterr().out
    assert images.key is None and said.count("\n") == 1 and "cannot be written" in said
    assert why == "no folder" or not list((cache / "batches").iterdir())


def test_no_validation_batches(tmp_path):
    file = write_batch(tmp_path, 1)
    refuses(lambda: load_images(tmp_path, 8, "test"), tmp_path / "val_data.npz", "cannot be read")
    file.rename(tmp_path / "val_data.npz")
    write_batch(tmp_path, 1)
    assert load_images(tmp_path, 8, "test").name == f"{tmp_path.name} test"


def test_cifar10(monkeypatch):
    real = torchvision.datasets.CIFAR10
    class Stored:
        data, targets, classes = dots(2, 32, 32, 3), [3, 9], list("abcdefghij")

        def __init__(self, root, train, download):
            assert (root, train, download) == ("data", True, True)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    images = load_images("cifar10", 32)
    near(images.pixels, nchw(Stored.data))
    assert images.labels.tolist() == [3, 9] and images[2:4] == (Stored.classes, "cifar10 train")
    refuses(lambda: load_images("cifar10", 64), "64x64", "32x32")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    refuses(lambda: load_images("cifar10", 32), "no route to host", "cifar-10-python.tar.gz")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", real)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    refuses(lambda: load_images("cifar10", 32), "no route to host")
    assert not os.path.exists("data")                       # where nothing was
