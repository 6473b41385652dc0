"""Networks by name, with their trained weights, from the libraries that people take them from."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from snows import zoo
from snows.networks.batches import first_line
from snows.results import files
from snows.results.certificate import origin_at
from snows.sources import classes, preparation
from snows.sources.checkpoints import MismatchError, load_weights
from snows.sources.preparation import Plain, Preparation

KINDS = "zoo:NAME, timm:NAME, torchvision:NAME, hf:ID, hf:FOLDER or package.module:callable"
AS_TRAINED: dict[str, dict[str, Any]] = {  # how torchvision itself builds them where it loads their weights
    "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
    "inception_v3": {"transform_input": True, "init_weights": False},
}


@dataclass(frozen=True)
class Network:
    """Hold a network, and what its library knows of it.

    Attributes:
        model: in evaluation mode, on the CPU.
        name: that it was asked for by.
        preparation: of its pictures.
        classes: of each output, all that it may be called; None if unknown.
        note: a sentence for the user; empty if there is nothing to say.
    """

    model: nn.Module
    name: str
    preparation: Preparation = field(default_factory=Plain)
    classes: classes.Names | None = None
    note: str = ""


def runs_code(name: str) -> bool:
    """Say whether opening a network of this name, or data that is no folder, runs Python code."""
    kind, separator, rest = name.partition(":")
    return bool(separator and rest) and kind not in (
        "zoo",
        "timm",
        "torchvision",
        "hf",
        "cifar10",
        "cifar100",
    )


def load_model(name: str, weights: Path | None = None, *, random_weights: bool = False) -> Network:
    """Build a network in evaluation mode, with its trained weights.

    Args:
        name: `zoo:NAME`; `timm:NAME[.TAG]`, `torchvision:NAME[:WEIGHTS]`, `hf:ID` or `hf:FOLDER`, whose
            weights come through that library's own hub and cache; or `package.module:callable`, which is
            imported and called.
        weights: a safetensors file, also one of packed layers, or a pickled checkpoint (see
            `checkpoints.load_weights`); the library's are not fetched then.
        random_weights: start from random numbers, the same every time.

    Raises:
        ValueError: there is no such network, its weights are not at hand, or those of the file do not match
            it.
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise ValueError(f"model: expected {KINDS}, got {name!r}")
    if random_weights and weights is not None:
        raise ValueError("model: expected weights from a file or random ones, got both")
    trained = weights is None and not random_weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = _build(name, kind, rest, trained)
    except ImportError as error:
        advice = (
            "pip install '.[models]' in the clone of snows brings torchvision, timm and transformers"
            if kind in BUILDERS
            else "expected a module in this folder or on the Python path, named without .py"
        )
        raise ValueError(
            f"model: {name} needs a package that is not installed or does not load ({first_line(error)}); "
            f"{advice}"
        ) from error
    except Exception as error:  # whatever building it raises
        if isinstance(error, MismatchError | _NotAtHandError):
            raise
        if "torchvision::" in str(error):
            raise ValueError(
                f"model: {name} needs a torchvision that was built for this torch ({torch.__version__}); "
                f"install both from the same index ({first_line(error)})"
            ) from error
        if trained and _offline(error):
            raise ValueError(
                f"model: the trained weights of {name} are not in the cache and cannot be fetched "
                f"({first_line(error)}); try again with "
                "a connection, or name a file with --weights, or say --random-weights"
            ) from error
        raise ValueError(f"model: {name} could not be built ({first_line(error)})") from error
    if not isinstance(network.model, nn.Module):
        raise ValueError(f"model: expected {name} to return an nn.Module, got {type(network.model).__name__}")
    if weights is not None and files.has_edits(weights):
        return replace(network, model=files.load(weights, network.model))
    if weights is not None:
        load_weights(network.model, weights)
        origin_at(weights).note(network.model)
    network.model.eval()
    return network


class _NotAtHandError(ValueError):
    """Says that a library has no trained weights of a network."""


def _offline(error: BaseException | None) -> bool:
    """Say whether something could not be fetched.

    It is told by the names that urllib, requests, httpx and Hugging Face's hub give such errors.
    """
    while error is not None:
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {
            "URLError",
            "ConnectionError",
            "TransportError",
            "RequestException",
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "EntryNotFoundError",
            "HfHubHTTPError",
            "RepositoryNotFoundError",
            "timeout",
            "TimeoutError",
        }:
            return True
        if isinstance(error, OSError) and ("huggingface.co" in str(error) or "offline" in str(error).lower()):
            return True  # transformers wraps the hub's errors
        error = error.__cause__ or error.__context__
    return False


def _build(name: str, kind: str, rest: str, trained: bool) -> Network:
    if kind in BUILDERS:
        return BUILDERS[kind](name, rest, trained)
    return Network(find_object(kind, rest)(), name)


def find_object(module: str, attribute: str) -> Any:
    """Import an object; modules of the current folder are found too, as `python -m snows` finds them."""
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    return getattr(importlib.import_module(module), attribute)


def _zoo(name: str, rest: str, trained: bool) -> Network:
    return Network(zoo.load(rest) if trained else zoo.build(rest), name)


def _timm(name: str, rest: str, trained: bool) -> Network:
    timm: Any = importlib.import_module("timm")
    hosted = rest.startswith(("hf-hub:", "hf_hub:"))  # timm's own name for a network on the hub
    if not hosted and not timm.is_model(rest):
        raise ValueError(f"timm has no network {rest!r}")
    if trained and not hosted and not timm.is_model_pretrained(rest):
        raise _NotAtHandError(
            f"model: timm has no trained weights of {rest}; name a file with --weights, or say "
            "--random-weights"
        )
    net = timm.create_model(rest, pretrained=trained)
    config = net.pretrained_cfg or {}
    names: Any = config.get("label_names")
    if names is None and (subset := importlib.import_module("timm.data").infer_imagenet_subset(net)):
        info: Any = importlib.import_module("timm.data").ImageNetInfo(subset)
        names = tuple(
            (wnid, *classes.synonyms(text))
            for wnid, text in zip(info.label_names(), info.label_descriptions(), strict=True)
        )
    else:
        names = tuple(classes.synonyms(str(x)) for x in names) if names else None
    return Network(net, name, preparation.of_timm(net), names)


def _torchvision(name: str, rest: str, trained: bool) -> Network:
    models: Any = importlib.import_module("torchvision.models")
    architecture, _, wanted = rest.partition(":")
    if architecture not in models.list_models():
        raise ValueError(f"torchvision has no network {architecture!r}")
    known = models.get_model_weights(architecture)
    if wanted and wanted not in known.__members__:
        raise ValueError(f"expected weights {', '.join(known.__members__)}, got {wanted!r}")
    entry = known[wanted] if wanted else getattr(known, "DEFAULT", None)
    if trained and entry is None:
        raise _NotAtHandError(
            f"model: torchvision has no trained weights of {architecture}; name a file with --weights, or "
            "say --random-weights"
        )
    more = {} if trained else AS_TRAINED.get(architecture, {})
    if (
        not trained
        and "weights_backbone" in inspect.signature(models.get_model_builder(architecture)).parameters
    ):
        more = {"weights_backbone": None}
    net = models.get_model(architecture, weights=entry if trained else None, **more)
    names = (
        tuple((str(x),) for x in entry.meta["categories"])
        if entry is not None and "categories" in entry.meta
        else None
    )
    prepared = preparation.of_torchvision(entry.transforms) if entry is not None else Plain()
    return Network(net, name, prepared, classes.with_wordnet(names) if names else None)


def _transformers(name: str, rest: str, trained: bool) -> Network:
    transformers: Any = importlib.import_module("transformers")
    where = str(Path(rest).expanduser()) if Path(rest).expanduser().is_dir() else rest
    if Path(where).is_dir() and not (Path(where) / "config.json").is_file():
        raise ValueError(f"expected {rest} to hold a config.json as transformers saves it, got none")
    kind = transformers.AutoModelForImageClassification
    if trained:
        net, found = kind.from_pretrained(
            where, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
        missing, reshaped = list(found["missing_keys"]), [str(x[0]) for x in found["mismatched_keys"]]
        if missing or reshaped:  # transformers would leave them random
            raise MismatchError(
                Path(where),
                missing=missing,
                unexpected=list(found["unexpected_keys"]),
                of_another_shape=reshaped,
            )
    else:
        net = kind.from_config(transformers.AutoConfig.from_pretrained(where, trust_remote_code=False))
    labels = getattr(net.config, "id2label", None) or {}
    texts = [str(labels[key]) for key in sorted(labels, key=int)]
    named = texts and not all(text == f"LABEL_{i}" for i, text in enumerate(texts))
    names = classes.with_wordnet(tuple(classes.synonyms(text) for text in texts)) if named else None
    try:
        prepared: Preparation = preparation.of_transformers(
            transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
        )
        note = ""
    except (OSError, ValueError) as error:
        prepared = Plain()
        note = (
            f"{name} brings no preparation of pictures ({first_line(error)[:150]}); taken instead: {prepared}"
        )
    return Network(net, name, prepared, names, note)


BUILDERS: dict[str, Callable[[str, str, bool], Network]] = {
    "zoo": _zoo,
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
}
