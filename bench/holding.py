"""Fine-tuning under `snows.hold`: what it gives, and what it costs a step.

    python bench/holding.py accuracy --data FOLDER --out bench/results/emerald-rapids/holding.json
    python bench/holding.py speed --threads 1 --clock processor --out bench/results/cpu/holding-steps.json

`accuracy` prunes a network of the zoo, trains it for two epochs towards the dense network's outputs, as the guide does, and deploys
it: on the 3,000 calibration images that ship with the package, and on the 55,000 training images, read from `--data` as
`examples/train_zoo.py` reads them. "off the mask" counts masked weights that are not zero after training; the run without `hold`
shows that they do not stay zero by themselves. It is judged on all test images, or with `--split validation` on the 5,000 validation
images.

`speed` times whole steps, forward, backward and update, with and without hold in turns on the same network, optimizer and images.
"slower" is the median over rounds of the quotient of two neighbours, in per cent. `--clock processor` counts the seconds of this
process alone, where other programs run beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from turns import keep
from zoo import images_of

import snows
from snows import heap, zoo
from snows.evaluation import evaluate
from snows.networks.masks import kept_mask

RATES = {"resnet20": 0.02, "vit": 2e-4}


def optimizer_of(name, net, kind=""):
    if (kind or ("SGD" if name == "resnet20" else "AdamW")) == "SGD":
        return torch.optim.SGD(net.parameters(), RATES["resnet20"], momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(net.parameters(), RATES["vit"], weight_decay=0.05)


def off_the_mask(net):
    """How many masked weights are not zero, and how many there are."""
    pairs = [(m.weight.detach(), kept_mask(m)) for m in net.modules() if kept_mask(m) is not None]
    return sum(int(w[~m].count_nonzero()) for w, m in pairs), sum(int((~m).sum()) for _, m in pairs)


def tune(dense, net, name, images, epochs, batch=128):
    """Train a network towards the outputs of another, in place; its rate falls to zero."""
    net.train()
    optimizer = optimizer_of(name, net)
    steps = epochs * (len(images) // batch)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // batch * batch].split(batch):
            x = images[index].contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                wanted = dense(x).softmax(1)
            optimizer.zero_grad()
            F.cross_entropy(net(x), wanted).backward()
            optimizer.step()
            falling.step()
    return net.eval()


def training_images(data):
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import train_zoo

    return train_zoo.tensors(train_zoo.splits(data)["train"])[0]


def accuracy(args):
    test = list(zip(*(x.split(500) for x in images_of(args.split, args.data)), strict=True))
    data = {"3,000 images": zoo.images("calibration")[0]}
    if not args.shipped:
        data["55,000 images"] = training_images(args.data)
    rows = []
    for case in args.cases.split(","):
        name, _, pattern = case.partition("=")
        dense = zoo.load(name).to(memory_format=torch.channels_last)

        def note(method, net, case=case, dense=dense, **more):
            name, _, pattern = case.partition("=")
            row = {
                "network": name,
                "pattern": pattern,
                "method": method,
                "accuracy": round(evaluate(net, test).top1, 2),
            }
            rows.append({**row, **more})
            print(rows[-1], flush=True)
            keep(args.out, rows)

        note("dense", dense)
        pruned, _ = snows.prune(dense, zoo.calibration(), snows.parse_pattern(pattern), progress=False)
        note("pruned", pruned)
        for label, images in data.items():
            for held in (True, False) if label == "3,000 images" else (True,):
                torch.manual_seed(0)
                net, began = copy.deepcopy(pruned), time.perf_counter()
                handle = snows.hold(net) if held else None
                tune(dense, net, name, images, 2)
                seconds = round(time.perf_counter() - began)
                wrong, masked = off_the_mask(net)
                method = f"{label}, {'held' if held else 'not held'}"
                note(method, net, **{"off the mask": wrong, "masked": masked, "seconds": seconds})
                if held:
                    handle.remove()
                    example = zoo.calibration(64, 64)[0]
                    deployed = snows.deploy(net, example, progress=False)
                    note(f"{label}, deployed", deployed.network)


@heap.kept()
def speed(args):
    rows, clock = [], time.process_time if args.clock == "processor" else time.perf_counter
    for case in args.cases.split(","):
        name, _, pattern = case.partition("=")
        net, _ = snows.prune(
            zoo.load(name),
            zoo.calibration(64, 64),
            snows.parse_pattern(pattern),
            select=snows.magnitude,
            solver=None,
            progress=False,
        )
        net.train()
        for kind in ("SGD", "AdamW"):
            for batch in map(int, args.batches.split(",")):
                images = zoo.images("calibration")[0][:batch]
                labels = torch.randint(0, 10, (batch,))
                optimizer = optimizer_of(name, net, kind)

                def step(net=net, optimizer=optimizer, images=images, labels=labels):
                    began = clock()
                    optimizer.zero_grad()
                    F.cross_entropy(net(images), labels).backward()
                    optimizer.step()
                    return 1e3 * (clock() - began)

                pairs = []
                for number in range(-2, args.rounds):
                    both = {}
                    for held in (True, False) if number % 2 else (False, True):
                        handle = snows.hold(mended(net))  # the same work before both
                        if not held:
                            handle.remove()
                        both[held] = step()
                        handle.remove()
                    if number >= 0:
                        pairs.append((both[True], both[False]))
                slower = [100 * (a / b - 1) for a, b in pairs]
                low, middle, high = statistics.quantiles(slower, n=4)
                row = {
                    "network": name,
                    "pattern": pattern,
                    "method": f"{kind}, batch of {batch}",
                    "held ms": statistics.median(a for a, _ in pairs),
                    "not held ms": statistics.median(b for _, b in pairs),
                    "slower, lower quartile": low,
                    "slower": middle,
                    "slower, upper quartile": high,
                    "rounds": len(pairs),
                }
                rows.append(row)
                print(row, flush=True)
                keep(args.out, rows)


@torch.no_grad()
def mended(net):
    """A network whose zeros are zero again after a step that was not held."""
    for module in net.modules():
        if (mask := kept_mask(module)) is not None:
            module.weight.mul_(mask)
    return net


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["accuracy", "speed"])
    parser.add_argument("--cases", default="resnet20=1:4,resnet20=0.9", help="network=pattern")
    parser.add_argument("--batches", default="32,128", help="images a step that is timed")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--shipped", action="store_true", help="no training images but those of the package")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"accuracy": accuracy, "speed": speed}[args.part](args)


if __name__ == "__main__":
    main()
