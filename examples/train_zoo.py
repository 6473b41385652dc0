"""Train the zoo's networks on Fashion-MNIST and pack the images that ship with the package.

    python examples/train_zoo.py resnet20        # -> snows/zoo/resnet20.safetensors, resnet20.log.json
    python examples/train_zoo.py vit             # after resnet20, from which it is distilled
    python examples/train_zoo.py vit --again --epochs 5 --seed 1
    python examples/train_zoo.py images          # -> snows/zoo/fashion_mnist.npz

Reads the four IDX files (`train-images-idx3-ubyte.gz`, ...) of Debian's package `dataset-fashion-mnist`, or of `--data`.
A seeded permutation of the 60,000 training images keeps 5,000 out of training *and* calibration (`validation`: for
choosing settings); the first 3,000 of the other 55,000 are the calibration images. The test images are used once,
after the last epoch. One thread, so that a run gives the same weights on the same kind of processor.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from snows import zoo
from snows.zoo import models

ZOO = Path(models.__file__).parent
DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.2860, 0.3530


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def splits(folder: Path = DATA) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`train` (55,000), `validation` (5,000), `calibration` (3,000, a part of `train`) and `test` (10,000)."""
    images, labels = (
        read_idx(folder / "train-images-idx3-ubyte.gz"),
        read_idx(folder / "train-labels-idx1-ubyte.gz"),
    )
    order = np.random.default_rng(0).permutation(len(images))
    held, kept = order[:5000], order[5000:]
    test = read_idx(folder / "t10k-images-idx3-ubyte.gz"), read_idx(folder / "t10k-labels-idx1-ubyte.gz")
    parts = {"train": kept, "validation": held, "calibration": kept[:3000]}
    return {name: (images[i], labels[i]) for name, i in parts.items()} | {"test": test}


def tensors(split: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor]:
    images, labels = split
    x = torch.from_numpy(images.astype(np.float32)).div_(255).sub_(MEAN).div_(STD)
    return x.unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def shift(x: Tensor) -> Tensor:
    """Move each image by up to two pixels."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (2, 2, 2, 2), value=-MEAN / STD)
    rows = torch.randint(0, 5, (batch, 1)) + torch.arange(height)
    columns = torch.randint(0, 5, (batch, 1)) + torch.arange(width)
    return padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    hits = sum((net(a).argmax(1) == b).sum().item() for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * hits / len(y)


@torch.no_grad()
def teach(x: Tensor) -> Tensor:
    """The zoo's ResNet-20 on every image as it is and flipped: (n, 2, 10) logits."""
    teacher = zoo.load("resnet20").to(memory_format=torch.channels_last)
    return torch.stack([torch.cat([teacher(part) for part in y.split(500)]) for y in (x, x.flip(3))], dim=1)


def train(name: str, folder: Path, epochs: int, seed: int, again: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data = {k: tensors(v) for k, v in splits(folder).items()}
    x, y = data["train"]
    batch = 128
    if name == "resnet20":
        net: nn.Module = models.ResNet20().to(memory_format=torch.channels_last)
        peak = 0.1
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            net.parameters(), peak, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
    else:
        net, peak = (zoo.load("vit"), 1e-3) if again else (models.ViT(), 2e-3)
        optimizer = torch.optim.AdamW(net.parameters(), peak, weight_decay=0.05)
        taught = teach(x)
    earlier = json.loads((ZOO / f"{name}.log.json").read_text())["log"] if again else []
    steps, step = epochs * (len(x) // batch), 0
    warmup = steps // 10
    log: list[dict[str, float]] = list(earlier)
    start = time.time()
    for epoch in range(epochs):
        net.train()
        total = 0.0
        for index in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))
            for group in optimizer.param_groups:
                group["lr"] = peak * max(rate, 1e-4)
            flipped = torch.rand(batch) < 0.5
            images = torch.where(flipped[:, None, None, None], x[index].flip(3), x[index])
            if name == "resnet20":
                loss = F.cross_entropy(net(shift(images)), y[index])
            else:  # distilled: no shifts, so that the teacher answers once for all epochs (Hinton et al. 2015)
                logits, teacher = net(images), taught[index, flipped.long()]
                soft = F.kl_div((logits / 2).log_softmax(1), (teacher / 2).softmax(1), reduction="batchmean")
                loss = 0.3 * F.cross_entropy(logits, y[index]) + 0.7 * 4 * soft
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0 if name == "vit" else 1e9)
            optimizer.step()
            total += loss.item()
            step += 1
        row = {
            "epoch": epoch + 1,
            "loss": total / (len(x) // batch),
            "validation": accuracy(net, *data["validation"]),
        }
        log.append({**row, "seconds": round(time.time() - start, 1)})
        print(log[-1], flush=True)
    result = {"network": name, "seed": seed, "epochs": len(log), "torch": torch.__version__}
    result |= {"test": accuracy(net, *data["test"])}
    print(result, flush=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, ZOO / f"{name}.safetensors")
    (ZOO / f"{name}.log.json").write_text(json.dumps({**result, "log": log}, indent=1) + "\n")


def pack(folder: Path) -> None:
    data = splits(folder)
    np.savez_compressed(
        ZOO / "fashion_mnist.npz",
        calibration=data["calibration"][0],
        test=data["test"][0],
        test_labels=data["test"][1],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["resnet20", "vit", "images"])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--again", action="store_true", help="start from the zoo's ViT with half the peak rate"
    )
    args = parser.parse_args()
    if args.what == "images":
        pack(args.data)
    else:
        train(
            args.what, args.data, args.epochs or (15 if args.what == "resnet20" else 9), args.seed, args.again
        )
