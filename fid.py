"""fid.py: both halves of an FID, the reference images and the distance to them.

    FID = |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2)      Heusel et al., 1706.08500

with the mean and covariance of 2048 Inception features of each set of images (`inception`: the
network and the numbers of pytorch-fid), or of a small random network's features where Inception's
weights cannot be had or mean nothing (`random`: printed as FD-random, never as FID).

    python fid.py samples.npz --data cifar10            # .npz, .npy or a folder, against a data set
    python fid.py samples.npz --stats cifar10.npz       # against the mu and sigma of a file
    python fid.py --data cifar10 --save-stats cifar10.npz           # make such a file

The first prints FID, KID, precision and recall, the second FID alone: each a line with its
protocol. Or from Python:

    images = load_images("shapes", 32)                  # or cifar10, a folder, ImageNet-64 batches
    net = RandomFeatures()
    print(distance(statistics(net, images.pixels), statistics(net, samples)))

All images are uint8 NCHW tensors; the networks see them as floats in [-1, 1]. float -> uint8
happens in one place and one way, `to_uint8`.
"""
import argparse
import concurrent.futures
import contextlib
import functools
import hashlib
import io
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import typing

import numpy as np
import scipy.linalg
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.inception import BasicConv2d
from tqdm import tqdm


class UserError(Exception):
    """A mistake that is the user's:
    the scripts print the message as one line and exit with code 2."""


class LostProcess(UserError):
    """Of several processes that train together another one is no longer there."""


def out_of_memory(error):
    """Whether an exception says so: of the CPU's memory PyTorch raises a plain RuntimeError."""
    says = ("out of memory", "not enough memory", "can't allocate memory", "bad_alloc",
            "ALLOC_FAILED")                                 # cuBLAS's and cuDNN's
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError)
                                              and any(s in str(error) for s in says))


def refuse(message):
    """argparse's way to say what is wrong with the options would print its usage, too."""
    raise UserError(message + "; --help lists the options" * ("unrecognized" in message))


def command(name, main, remedy):
    """Run main(). A user's mistake, and too little memory, are one line and exit code 2, not a
    traceback; so is Ctrl-C (130), where nothing else has caught it.

    name: of the script. remedy: what to give where memory is out.
    """
    for stream in sys.stdout, sys.stderr:                   # a file's name may be no Unicode
        stream.reconfigure(errors="replace")
    try:
        main()
        if processes()[1] > 1:
            distributed.destroy_process_group()
        return
    except KeyboardInterrupt:                               # before there is anything to keep
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        if int(os.environ.get("RANK", 0)) and not isinstance(error, LostProcess):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)   # process 0 says it, and all are ended;
            time.sleep(2)                                   # if not, it is this one's own trouble
        wrong = error
    except BrokenPipeError:                                 # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                                       # as by SIGPIPE
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        wrong = f"out of memory; give {remedy}"
    print(f"{name}: {wrong}", file=sys.stderr)
    sys.exit(2)


class Images(typing.NamedTuple):
    """A data set, in memory or mapped from the disk.

    Without class labels, `classes` is empty and every label is 0, the null class.
    """
    pixels: torch.Tensor            # [N, 3, R, R] uint8
    labels: torch.Tensor            # [N] int64
    classes: list                   # names; the null class is len(classes)
    name: str                       # as a score's protocol line calls the set
    key: str = None                 # a hash of the pixels, where they are too many to hash anew


def pick_device(name):
    """cpu, cuda, mps, or auto for the best that is there -> torch.device."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    auto = "mps" if torch.backends.mps.is_available() else auto
    try:
        device = torch.device(auto if name == "auto" else name)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:        # torchrun: one for each
            rank, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if 0 < there <= rank:
                raise ValueError(f"torchrun's process {rank + 1} has no GPU of its own; start "
                                 f"{there}, or give --device cpu")
            device = torch.device("cuda", rank)
        torch.zeros(1, device=device).item()
        return device
    except Exception as error:                              # backends raise all sorts
        raise UserError(f"--device {name}: not available here "
                        f"({str(error).splitlines()[0]})") from None


def to_uint8(x):
    """Floats in [-1, 1] -> uint8, rounding to nearest: -1 -> 0, 0 -> 128, 1 -> 255 (EDM's rule).

    Samples are quantised here, once, before they are saved or scored, and nowhere else: a score
    of floats would differ from that of the pictures.
    """
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def from_uint8(pixels):
    """uint8 -> floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1


# ---- several processes ---------------------------------------------------------------------------

def processes():
    """This process's rank and how many there are, of torchrun's; 0 and 1 without it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _together(collective, *tensors):
    try:
        collective(*tensors)
    except RuntimeError as error:                           # of a closed connection, or too long
        if out_of_memory(error):
            raise
        why = " ".join(str(error).split()).rpartition("] ")[2].partition(". ")[0]
        raise LostProcess(f"another process has ended or hangs ({why[:80]}); the last checkpoint "
                          "is kept, the same command goes on from it") from None


def total(tensor):
    """The sum of all processes' tensors, in the place of each."""
    if processes()[1] > 1:
        _together(distributed.all_reduce, tensor)
    return tensor


def gather(tensor):
    """All processes' tensors of one shape [...] -> [processes, ...], in each; also a meeting point,
    which none leaves before the last has come."""
    parts = [torch.empty_like(tensor) for _ in range(processes()[1])]
    if len(parts) == 1:
        return tensor[None]
    _together(distributed.all_gather, parts, tensor)
    return torch.stack(parts)


@contextlib.contextmanager
def first_alone():
    """Process 0 goes through a block first, the others after it: what it has downloaded or written
    they find there. (On another machine they do not: then they do it too.)"""
    meet = lambda: gather(torch.zeros(1))
    if processes()[0]:
        meet()
    try:
        yield
    finally:                                                # what fails for 0 fails for all
        if not processes()[0]:
            meet()


def quiet():
    """For tqdm's `disable`: process 0 alone shows bars, on a terminal."""
    return True if processes()[0] else None


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
    for a seed on every machine, but for a rounding here and there.
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
    """One file -> [3, R, R] uint8: upright, transparency on white, centre-cropped,
    Lanczos-downsampled; of the size it has where the resolution is None."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):
                raise ValueError("floating-point or 32-bit pixels, of unknown range")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":          # 16-bit grey
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except Exception as error:                                          # decoders raise all sorts
        why = ("not an image" if isinstance(error, UnidentifiedImageError)
               else " ".join(str(error).split()) or type(error).__name__)
        raise UserError(f"{path}: cannot be read ({why}); mend or remove it") from None
    if resolution and min(image.size) < resolution:
        raise UserError(f"{path}: {image.width}x{image.height} is smaller than "
                        f"{resolution}x{resolution}; remove it or give a smaller --resolution")
    if resolution and image.size != (resolution, resolution):
        side = min(image.size)                                              # cut at whole pixels
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_folder(folder, resolution):
    """A folder of images, subfolders of images as classes -> pixels, labels, class names.

    Files that are no images by their name's ending, and hidden files, are passed over;
    an image that is broken or too small is an error, since to leave it out would change
    the data without a word. With a resolution of None they must be of one size, and are kept so.
    """
    folder = pathlib.Path(folder)
    def unreadable(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")
    hidden = lambda p: any(part.startswith(".") or part == "__MACOSX"
                           for part in p.relative_to(folder).parts)
    endings = {e for e, f in Image.registered_extensions().items() if f in FORMATS}
    files = []
    for top, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        top = pathlib.Path(top)
        above = top.parents[:len(top.relative_to(folder).parts)]
        if os.path.realpath(top) in map(os.path.realpath, above):       # links in a circle
            folders.clear()
            continue
        files += [top / name for name in names if pathlib.Path(name).suffix.lower() in endings]
    files = sorted(p for p in files if not hidden(p))
    if not files:
        raise UserError(f"{folder}: no images in it; expected image files "
                        "or subfolders of them, one a class")
    tops = [p.relative_to(folder).parts[0] if p.parent != folder else None for p in files]
    classes = sorted(set(tops) - {None})
    if classes and None in tops:
        raise UserError(f"{folder}: images beside the class folders "
                        f"({files[tops.index(None)].name}); put every image "
                        "into a class folder, or none")
    size = lambda x: f"{x.shape[-1]}x{x.shape[-2]}"
    with (concurrent.futures.ThreadPoolExecutor() as pool,              # decoding frees the GIL
          contextlib.closing(pool.map(lambda p: _read_image(p, resolution), files)) as read):
        # Closed, also by Ctrl-C, it does not decode the rest.
        for i, x in enumerate(tqdm(read, "reading images", total=len(files), unit="img",
                                   leave=False, disable=quiet())):
            if i == 0:                                  # all in one from the start: held once
                pixels = torch.empty(len(files), *x.shape, dtype=torch.uint8)
            if x.shape != pixels.shape[1:]:
                raise UserError(f"{files[i]}: is {size(x)}, {files[0].name} {size(pixels)}; "
                                "expected images of one size")
            pixels[i] = x
    number = {name: i for i, name in enumerate(classes)}
    return pixels, torch.tensor([number.get(t, 0) for t in tops]), classes


def read_batches(files, resolution):
    """Downsampled ImageNet (Chrabaszcz et al. 2017): yields of one file after the other pixels
    [N, 3, R, R] uint8 and labels 0..999 [N] int64.

    In a file are `data` [N, 3*R*R] uint8 and `labels` 1..1000.
    """
    for file in files:
        batch = read_arrays(file)
        if not {"data", "labels"} <= set(batch):
            raise UserError(f"{file}: cannot be read as a downsampled-ImageNet batch; expected "
                            f"data and labels in it, not {', '.join(batch)[:80]}")
        data, label = batch["data"], batch["labels"]
        if label.dtype.kind not in "iu" or label.ndim != 1 or not len(label):
            raise UserError(f"{file}: labels are {label.dtype} {label.shape}; "
                            "expected integers, one an image")
        if data.dtype != np.uint8 or data.shape != (len(label), 3 * resolution ** 2):
            raise UserError(f"{file}: data is {data.dtype} {data.shape}; expected uint8 "
                            f"({len(label)}, {3 * resolution ** 2}) for --resolution {resolution}")
        if label.min() < 1 or label.max() > 1000:
            raise UserError(f"{file}: labels run from {label.min()} to {label.max()}; "
                            "expected 1 to 1000")
        yield data.reshape(-1, 3, resolution, resolution), label.astype(np.int64) - 1


@first_alone()
def map_batches(files, resolution):
    """`read_batches`, of all files, in an array that stays on the disk -> pixels, labels, key.

    It is made once, in ~/.cache/fewstep/batches, and found again by the files' path, sizes and
    times of change. What a process reads of it is the system's to keep in memory or to drop.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: cannot be read (no such file)")
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns, f.stat().st_ctime_ns) for f in files]
    digest = lambda what: hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    folder, place = CACHE / "batches", digest(os.path.realpath(files[0]))
    path = folder / f"{place}-{digest([state, resolution])}.npy"
    about = path.with_suffix(".npz")                        # written first, so always there too
    # Not there, or damaged; EOFError: empty.
    with contextlib.suppress(OSError, ValueError, LookupError, UserError, EOFError):
        pixels, found = np.load(path, mmap_mode="c"), read_arrays(about)
        if pixels.shape == (len(found["labels"]), 3, resolution, resolution):
            return torch.from_numpy(pixels), torch.from_numpy(found["labels"]), str(found["key"])

    labels, key = [], hashlib.sha256()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("making-*"):                 # a day old: of one that was killed
            with contextlib.suppress(OSError):              # another process sweeps, too
                if time.time() - old.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(old)
        with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as scratch:
            with open(f"{scratch}/pixels.npy", "wb") as file:
                file.seek(128)                              # the header comes last: it tells N
                for data, label in tqdm(read_batches(files, resolution), "once: one array of all",
                                        total=len(files), leave=False, disable=quiet()):
                    file.write(data)
                    key.update(data)
                    labels.append(label)
                labels, header = np.concatenate(labels), io.BytesIO()
                np.lib.format.write_array_header_1_0(header, dict(
                    descr="|u1", fortran_order=False, shape=(len(labels), *data.shape[1:])))
                assert len(header.getvalue()) == 128
                file.seek(0)
                file.write(header.getvalue())
            np.savez(f"{scratch}/about.npz", labels=labels, key=key.hexdigest())
            os.replace(f"{scratch}/about.npz", about)
            os.replace(f"{scratch}/pixels.npy", path)
    except OSError as error:
        print(f"{folder}: cannot be written ({error.strerror or error}), so all images are held in "
              "memory; XDG_CACHE_HOME moves it", flush=True)
        parts = [*zip(*read_batches(files, resolution))]
        pixels, labels = (torch.from_numpy(np.concatenate(part)) for part in parts)
        return pixels, labels, None
    for old in folder.glob(f"{place}-*"):                   # of what these files were before
        if old.stem != path.stem:
            old.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path, mmap_mode="c")), torch.from_numpy(labels), key.hexdigest()


def kind_of(data):
    """Which column of the scripts' presets a --data value belongs to:
    shapes, cifar10, folder or imagenet64."""
    if data in ("shapes", "cifar10"):
        return data
    if os.path.isfile(data):                                # pathlib's raises where it may not look
        raise UserError(f"--data {data}: is a file; expected a folder of images "
                        "(unpack an archive first; a file of mu and sigma is for fid.py --stats)")
    if not os.path.isdir(data):
        raise UserError(f"--data {data}: no such data set or folder; expected shapes, cifar10, "
                        "a folder of images, or a folder with train_data_batch_*.npz")
    return "imagenet64" if any(pathlib.Path(data).glob("train_data_batch_*.npz")) else "folder"


def load_images(data, resolution, split="train", cache="data"):
    """The images of a --data value, as `Images` on the CPU.

    data: "shapes", "cifar10" (torchvision's, under the folder `cache`, downloaded at need),
    or a folder: of images, or of downsampled-ImageNet batches. resolution: None for the size that
    they have. split: "train", or "test" where the data set has one. Raises UserError with a line
    for the user.
    """
    kind = kind_of(data)
    if kind != "folder":
        resolution = resolution or (64 if kind == "imagenet64" else 32)
    if kind == "shapes":
        drawn = (shapes(resolution=resolution) if split == "train" else
                 shapes(10_000, resolution, seed=1))
        return Images(*drawn, SHAPES, f"shapes {split}")
    if kind == "cifar10":
        if resolution != 32:
            raise UserError(f"--data cifar10 at {resolution}x{resolution}: cifar10 is 32x32")
        try:
            with first_alone():
                cifar = torchvision.datasets.CIFAR10(cache, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                os.rmdir(cache)                             # torchvision made it, and it is empty
            raise UserError(f"--data cifar10: cannot be downloaded ({error}); "
                            "put https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz into "
                            f"{cache}/, "
                            "or give a folder of images") from None
        pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(cifar.targets), cifar.classes, f"cifar10 {split}")
    if kind == "imagenet64":
        number = lambda p: int("".join(filter(str.isdigit, p.stem)) or 0)
        files = sorted(pathlib.Path(data).glob("train_data_batch_*.npz"), key=number)
        files = files if split == "train" else [pathlib.Path(data) / "val_data.npz"]
        pixels, labels, key = map_batches(files, resolution)
        return Images(pixels, labels, [str(i) for i in range(1000)],
                      f"{pathlib.Path(data).name} {split}", key)
    if split != "train":
        raise UserError(f"--split {split}: a folder has no splits; give the one to compare with")
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
    name, label = "random", "FD-random"
    batch, resizes = 256, False                             # at once on a CPU, of 32x32

    def __init__(self, widths=(32, 64, 128, 256), seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1)
                                   for i, o in zip((3, *widths), widths))
        for conv in self.convs:
            fan_in = conv.weight[0].numel()
            conv.weight.data = torch.randn(conv.weight.shape, generator=rng) * math.sqrt(2 / fan_in)
            conv.bias.data = torch.randn(conv.bias.shape, generator=rng) * 0.2
        self.dim = sum(widths)
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

    torchvision's Inception v3 skeleton with the poolings of the original TensorFlow graph, and
    each batch norm folded into the convolution before it. state: pytorch-fid's state dict as it is.
    """
    name, label, dim = "inception", "FID", 2048
    batch, resizes = 8, True                                # on a CPU, 8 beats 50 by a tenth

    def __init__(self, state=None):
        super().__init__()
        net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False,
                                              transform_input=False, init_weights=False)
        if state is not None:
            net.load_state_dict(state)
        net.fc, net.dropout = nn.Identity(), nn.Identity()
        net.eval().double()                                 # so that folding loses no digit
        for unit in net.modules():
            if isinstance(unit, BasicConv2d):
                unit.conv, unit.bn = fuse_conv_bn_eval(unit.conv, unit.bn), nn.Identity()
        # Averages leave the padding out of the count; the last block takes the maximum.
        average = functools.partial(F.avg_pool2d, count_include_pad=False)
        for name in "5b 5c 5d 6b 6c 6d 6e 7b 7c".split():
            _change_pooling(net.get_submodule(f"Mixed_{name}"),
                            F.max_pool2d if name == "7c" else average)
        self.net = net.float().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, pixels):
        x = F.interpolate(pixels.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


def _change_pooling(block, pool):
    """Give an Inception block the pooling that the graph of 2015 has and torchvision's has not: its
    branch's convolution gets the block's input pooled in this way, not what torchvision made."""
    seen = []
    block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(
        lambda module, inputs: pool(seen.pop(), kernel_size=3, stride=1, padding=1))


@first_alone()
def inception_state(path=None):
    """The weights of the FID network,
    from `path`, torch's hub cache, or one download; sha256 checked."""
    cached = pathlib.Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    file = pathlib.Path(path) if path else cached
    try:
        if not path and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, file, hash_prefix=INCEPTION_SHA256)
    except (OSError, RuntimeError) as error:
        raise UserError(f"Inception's weights cannot be downloaded ({error}); "
                        f"fetch {INCEPTION_URL} by hand and give --inception PATH") from None
    try:
        content = file.read_bytes()
    except OSError as error:
        option = "--inception " * bool(path)
        raise UserError(f"{option}{file}: cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != INCEPTION_SHA256:
        raise UserError(f"{file}: not the FID weights (sha256 {digest[:12]}..., expected "
                        f"{INCEPTION_SHA256[:12]}...)"
                        + "; remove it or give --inception PATH" * (not path))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def load_features(name, device="cpu", inception=None):
    """name: inception, random, or auto (inception if its weights can be had) -> the feature
    network. inception: path of the weights; where it is given, no others will do."""
    if name != "random":
        try:
            return Inception(inception_state(inception)).to(device)
        except UserError as error:
            if name == "inception" or inception:
                raise
            print(f"no FID: {error}. Scoring with random features instead.")
    return RandomFeatures().to(device)


# ---- statistics ----------------------------------------------------------------------------------

KEEP = 10_000                   # features kept of a set, for the scores of more than two moments


class Statistics:
    """Mean and unbiased covariance of a stream of features, in float64; also of parts, by `merge`.

    n: of how many images, 0 where a file does not tell. network, size: whose features, of images
    of what size (H, W); None where unknown. kept: some images' own features [K, dim] float32.
    """

    def __init__(self, dim, network=None, size=None):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)   # sum of (f - mean)(f - mean)^T
        self.network, self.size, self.kept = network, size, torch.empty(0, dim)

    def merge(self, n, mean, scatter):
        """Pairwise update (Chan et al. 1979): no large sums that cancel, so stable for millions."""
        if n == 0:
            return
        delta, both = mean - self.mean, self.n + n
        self.scatter += scatter + torch.outer(delta, delta) * (self.n * n / both)
        self.mean += delta * (n / both)
        self.n = both

    def update(self, features):
        f = features.detach().cpu().double()                            # [B, dim]
        mean = f.mean(0)
        self.merge(len(f), mean, (f - mean).T @ (f - mean))

    def gather(self):
        """-> the `Statistics` of all torch.distributed processes' images, in each of them, with
        nothing kept.

        One all_gather, merged in one order: a sum of raw moments would cancel.
        """
        own = torch.cat([torch.full_like(self.mean, self.n)[None], self.mean[None], self.scatter])
        whole = Statistics(len(self.mean), self.network, self.size)
        for part in gather(own):
            whole.merge(int(part[0, 0]), part[1], part[2:])
        return whole

    @property
    def cov(self):
        return self.scatter / max(1, self.n - 1)


def statistics(net, pixels, progress=None, keep=0, shared=False):
    """`Statistics` of the features of uint8 images [N, 3, H, W], `keep` of them kept.

    progress: title of a progress bar. shared: all processes have the same images, and each
    computes a part of the features.
    float32 without TF32 or autocast, as peers compute them. Memory does not grow with N, nor does
    the result depend on how the images fall into batches.
    """
    if len(pixels) < 2:
        raise UserError(f"{len(pixels)} images to score or compare with; "
                        "a covariance needs at least 2")
    device, side = next(net.parameters()).device, pixels.shape[2:]
    size = net.batch if device.type == "cpu" else 16 * net.batch
    size = size if net.resizes else max(1, size * 1024 // side.numel())
    slot = torch.full((len(pixels),), -1)                   # where an image's features are kept
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:keep]
    slot[chosen] = torch.arange(len(chosen))
    stats, rows = Statistics(net.dim, net.name, tuple(side)), []
    stats.kept = torch.zeros(len(chosen), net.dim)
    rank, world = processes() if shared else (0, 1)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with tqdm(total=len(pixels), desc=progress, unit="img", leave=False,
                  disable=quiet() if progress else True) as bar:
            for i in range(rank * size, len(pixels), world * size):
                with torch.inference_mode(), torch.autocast(device.type, enabled=False):
                    f = net(pixels[i:i + size].to(device)).cpu()
                at = slot[i:i + size]
                stats.kept[at[at >= 0]] = f[at >= 0]
                rows.append(f)
                if len(rows) * size >= 1024 or i + world * size >= len(pixels):
                    stats.update(torch.cat(rows))           # few rows would cost as much as 1024
                    rows.clear()
                bar.update(min(world * size, len(pixels) - i))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    if world > 1:
        kept, stats = total(stats.kept), stats.gather()     # a row is zero in all but one
        stats.kept = kept
    return stats


CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fewstep"


def reference(net, pixels, progress="data features", key=None):
    """`statistics` of a data set with KEEP kept, computed once: they stay in ~/.cache/fewstep.

    A file's name is a hash of all that it depends on: the pixels, the network's weights, and this
    file's own text, so that no change to any of them finds what was computed before it. The
    twenty newest stay. key: stands for the pixels, where it is known.
    """
    content = pixels.split(10_000) if key is None else ()
    text = pathlib.Path(__file__).read_bytes() + repr((pixels.shape, key)).encode()
    digest = hashlib.sha256(text)
    for tensor in (*net.state_dict().values(), *content):
        digest.update(tensor.cpu().contiguous().numpy())
    file = CACHE / f"{net.name}-{digest.hexdigest()[:32]}.npz"
    stats = None
    with contextlib.suppress(UserError):                    # not there, or damaged: made again
        stats = load_statistics(file)
    if gather(torch.tensor([int(stats is not None)])).all():     # on all machines
        return stats
    stats = statistics(net, pixels, progress, KEEP, True)
    if processes()[0]:
        return stats
    with contextlib.suppress(OSError, UserError):           # no home, or a full one: not kept
        CACHE.mkdir(parents=True, exist_ok=True)
        save_statistics(file, stats, kept=stats.kept)
        for old in sorted(CACHE.glob("*.npz"), key=os.path.getmtime)[:-20]:
            old.unlink(missing_ok=True)
    return stats


def save_statistics(path, stats, **more):
    """mu and sigma, as pytorch-fid and EDM write them; beside them n, network, size and more."""
    arrays = dict(mu=stats.mean, sigma=stats.cov, n=stats.n, **more)
    arrays |= {name: value for name in ("network", "size") if (value := getattr(stats, name))}
    try:
        with tempfile.TemporaryDirectory(dir=pathlib.Path(path).parent) as scratch:
            np.savez(f"{scratch}/statistics.npz", **arrays)
            os.replace(f"{scratch}/statistics.npz", path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def load_statistics(path):
    """The statistics in a file, ours, pytorch-fid's or EDM's; UserError where there are none."""
    arrays = read_arrays(path)
    real = lambda name, default: np.asarray(arrays.get(name, default))
    mu, sigma, n = real("mu", 0.0), real("sigma", 0.0), real("n", 0)
    kept, size = real("kept", np.empty((0, *mu.shape), np.float32)), real("size", np.empty(0, int))
    if (mu.ndim != 1 or len(mu) < 2 or sigma.shape != 2 * mu.shape or kept.shape[1:] != mu.shape
            or any(a.dtype.kind != "f" or not np.isfinite(a).all() for a in (mu, sigma, kept))
            or not np.allclose(sigma, sigma.T) or sigma.diagonal().min() < 0
            or n.shape or n.dtype.kind not in "iu" or n < 0 or size.shape not in ((0,), (2,))
            or size.dtype.kind not in "iu"):
        raise UserError(f"{path}: holds no statistics; expected a finite mean mu [D] and "
                        "covariance sigma [D, D]")
    network = str(arrays["network"]) if "network" in arrays else None
    network = network if network in (None, "inception", "random") else "another network"
    stats = Statistics(len(mu), network, tuple(map(int, size)) or None)
    stats.n, stats.mean = int(n), torch.from_numpy(mu.astype(np.float64))
    stats.scatter = torch.from_numpy(sigma.astype(np.float64)) * max(1, stats.n - 1)
    stats.kept = torch.from_numpy(kept.astype(np.float32))
    return stats


def read_arrays(path):
    """The arrays of an .npz or .npy by name, none of which can run code."""
    try:
        with open(path, "rb") as file:                      # NumPy takes any other for a pickle
            if not file.read(6).startswith((b"PK", np.lib.format.MAGIC_PREFIX)):
                raise ValueError("it begins as neither does")
        loaded = np.load(path, allow_pickle=False)
        arrays = {"array": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
        if not all(isinstance(a, np.ndarray) for a in arrays.values()):
            raise ValueError("not all of it is arrays")
        return arrays
    except Exception as error:                              # zipfile and NumPy raise all sorts
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read as .npz or .npy ({why})") from None


# ---- distances -----------------------------------------------------------------------------------

def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians; arrays or tensors, [D] and [D, D], in float64.

    tr (sigma1 sigma2)^1/2 is the sum of the square roots of the eigenvalues of r^T sigma2 r, for
    any r with r r^T = sigma1: real and non-negative. r is the Cholesky factor; where sigma1 is
    singular and has none, the one with pivoting, which there is for covariances of any rank. (One
    that is singular and passes by rounding is as good, to a relative 1e-8.)
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).detach().cpu().double()
                                for a in (mu1, sigma1, mu2, sigma2))
    squares = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()
    root, singular = torch.linalg.cholesky_ex(sigma1)
    if singular:
        root, order, rank, _ = scipy.linalg.lapack.dpstrf(sigma1.numpy().T, lower=1)
        root, order = torch.from_numpy(root).tril()[:, :rank], torch.from_numpy(order).long() - 1
        sigma2 = sigma2[order][:, order]
    product = sigma2.new_zeros(root.shape[1], root.shape[1])
    for i in range(0, len(product), 256):       # its lower half, not r's zeros: a third the work
        part = root[i:, i:]
        product[i:, i:i + 256] = part.T @ (sigma2[i:, i:] @ part[:, :256])
    values = torch.linalg.eigvalsh(product, UPLO="L").clamp(min=0)
    return float(squares - 2 * values.sqrt().sum())


def distance(a, b):
    """Frechet distance of two `Statistics`."""
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def kernel_distance(f, g, blocks=10):
    """KID: unbiased squared MMD of features [N, D] and [M, D], and its standard error.

    Kernel (x.y / D + 1)^3 (Binkowski et al. 2018, 1801.01401). Each of `blocks` disjoint parts
    gives an unbiased estimate of its own: their mean, and its error from their spread.
    """
    def estimate(x, y):
        (n, dim), m = x.shape, len(y)
        xx, yy, xy = ((a @ b.T / dim + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        return ((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
                - 2 * xy.mean())
    parts = [t.double().tensor_split(blocks) for t in (f, g)]
    values = torch.stack([estimate(x, y) for x, y in zip(*parts)])
    return float(values.mean()), float(values.std() / math.sqrt(blocks))


def precision_recall(f, g, k=3):
    """Of samples' features f [N, D] and real ones g [M, D] (Kynkaanniemi et al. 2019, 1904.06991).

    Precision: the share of samples that lie within some real image's distance to its k-th nearest
    real neighbour. Recall: the same with the roles exchanged.
    """
    def covered(x, y):
        rows = lambda a: (torch.cdist(part, y) for part in a.split(1000))   # [1000, len(y)] each
        radius = torch.cat([d.kthvalue(k + 1, dim=1).values for d in rows(y)])      # 1st: itself
        return float(torch.cat([(d <= radius).any(1) for d in rows(x)]).double().mean())
    centre = g.double().mean(0)                             # cdist rounds by the vectors' lengths
    f, g = f - centre, g - centre
    return covered(f, g), covered(g, f)


def protocol(label, value, features, n, m, data, nfe, who, speed):
    """A score as one line, with all that it depends on but the images' side, in one order.

    n, m: how many samples and real images, 0 where that is not known. who: whose samples. speed:
    images a second, of sampling, or of the features where the samples are given.
    """
    line = (f"{label} {value} | {features} | {n or '?'} samples vs {m or '?'} {data} | NFE {nfe} | "
            f"{who} | {speed} img/s")
    few = [what for what, k in (("samples", n), ("real images", m)) if 0 < k < 2048]
    if label.startswith("F") and few:
        line += f" | fewer than 2048 {' and '.join(few)}: biased upward"
    return line


# ---- the command ---------------------------------------------------------------------------------

def read_samples(path):
    """A file or a folder of samples -> uint8 [N, 3, H, W], or `Statistics` if it holds such."""
    if os.path.isdir(path):
        return read_folder(path, None)[0]
    arrays = read_arrays(path)
    if {"mu", "sigma"} <= set(arrays):
        return load_statistics(path)
    pictures = [a for a in arrays.values() if a.ndim == 4]
    if len(pictures) != 1:
        raise UserError(f"{path}: holds {len(pictures)} arrays of images; expected one, uint8 "
                        "[N, H, W, 3] or [N, 3, H, W], or mu and sigma")
    images, = pictures
    if images.dtype != np.uint8 or 3 not in images.shape[1::2] or min(images.shape[1:]) < 1:
        raise UserError(f"{path}: images are {images.dtype} {list(images.shape)}; expected uint8 "
                        "[N, H, W, 3] or [N, 3, H, W]")
    images = torch.from_numpy(images)
    return images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="fid.py", description="The distance of samples to a data set: FID and, from the same "
        "features, KID, precision and recall.", allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    add("samples", nargs="?", help=".npz or .npy of uint8 images, a folder of images, or "
        "statistics: .npz with mu and sigma")
    add("--data", help="what to compare with: shapes, cifar10, a folder of images, or one of "
        "downsampled-ImageNet batches")
    add("--split", choices=["train", "test"], help="of --data [train]")
    add("--resolution", type=int, help="side of --data's images [that of the samples or, without "
        "samples, their own]")
    add("--stats", help="compare with the mu and sigma in this .npz: FID alone. Numbers are "
        "comparable to pytorch-fid's; EDM's and ADM's files have this layout, but features of "
        "images resized another way")
    add("--save-stats", help="write mu and sigma: of SAMPLES, or of --data where there are none")
    add("--features", choices=["auto", "inception", "random"], default="auto",
        help="auto: those of --stats, random for shapes, else inception if its weights can be had")
    add("--inception", help="path of the Inception weights")
    add("--device", default="auto", help="cpu, cuda, mps [auto]")
    args = parser.parse_args(argv)
    same = lambda a, b: a and b and os.path.realpath(a) == os.path.realpath(b)
    parent = pathlib.Path(args.save_stats or ".").absolute().parent
    for wrong, why in [
            (args.data and args.stats, "--data, --stats: give one of them to compare with"),
            (not args.samples and not (args.data and args.save_stats),
             "what to score is missing: give SAMPLES, or --data with --save-stats"),
            (not (args.data or args.stats or args.save_stats),
             "what to compare with is missing: give --data or --stats"),
            (not args.data and (args.split or args.resolution),
             "--split, --resolution: are of --data, which is not given"),
            (args.resolution is not None and args.resolution < 8,
             f"--resolution {args.resolution}: expected 8 or more"),
            (args.inception and args.features == "random",
             "--inception: is of no use with --features random"),
            (same(args.save_stats, args.samples) or same(args.save_stats, args.stats),
             f"--save-stats {args.save_stats}: would replace what is to be read"),
            (args.save_stats and os.path.isdir(args.save_stats),
             f"--save-stats {args.save_stats}: is a folder; expected a file"),
            (args.save_stats and not os.access(parent, os.W_OK),
             f"--save-stats {args.save_stats}: cannot be written into {parent}")]:
        if wrong:
            raise UserError(why)
    return args


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    samples = read_samples(args.samples) if args.samples else None
    real = load_statistics(args.stats) if args.stats else None
    drawn = isinstance(samples, torch.Tensor)
    size = tuple(samples.shape[2:]) if drawn else samples and samples.size
    side = args.resolution or (size and size[1])
    images = load_images(args.data, side, args.split or "train") if args.data else None
    for path, found in (args.samples, samples), (args.data, images and images.pixels):
        if isinstance(found, torch.Tensor) and len(found) < 2:
            raise UserError(f"{path}: holds {len(found)} images; expected at least 2")
    other = tuple(images.pixels.shape[2:]) if images else real and real.size
    if size and other and size != other:
        raise UserError(f"{args.samples}: images are {size[1]}x{size[0]}, what to compare with "
                        f"{other[1]}x{other[0]}; expected the same")

    given = [stats for stats in (samples, real) if isinstance(stats, Statistics)]
    known = [stats.network for stats in given if stats.network]
    name = "inception" if args.inception else args.features
    if name == "auto" and (known or args.data == "shapes"):     # shapes: as the scripts score them
        name = known[0] if known else "random"
    net = None
    if drawn or images:
        if name == "auto" and any(len(stats.mean) == 2048 for stats in given):
            name = "inception"                              # pytorch-fid's and EDM's do not say so
        net = load_features(name, device, args.inception)
        name = net.name
    for stats in given:
        dim = net.dim if net else len(given[0].mean)
        if len(stats.mean) != dim or stats.network not in (None, name):
            raise UserError(f"{args.stats if stats is real else args.samples}: is of "
                            f"{len(stats.mean)} features of {stats.network or 'an unknown network'}"
                            f"; expected {dim}" + f" of {name}" * (name != "auto"))

    speed = "-"
    if drawn:
        start = time.perf_counter()
        samples = statistics(net, samples, "features", KEEP)
        speed = f"{samples.n / (time.perf_counter() - start):.0f}"
    if images:
        real = reference(net, images.pixels, key=images.key)
    if samples and real:
        score(samples, real, args.samples, images.name if images else args.stats, speed)
    if args.save_stats:
        save_statistics(args.save_stats, samples or real)
        print(f"statistics: {args.save_stats}")


def score(samples, real, who, data, speed):
    """Print what two `Statistics` tell, a protocol line each."""
    networks = {samples.network, real.network}
    network = next(filter(None, networks), "inception" if len(real.mean) == 2048 else "unknown")
    features = network + "?" * (None in networks)           # a file does not say whose they are
    suffix = "" if network == "inception" else f"-{network}"
    def show(label, value, n, m):
        print(protocol(label + suffix, value, features, n, m, data, "?", who, speed), flush=True)
    show("FD" if suffix else "FID", f"{distance(samples, real):.4g}", samples.n, real.n)
    n, m = len(samples.kept), len(real.kept)
    if min(n, m) < 20:                                      # two images for each of KID's ten parts
        if n and m:
            print("no KID, precision and recall: they need 20 images or more on each side")
        return
    mean, error = kernel_distance(samples.kept, real.kept)
    precision, recall = precision_recall(samples.kept, real.kept)
    show("KD" if suffix else "KID", f"{mean:.3g} +- {error:.2g}", n, m)
    show("precision", f"{precision:.4f}", n, m)
    show("recall", f"{recall:.4f}", n, m)


if __name__ == "__main__":
    command("fid.py", main, "--device cpu, or fewer images")
