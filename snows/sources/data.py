"""Images by name: a folder of pictures, a dataset of a library, or any iterable of batches."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from snows import zoo
from snows.evaluation import logits_of
from snows.networks.batches import first_line
from snows.sources import classes as naming
from snows.sources import datasets
from snows.sources.datasets import Found
from snows.sources.images import Data
from snows.sources.networks import Network, find_object, runs_code
from snows.sources.pictures import Split, find, open_picture, read_labels, split_folder
from snows.sources.preparation import Plain, Preparation

KINDS = (
    "a folder, zoo:fashion-mnist, cifar10:FOLDER, cifar100:FOLDER, torchvision:NAME[:FOLDER], hf:ID, "
    "hf:FOLDER or package.module:callable"
)


def load_data(
    name: str,
    network: Network,
    split: Split,
    *,
    preparation: Preparation | None = None,
    classes: Path | None = None,
    labels: Path | None = None,
    fetch: bool = True,
) -> Data:
    """Find images for a network.

    Args:
        name: a folder of pictures, with one folder a class or none; `zoo:fashion-mnist`; `cifar10:FOLDER` or
            `cifar100:FOLDER` (the published binary files); `torchvision:NAME[:FOLDER]`; `hf:ID` or
            `hf:FOLDER` (the package datasets); or `package.module:callable`, which is imported and called
            (with `split=` if it takes that) and returns an iterable of batches.
        network: that they are for: its preparation is theirs, its classes number theirs.
        split: "calibration" or "test": a folder's `train` or its `val`, `validation`, `valid` or `test`, if
            there is one; a dataset's own.
        preparation: instead of the network's.
        classes: a file of the network's classes in order (see `classes.read`), instead of the network's own
            list.
        labels: a file of the classes of a flat folder of pictures (see `pictures.read_labels`).
        fetch: whether a dataset that is not on this machine may be fetched.

    Raises:
        ValueError: there are no images, an argument is none that this kind of data takes, or nothing says
            which output of the network a class of the test images is.
    """
    prepare = preparation or network.preparation
    kind, separator, rest = name.partition(":")
    names = naming.read(classes) if classes is not None else network.classes
    is_folder = Path(name).is_dir()
    kind, calls = "" if is_folder else kind, runs_code(name) and not is_folder
    known = kind in ("zoo", "cifar10", "cifar100", "torchvision", "hf")
    _check_taken(
        name,
        {
            "--labels": labels is not None and (known or calls),
            "--classes": classes is not None and (kind in ("zoo", "cifar10", "cifar100") or calls),
            "--crop, --resize, --mean or --std": preparation not in (None, network.preparation)
            and (kind == "zoo" or calls),
        },
    )
    if calls:
        return _called(name, kind, rest, split)
    if separator and rest and kind == "zoo":
        if rest != "fashion-mnist":
            raise ValueError(f"data: expected zoo:fashion-mnist, got {name!r}")
        x, found = zoo.images(split)
        return Data(
            f"{name} {split}", lambda i: x[i], np.full(len(x), -1) if found is None else found.numpy()
        )
    if separator and rest and kind in ("cifar10", "cifar100"):
        pictures = datasets.of_cifar(name, kind, Path(rest).expanduser(), split)
        names = None  # they come as numbers
    elif separator and rest and kind == "torchvision":
        pictures = datasets.of_torchvision(name, rest, split, fetch)
    elif separator and rest and kind == "hf":
        pictures = datasets.of_datasets(name, rest, split, fetch)
    else:
        pictures = _of_folder(name, split, labels)
        if isinstance(prepare, Plain) and prepare.crop is None:
            prepare = prepare.override(224, 256)  # a folder's pictures are of many sizes
    result = Data(pictures.origin, lambda i: prepare(pictures.open(i)), pictures.labels, files=pictures.files)
    result.preparation = str(prepare)
    if isinstance(prepare, Plain) and preparation in (None, network.preparation):
        result.preparation += "; the network does not say how, --crop, --resize, --mean and --std do"
    if split == "test" and pictures.classes:
        number, result.note = naming.numbered(
            pictures.classes, names, cache(lambda: _outputs(network, result)), name, classes is not None
        )
        result.labels = np.array([number[x] if x >= 0 else -1 for x in result.labels], np.int64)
    return result


def _check_taken(name: str, given: Mapping[str, bool]) -> None:
    """Refuse what this kind of data has no use for, rather than leave it unheard.

    Raises:
        ValueError: something was given in vain.
    """
    if vain := [option for option, is_given in given.items() if is_given]:
        raise ValueError(f"data: {name} takes no {vain[0]}; leave it out")


def _outputs(network: Network, data: Data) -> int:
    """Ask the network how many classes it tells apart, by one image."""
    image = next((x for x, _ in data.batches(1)), None)
    if image is None:
        raise ValueError(f"data: none of the pictures in {data.origin} can be read")
    device = next((x.device for x in network.model.parameters()), torch.device("cpu"))
    return logits_of(network.model, image.to(device)).shape[1]


def _of_folder(name: str, split: Split, labels: Path | None) -> Found:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data: there is no folder {name}; expected {KINDS}")
    folder = split_folder(folder, split)
    files, classes, numbers = find(folder)
    named: Sequence[Sequence[str]] = [(x,) for x in classes]
    if labels is not None and split == "test":
        if classes:
            raise ValueError(
                f"labels: expected a flat folder of pictures, but {folder} has a folder for each class; "
                "leave --labels out"
            )
        named, numbers = read_labels(labels, files)
    return Found(
        str(folder),
        lambda i: open_picture(files[i]),
        np.array(numbers, np.int64),
        named,
        [file.name for file in files],
    )


def _called(name: str, module: str, attribute: str, split: Split) -> Data:
    """Import and call what returns batches."""
    try:
        function = find_object(module, attribute)
        by_split = "split" in inspect.signature(function).parameters
        found = function(split=split) if by_split else function()
    except Exception as error:  # whatever it raises
        raise ValueError(
            f"data: {name} could not be opened ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(found, Iterable) or isinstance(found, Iterator):
        raise ValueError(
            f"data: expected {name} to return something that can be iterated again and again, a DataLoader "
            f"or a list of batches, got {type(found).__name__}"
        )
    return Data(f"{name} {split}" if by_split else name, stream=found)
