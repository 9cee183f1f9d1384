"""fid.py: both halves of an FID, the reference images and the distance to them.

    FID = |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2)      Heusel et al., 1706.08500

with the mean and covariance of 2048 Inception features of each set of images (`inception`: the
network and the numbers of pytorch-fid), or of a small random network's features where Inception's
weights cannot be had or mean nothing (`random`: printed as FD-random, never as FID).

    images = load_images("shapes", 32)                  # or cifar10, a folder, ImageNet-64 batches
    net = RandomFeatures()
    print(distance(statistics(net, images.pixels), statistics(net, samples)))

All images are uint8 NCHW tensors; the networks see them as floats in [-1, 1]. float -> uint8
happens in one place and one way, `to_uint8`.
"""
import concurrent.futures
import hashlib
import math
import os
import pathlib
import typing

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm


class UserError(Exception):
    """A mistake that is the user's:
    the scripts print the message as one line and exit with code 2."""


class Images(typing.NamedTuple):
    """A data set in memory.

    Without class labels, `classes` is empty and every label is 0, the null class.
    """
    pixels: torch.Tensor            # [N, 3, R, R] uint8
    labels: torch.Tensor            # [N] int64
    classes: list                   # names; the null class is len(classes)
    name: str                       # as a score's protocol line calls the set


def to_uint8(x):
    """Floats in [-1, 1] -> uint8, rounding to nearest:
    -1 -> 0, 0 -> 128, 1 -> 255 (the rule of EDM)."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(pixels):
    """uint8 -> floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# ---- data: shapes --------------------------------------------------------------------------------

SHAPES = ["circle", "square", "triangle", "diamond", "star",
          "heart", "cross", "ring", "moon", "arrow"]
INKS = "ff4d4d ff9f1c ffe14d 5ddb5d 2ee6d6 4da3ff b67cff ff7ad9"  # saturated, so that mixtures show
GROUNDS = "10152e 2b1030 0c2a2a 2a1d12"                           # dark blue, plum, green, brown


def _polygon(p, corners):
    """Signed distance of points p [..., 2] to a polygon with these corners, negative inside."""
    corners = torch.tensor(corners)
    inside = torch.zeros(p.shape[:-1], dtype=torch.bool)
    nearest = torch.full(p.shape[:-1], math.inf)
    for a, b in zip(corners, corners.roll(-1, 0)):
        edge, q = b - a, p - a
        along = ((q @ edge) / (edge @ edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (q - along[..., None] * edge).square().sum(-1))
        # Even-odd rule: a ray to the right of the point crosses this edge.
        spans = (p[..., 1] >= a[1]) != (p[..., 1] >= b[1])
        inside ^= spans & ((q[..., 0] * edge[1] < q[..., 1] * edge[0]) == bool(edge[1] > 0))
    return torch.where(inside, -1, 1) * nearest.sqrt()


def _regular(n, *radii, turn=0.0):
    """Corners of a regular polygon, the first one up; two radii in turn make a star."""
    n *= len(radii)
    angles = [2 * math.pi * i / n + turn for i in range(n)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a))
            for i, a in enumerate(angles)]


def _heart(p):
    """Two circular lobes on a square that stands on its corner."""
    x, y = p[..., 0].abs() / 1.55, (0.95 - p[..., 1]) / 1.55
    half = 0.5 * (x + y).clamp(min=0)
    tip = torch.minimum(x.hypot(y - 1), (x - half).hypot(y - half)) * (x - y).sign()
    return 1.55 * torch.where(x + y > 1, (x - 0.25).hypot(y - 0.75) - math.sqrt(2) / 4, tip)


def _signed_distance(shape, p):
    """Distance of points p [..., 2] (y down) to the outline of a shape
    of about unit radius, negative inside."""
    r, a = p.norm(dim=-1), 0.33
    match shape:
        case "circle": return r - 0.88
        case "ring": return (r - 0.7).abs() - 0.24
        case "moon": return torch.maximum(r - 0.98,
                                          0.8 - (p - torch.tensor([0.46, -0.22])).norm(dim=-1))
        case "heart": return _heart(p)
        case "square": return _polygon(p, _regular(4, 1.1, turn=math.pi / 4))
        case "triangle": return _polygon(p, _regular(3, 1.12))
        case "diamond": return _polygon(p, [(0, -1.15), (0.72, 0), (0, 1.15), (-0.72, 0)])
        case "star": return _polygon(p, _regular(5, 1.15, 0.5))
        case "cross": return _polygon(p, [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                                          (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)])
        case "arrow": return _polygon(p, [(0, -1.08), (0.95, -0.05), (0.36, -0.05), (0.36, 1),
                                          (-0.36, 1), (-0.36, -0.05), (-0.95, -0.05)])


def shapes(n=20_000, resolution=32, seed=0):
    """The built-in data: one anti-aliased shape of one of eight colours
    on one of four dark grounds.

    Size, place and tilt (8 degrees at most) vary; the class is the shape. Two seconds
    for 20,000 images. Returns pixels [n, 3, R, R] uint8 and labels [n] int64, the same
    for a seed on every machine.
    """
    rng = torch.Generator().manual_seed(seed)
    palette = lambda text: torch.tensor([list(bytes.fromhex(c)) for c in text.split()]).float()
    labels = torch.randint(len(SHAPES), (n,), generator=rng)
    ink = palette(INKS)[torch.randint(8, (n,), generator=rng)]              # [n, 3]
    ground = palette(GROUNDS)[torch.randint(4, (n,), generator=rng)]
    size, dx, dy, tilt = torch.rand(4, n, generator=rng)
    radius = 0.28 + 0.10 * size                                             # 1 = the image's side
    room = (0.5 - 1.15 * radius).clamp(max=0.09)                            # never cut by the edge
    centre = 0.5 + room[:, None] * (2 * torch.stack([dx, dy], 1) - 1)
    angle = math.radians(8) * (2 * tilt - 1)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)

    ticks = (torch.arange(resolution) + 0.5) / resolution
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1)     # [R, R, 2] as x, y
    pixels = torch.empty(n, 3, resolution, resolution, dtype=torch.uint8)
    for label, shape in enumerate(SHAPES):
        for i in (labels == label).nonzero()[:, 0].split(500):
            p = (grid - centre[i, None, None]) / radius[i, None, None, None]
            p = p @ turn[i, None]
            # Coverage of a pixel: its centre's distance to the outline, in pixels.
            edge = _signed_distance(shape, p) * radius[i, None, None] * resolution
            cover = (0.5 - edge).clamp(0, 1)[:, None]                       # [b, 1, R, R]
            back = ground[i, :, None, None] * (0.75 + 0.9 * grid[..., 1])   # lighter below
            pixels[i] = torch.lerp(back, ink[i, :, None, None], cover).round().to(torch.uint8)
    return pixels, labels


# ---- data: files ---------------------------------------------------------------------------------

# What is read: pixels only. Pillow would also hand EPS, whatever its name ends in,
# to Ghostscript: a program.
Image.init()
FORMATS = [f for f in "PNG JPEG WEBP GIF BMP TIFF PPM JPEG2000 AVIF QOI TGA".split()
           if f in Image.OPEN]


def _read_image(path, resolution):
    """One file -> [3, R, R] uint8:
    upright, transparency on white, centre-cropped, Lanczos-downsampled."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":          # 16-bit grey
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("floating-point pixels, of unknown range")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:                                          # decoders raise all sorts
        why = ("not an image" if isinstance(error, UnidentifiedImageError)
               else " ".join(str(error).split()))
        raise UserError(f"{path}: cannot be read ({why}); mend or remove it") from None
    if min(image.size) < resolution:
        raise UserError(f"{path}: {image.width}x{image.height} is smaller than "
                        f"{resolution}x{resolution}; remove it or give a smaller --resolution")
    if image.size != (resolution, resolution):
        side = min(image.size)                                              # cut at whole pixels
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_folder(folder, resolution):
    """A folder of images, subfolders of images as classes -> pixels, labels, class names.

    Files that are no images by their name's ending, and hidden files, are passed over;
    an image that is broken or too small is an error, since to leave it out would change
    the data without a word.
    """
    folder = pathlib.Path(folder)
    def unreadable(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")
    hidden = lambda p: any(part.startswith((".", "__")) for part in p.relative_to(folder).parts)
    endings = {e for e, f in Image.registered_extensions().items() if f in FORMATS}
    files = sorted(pathlib.Path(top, name)
                   for top, _, names in os.walk(folder, onerror=unreadable, followlinks=True)
                   for name in names if pathlib.Path(name).suffix.lower() in endings)
    files = [p for p in files if not hidden(p)]
    if not files:
        raise UserError(f"{folder}: no images in it; expected image files "
                        "or subfolders of them, one a class")
    tops = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in files]
    classes = sorted(set(tops) - {None})
    if classes and None in tops:
        raise UserError(f"{folder}: images beside the class folders "
                        f"({files[tops.index(None)].name}); put every image "
                        "into a class folder, or none")
    with concurrent.futures.ThreadPoolExecutor() as pool:               # decoding frees the GIL
        read = tqdm(pool.map(lambda p: _read_image(p, resolution), files), "reading images",
                    total=len(files), unit="img", leave=False, disable=None)
        try:
            pixels = torch.stack(list(read))
        except BaseException:                           # also Ctrl-C: do not decode the rest
            pool.shutdown(cancel_futures=True)
            raise
    return pixels, torch.tensor([classes.index(t) if classes else 0 for t in tops]), classes


def read_batches(files, resolution):
    """Downsampled ImageNet (Chrabaszcz et al. 2017):
    `data` [N, 3*R*R] uint8, `labels` 1..1000 per file."""
    pixels, labels = [], []
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as batch:
                data, label = batch["data"], batch["labels"]
        except Exception as error:                              # zipfile and NumPy raise all sorts
            raise UserError(f"{file}: cannot be read as a downsampled-ImageNet batch "
                            f"({' '.join(str(error).split())})") from None
        if label.dtype.kind not in "iu" or label.ndim != 1 or not len(label):
            raise UserError(f"{file}: labels are {label.dtype} {label.shape}; "
                            "expected integers, one an image")
        if data.dtype != np.uint8 or data.shape != (len(label), 3 * resolution ** 2):
            raise UserError(f"{file}: data is {data.dtype} {data.shape}; expected uint8 "
                            f"({len(label)}, {3 * resolution ** 2}) for --resolution {resolution}")
        if label.min() < 1 or label.max() > 1000:
            raise UserError(f"{file}: labels run from {label.min()} to {label.max()}; "
                            "expected 1 to 1000")
        pixels.append(torch.from_numpy(data).view(-1, 3, resolution, resolution))
        labels.append(torch.from_numpy(label.astype(np.int64)) - 1)
    return torch.cat(pixels), torch.cat(labels), [str(i) for i in range(1000)]


def kind_of(data):
    """Which column of the scripts' presets a --data value belongs to:
    shapes, cifar10, folder or imagenet64."""
    if data in ("shapes", "cifar10"):
        return data
    path = pathlib.Path(data)
    if path.is_file():
        raise UserError(f"--data {data}: is a file; expected a folder of images "
                        "(unpack an archive first)")
    if not path.is_dir():
        raise UserError(f"--data {data}: no such data set or folder; expected shapes, cifar10, "
                        "a folder of images, or a folder with train_data_batch_*.npz")
    return "imagenet64" if any(path.glob("train_data_batch_*.npz")) else "folder"


def load_images(data, resolution, cache="data"):
    """The images of a --data value, as `Images` on the CPU.

    data: "shapes", "cifar10" (torchvision's, under the folder `cache`, downloaded at need),
    or a folder: of images, or of downsampled-ImageNet batches. Raises UserError with a line
    for the user.
    """
    kind = kind_of(data)
    if kind == "shapes":
        return Images(*shapes(resolution=resolution), SHAPES, "shapes train")
    if kind == "cifar10":
        if resolution != 32:
            raise UserError(f"--resolution {resolution}: cifar10 is 32x32")
        try:
            cifar = torchvision.datasets.CIFAR10(cache, train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(f"--data cifar10: cannot be downloaded ({error}); "
                            f"put cifar-10-python.tar.gz into {cache}/, "
                            "or give a folder of images") from None
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(cifar.targets), cifar.classes, "cifar10 train")
    if kind == "imagenet64":
        number = lambda p: int("".join(filter(str.isdigit, p.stem)) or 0)
        files = sorted(pathlib.Path(data).glob("train_data_batch_*.npz"), key=number)
        return Images(*read_batches(files, resolution), f"{pathlib.Path(data).name} train")
    return Images(*read_folder(data, resolution), str(data).rstrip("/"))


# ---- features ------------------------------------------------------------------------------------

class RandomFeatures(nn.Module):
    """A fixed random convolutional network: uint8 [B, 3, H, W] -> [B, 480],
    the same on every device.

    Random embeddings rank generators about as well as trained ones outside of ImageNet's domain
    (Naeem et al. 2020, 2002.09797). Four stages of 3x3 convolution, leaky ReLU and pooling; the
    features are every stage's mean over positions, so they see texture and sharpness as well as
    layout.
    """
    name, label, batch = "random", "FD-random", 256

    def __init__(self, widths=(32, 64, 128, 256), seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1)
                                   for i, o in zip((3, *widths), widths))
        for conv in self.convs:
            fan_in = conv.weight[0].numel()
            conv.weight.data = torch.randn(conv.weight.shape, generator=rng) * math.sqrt(2 / fan_in)
            conv.bias.data = torch.randn(conv.bias.shape, generator=rng) * 0.2
        self.eval().requires_grad_(False)

    def forward(self, pixels):
        x, features = from_uint8(pixels), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            features.append(x.mean((2, 3)))
            # So that 1x1 is left as it is: images below 16x16.
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(features, 1)


INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/"
                 f"fid_weights/{INCEPTION_FILE}")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


class Inception(nn.Module):
    """The FID network of 2015-12-05: uint8 [B, 3, H, W] of any size -> [B, 2048] pool3 features.

    torchvision's Inception v3 skeleton with the poolings of the original TensorFlow graph; it loads
    pytorch-fid's state dict as it is.
    """
    name, label, batch = "inception", "FID", 16            # on a CPU, 16 beats 50

    def __init__(self, state=None):
        super().__init__()
        self.net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                                   transform_input=False, init_weights=False)
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d",
                     "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
                     "Mixed_7b", "Mixed_7c"):
            _patch_pooling(self.net.get_submodule(name), largest=name == "Mixed_7c")
        if state is not None:
            self.net.load_state_dict(state)
        self.net.fc, self.net.dropout = nn.Identity(), nn.Identity()
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, pixels):
        x = F.interpolate(pixels.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


def _patch_pooling(block, largest):
    """Give an Inception block the pooling branch that the 2015 graph has and torchvision's lacks.

    Averages leave the padding out of the count; the last block takes the maximum
    (a quirk of the graph).
    """
    def pool(x, kernel_size, stride, padding):
        if largest:
            return F.max_pool2d(x, kernel_size, stride, padding)
        return F.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    class Functional:                   # what the block's forward sees as its module's `F`
        avg_pool2d, max_pool2d = staticmethod(pool), staticmethod(F.max_pool2d)
    forward = type(block)._forward
    block._forward = type(forward)(forward.__code__, {**forward.__globals__, "F": Functional},
                                   closure=forward.__closure__).__get__(block)


def inception_state(path=None):
    """The weights of the FID network,
    from `path`, torch's hub cache, or one download; sha256 checked."""
    cached = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    file = pathlib.Path(path) if path else cached
    if not path and not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, file, hash_prefix=INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"Inception's weights cannot be downloaded ({error}); "
                            f"fetch {INCEPTION_FILE} by hand and give --inception PATH") from None
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"--inception {file}: cannot be read ({error.strerror})") from None
    if digest != INCEPTION_SHA256:
        raise UserError(f"{file}: not the FID weights (sha256 {digest[:12]}..., expected "
                        f"{INCEPTION_SHA256[:12]}...); remove it or give --inception PATH")
    return torch.load(file, map_location="cpu", weights_only=True)


def load_features(name, device="cpu", inception=None):
    """name: inception, random, or auto (inception if its weights can be had)
    -> the feature network."""
    if name == "random":
        return RandomFeatures().to(device)
    try:
        return Inception(inception_state(inception)).to(device)
    except UserError as error:
        if name == "inception" or inception:
            raise
        print(f"no FID: {error}. Scoring with random features instead.")
        return RandomFeatures().to(device)


# ---- the distance --------------------------------------------------------------------------------

class Statistics:
    """Mean and unbiased covariance of a stream of features, in float64;
    also of parts, by `merge`."""

    def __init__(self, dim):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)   # sum of (f - mean)(f - mean)^T

    def merge(self, n, mean, scatter):
        """Pairwise update (Chan et al. 1979): no large sums that cancel, so stable for millions."""
        delta, total = mean - self.mean, self.n + n
        self.scatter += scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean += delta * (n / total)
        self.n = total

    def update(self, features):
        f = features.detach().cpu().double()                            # [B, dim]
        mean = f.mean(0)
        self.merge(len(f), mean, (f - mean).T @ (f - mean))

    @property
    def cov(self):
        return self.scatter / (self.n - 1)


@torch.no_grad()                # not inference_mode: what it makes cannot be merged into afterwards
def statistics(net, pixels, progress=None):
    """Statistics of the features of uint8 images [N, 3, H, W];
    float32 without TF32, as peers compute them."""
    if len(pixels) < 2:
        raise UserError(f"{len(pixels)} images to score or compare with; "
                        "a covariance needs at least 2")
    device, stats = next(net.parameters()).device, None
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bar = tqdm(total=len(pixels), desc=progress, unit="img", leave=False,
               disable=None if progress else True)
    for part in pixels.split(net.batch):
        f = net(part.to(device))
        stats = stats or Statistics(f.shape[1])
        stats.update(f)
        bar.update(len(part))
    bar.close()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    return stats


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians;
    arrays or tensors, [D] and [D, D], computed in float64.

    tr (sigma1 sigma2)^1/2 is the sum of the square roots of the eigenvalues of s sigma2 s,
    with s the symmetric root of sigma1: real and non-negative, also where a covariance
    lacks full rank.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a, dtype=torch.float64)
                                for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)


def distance(a, b):
    """Frechet distance of two `Statistics`."""
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)
