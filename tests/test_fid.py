"""fid.py proved: pytorch-fid's recorded features and distances, closed forms, SciPy, sums by hand.

Shapes are held against geometry (areas, centroids), files against pixels the tests wrote. What a
user or a stranger gets wrong in a file is one line of UserError and runs no code. All is offline.
"""
import hashlib
import math
import os
import pathlib
import pickle
import socket
import urllib.error
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
    assert fid.distance(b, b) == approx(0, abs=1e-5)


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
    net, (pixels, _), seen = RandomFeatures(), fid.shapes(50, 16), []
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
        last = "Mixed_7c.branch_pool.conv.weight"
        near(net.net.state_dict()[last], golden_state[last])


def test_without_network_scores_fall_back_to_random_features(capsys):
    refuses(inception_state, "no route to host", fid.INCEPTION_FILE, "--inception PATH")
    refuses(lambda: load_features("inception"), "no route to host")
    assert load_features("random").label == "FD-random" and capsys.readouterr().out == ""
    assert load_features("auto").label == "FD-random"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("no FID: Inception's weights")


def test_wrong_or_hostile_weights_are_refused(monkeypatch, tmp_path):
    file, marker = tmp_path / "w.pth", tmp_path / "ran"
    cached = tmp_path / "hub" / "checkpoints" / fid.INCEPTION_FILE
    for content in b"not weights", pickle.dumps(Hostile(marker)):
        file.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        for name in "auto", "inception":        # a file that was named is never passed over
            refuses(lambda: load_features(name, inception=file), file, "not the FID", digest[:12])
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"cut short")
    refuses(inception_state, cached, "not the FID weights", "remove it")
    refuses(lambda: inception_state(tmp_path / "none.pth"), "none.pth", "No such file")
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
    for scores in [same, *blurred], [same, *noisy], fewer:
        assert np.diff(scores).min() > 1e-3, scores
    assert same == approx(0, abs=1e-5)
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
    assert images[2:] == (fid.SHAPES, "shapes train") and images.labels.dtype == torch.int64
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
    save(tmp_path / "small" / "s.png", dots(9, 7, 3))
    refuses(lambda: read_folder(tmp_path / "small", 8), "s.png", "7x9", "8x8", "--resolution")


def test_paths_that_are_no_data(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(lambda: load_images(tmp_path / "empty", 8), "empty", "no images")
    save(tmp_path / "mixed" / "class" / "a.png", dots(8, 8, 3))
    save(tmp_path / "mixed" / "stray.png", dots(8, 8, 3))
    refuses(lambda: load_images(tmp_path / "mixed", 8), "mixed", "stray.png")
    refuses(lambda: load_images("no/such/folder", 8), "no/such/folder", "shapes, cifar10")
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
    assert images[2:] == ([str(i) for i in range(1000)], f"{tmp_path.name} train")
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
        refuses(lambda: read_batches([file], 8), file, "cannot be read")
    for key in "data", "labels":
        write_batch(tmp_path, 1, **{key: np.array([Hostile(marker)] * 3)})
        refuses(lambda: read_batches([file], 8), file, "allow_pickle=False")
    assert not marker.exists()


def test_cifar10(monkeypatch):
    class Stored:
        data, targets, classes = dots(2, 32, 32, 3), [3, 9], list("abcdefghij")

        def __init__(self, root, train, download):
            assert (root, train, download) == ("data", True, True)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Stored)
    images = load_images("cifar10", 32)
    near(images.pixels, nchw(Stored.data))
    assert images.labels.tolist() == [3, 9] and images[2:] == (Stored.classes, "cifar10 train")
    refuses(lambda: load_images("cifar10", 64), "64", "32x32")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    refuses(lambda: load_images("cifar10", 32), "no route to host", "cifar-10-python.tar.gz")
