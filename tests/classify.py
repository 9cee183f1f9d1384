"""How many samples of `shapes` are not of the class asked for, by a classifier of real ones: what a
distance of features may miss. By hand:

    python add.py --steps 1,4 --npz
    python tests/classify.py runs/add-shapes/samples-1step.npz runs/add-shapes/samples-4step.npz

Trains for one to three minutes, then prints a line for 4000 new real images and for each file.
"""
import argparse
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import trange

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import fid  # noqa: E402


def classifier(pixels, labels, updates=936, batch=128):
    """Trained on uint8 images [N, 3, 32, 32] and labels [N] -> floats in [-1, 1] to logits [B, 10].

    A little noise on the images, so that it does not learn to tell the samples' grain.
    """
    torch.manual_seed(0)
    stage = lambda i, o: (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(),
                          nn.MaxPool2d(2))
    net = nn.Sequential(*stage(3, 24), *stage(24, 48), *stage(48, 96), nn.Flatten(),
                        nn.Linear(96 * 4 * 4, len(fid.SHAPES)))
    net.to(memory_format=torch.channels_last)
    opt = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, total_steps=updates)
    for _ in trange(updates, desc="classifier", leave=False, disable=fid.quiet()):
        i = torch.randint(len(pixels), (batch,))
        x = fid.from_uint8(pixels[i])
        F.cross_entropy(net(x + 0.05 * torch.randn_like(x)), labels[i]).backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
    return net.eval()


@torch.no_grad()
def wrong(net, pixels, labels):
    """The share of images that it takes for another class than their label's."""
    found = torch.cat([net(fid.from_uint8(part)).argmax(1) for part in pixels.split(500)])
    return (found != labels).double().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition(": what a")[0])
    parser.error = fid.refuse
    parser.add_argument("samples", nargs="+", help=".npz of samples of shapes, made by --npz")
    files = {path: fid.read_arrays(path) for path in parser.parse_args(argv).samples}
    for path, arrays in files.items():
        if not {"images", "labels"} <= set(arrays) or arrays["images"].shape[1:] != (32, 32, 3):
            raise fid.UserError(f"{path}: expected images [N, 32, 32, 3] and labels, as --npz "
                                "writes them of shapes")
    net = classifier(*fid.shapes())
    sets = dict(real=fid.shapes(4000, seed=1))
    for path, arrays in files.items():
        sets[path] = (torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2),
                      torch.from_numpy(arrays["labels"].astype(np.int64)))
    for name, (pixels, labels) in sets.items():
        print(f"{100 * wrong(net, pixels, labels):.1f} % of {len(pixels)} are of another class | "
              f"{name}", flush=True)


if __name__ == "__main__":
    fid.command("classify.py", main, "fewer files")
