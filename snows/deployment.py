"""`deploy`: run a pruned network on packed layers wherever that is faster or smaller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from snows.choosing.measuring import Race, Stopwatch
from snows.choosing.packing import SCATTERS, Packing, Terms, nbytes, whole_scatters
from snows.layers import SparseConv2d
from snows.networks.attention import OpenAttention, close_attention
from snows.networks.batches import Batch, difference, outputs
from snows.networks.checks import check_model, read_batch
from snows.networks.edits import Edit, Fold, Open, Pack, openings
from snows.networks.folding import activations, fold_normalisations
from snows.networks.layers import copied, prunable
from snows.networks.masks import mask_of, take_masks_off
from snows.networks.trace import Trace
from snows.results.report import DeployedLayer, Deployment

MARGINS = (
    1.0,
    1.3,
    # a layer is packed if it is so many times as fast alone; the second is tried if the first makes a slower
    # network
)
# a packed network that takes so much longer than the dense one is within what times scatter, and smaller
AS_FAST = 1.02


@dataclass(frozen=True)
class Deployed:
    """Hold what `deploy` made; unpacks into network and report.

    Attributes:
        network: the copy with packed layers.
        report: what was measured and chosen, layer by layer.
        edits: that made the network, in order; `snows.save` writes them.
    """

    network: nn.Module
    report: Deployment
    edits: list[Edit]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.report))


class _Candidate(NamedTuple):
    """Hold a network that could be the result."""

    network: nn.Module
    edits: list[Edit]
    rows: list[DeployedLayer]


def deploy(
    model: nn.Module,
    example: Any,
    *,
    objective: Literal["speed", "size"] = "speed",
    dtype: torch.dtype | None = None,
    stopwatch: Stopwatch = Stopwatch(),
    progress: bool = True,
) -> Deployed:
    """Put the layers of a pruned network on packed weights.

    BatchNorm is folded into a convolution whose output goes to it alone. Then every layer with zeros is timed
    on the example, dense against packed, and the better one stays. With 16 images or a multiple of it,
    convolutions are also tried with the images innermost in memory, a layout that they hand on; the faster
    network stays. No layer is changed that the network uses in another way than by calling it. The result
    computes what the masked network computed, on any machine.

    Args:
        model: any module in evaluation mode with zeros in its weights, whoever pruned it; left as it was.
        example: one batch: a tensor, `(images, labels)` or a mapping of keyword inputs. Its shapes, device
            and layout are what the choice is made for; a few tenths of a second are spent on each layer.
        objective: "speed" keeps the faster of dense and packed; "size" packs whatever becomes smaller.
        dtype: of the result's weights and inputs; None keeps the model's.
        stopwatch: how long layers and networks are timed.
        progress: show a progress bar.

    Returns:
        A copy with packed layers, the report and the edits; `network, report = deploy(...)` takes the first
        two.

    Raises:
        ValueError: the model is in training mode, has no zeros, holds NaN, or is packed already; or cannot
            run the example.
    """
    _check(model, objective)
    given = _like(model, read_batch("deploy", model, example))
    with torch.autocast(given.tensors()[0].device.type, enabled=False):
        expected = _first_run(model, given)
        net, edits, trace = _prepared(model, given)
        report = Deployment(device=_device(given), samples=given.samples(), dense_bytes=nbytes(model))
        report.dense_flops, report.sparse_flops = _flops(net, trace)
        batch = given
        if dtype is not None:
            net.to(dtype)
            batch = given.map(lambda x: x.to(dtype) if x.is_floating_point() else x)
        packing = Packing(stopwatch)
        dense = _Candidate(net, edits, [])
        candidate, whole, margin = _fastest(
            dense, trace, packing, _Runs(model, given, batch), objective, report, progress
        )
        if objective == "speed":
            report.notes += packing.scatter(margin)
            if whole_scatters(whole):
                report.notes.append(
                    f"The times of the whole network {SCATTERS}, so that its ratio means little; run deploy "
                    "again "
                    "on a quieter machine."
                )
        network = candidate.network
        report.layers = candidate.rows
        report.folded = [edit.norm for edit in candidate.edits if isinstance(edit, Fold)]
        report.folded += [edit.absorbs for edit in candidate.edits if isinstance(edit, Pack) and edit.absorbs]
        report.difference = difference(expected, outputs(network, batch)) if expected else float("nan")
        report.sparse_bytes = nbytes(network)
    return Deployed(network, report, candidate.edits)


class _Runs(NamedTuple):
    """Hold what networks are timed on: the model's batch, and the candidates' in their precision."""

    model: nn.Module
    given: Batch
    batch: Batch


def _prepared(model: nn.Module, given: Batch) -> tuple[nn.Module, list[Edit], Trace]:
    """Copy a network, open its attention and fold its normalisations."""
    net = copied(model)
    take_masks_off(net)
    edits = openings(net)
    for edit in edits:
        edit.apply(net)
    if all(mask_of(layer, name).all() for name, layer in prunable(net).items()):
        raise ValueError(
            "deploy: expected a model with zeros in its Linear or Conv2d weights, got none; prune it first"
        )
    trace = Trace.of(net, given)
    trace.outputs = []
    return net, [*edits, *fold_normalisations(net, given, trace)], trace


def _fastest(
    dense: _Candidate,
    trace: Trace,
    packing: Packing,
    runs: _Runs,
    objective: Literal["speed", "size"],
    report: Deployment,
    progress: bool,
) -> tuple[_Candidate, Race, float]:
    """Pack by one margin after the other until the network as a whole is not slower for it.

    Times go into the report.

    Returns:
        The network to take, the last race of whole networks, and the margin.
    """
    unpacked = copied(dense.network)
    close_attention(unpacked)
    for margin in MARGINS:
        terms = Terms(objective, margin)
        candidates = [_packed(dense, trace, packing, terms, progress)]
        convolves = any(isinstance(m, SparseConv2d) for m in candidates[0].network.modules())
        if (
            objective == "speed"
            and report.samples % 16 == 0
            and convolves
            and next(unpacked.parameters()).is_cpu
        ):
            candidates.append(_packed(dense, trace, packing, replace(terms, innermost=True), progress))
        pairs = [
            (runs.model, runs.given),
            (unpacked, runs.batch),
            *((found.network, runs.batch) for found in candidates),
        ]
        whole = packing.stopwatch.network([partial(outputs, *pair) for pair in pairs], whole_scatters)
        report.dense_ms, folded_ms, *taken = whole.medians
        report.sparse_ms, best = min(zip(taken, candidates, strict=True), key=lambda x: x[0])
        if objective == "size" or report.sparse_ms <= AS_FAST * folded_ms or all(x.reason for x in best.rows):
            return best, whole, margin
    report.notes.append(
        f"Layer by layer the packed ones were faster, the network as a whole was not ({report.sparse_ms:.2f} "
        "ms, "
        f"{folded_ms:.2f} ms with dense layers), so all stay dense."
    )
    report.sparse_ms = folded_ms
    rows = [replace(x, reason=x.reason or "the network as a whole was faster without it") for x in best.rows]
    return _Candidate(unpacked, [edit for edit in dense.edits if isinstance(edit, Fold)], rows), whole, margin


def _packed(dense: _Candidate, trace: Trace, packing: Packing, terms: Terms, progress: bool) -> _Candidate:
    """Pack a copy's layers where that is better by the terms."""
    net = copied(dense.network)
    layers = prunable(net)
    follow = activations(trace, [edit for edit in dense.edits if isinstance(edit, Fold)])
    found = _Candidate(net, list(dense.edits), [])
    for name, use in track(
        trace.layers.items(), "deploying", console=Console(stderr=True), transient=True, disable=not progress
    ):
        layer = layers[name]
        if mask_of(layer, name).all():
            continue
        activation = (follow[name], net.get_submodule(follow[name])) if name in follow else None
        chosen, row = packing.choose(name, layer, use, activation, terms)
        found.rows.append(row)
        if chosen is not None:
            edit, packed = chosen
            edit.put(net, packed)
            found.edits.append(edit)
    close_attention(net)
    kept = [
        edit
        for edit in found.edits
        if not isinstance(edit, Open) or isinstance(net.get_submodule(edit.module), OpenAttention)
    ]
    return found._replace(edits=kept)


# ---------------------------------------------------------------- what goes in


def _check(model: nn.Module, objective: str) -> None:
    check_model("deploy", model)
    if objective not in ("speed", "size"):
        raise ValueError(f'deploy: expected an objective of "speed" or "size", got {objective!r}')
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"deploy: expected finite weights, got NaN or infinity in {name}")


def _like(model: nn.Module, batch: Batch) -> Batch:
    """Bring a batch to the model's device, in the precision of its first layer.

    Other parameters, the first of all too, may have a precision of their own.
    """
    like = next((layer.weight for layer in prunable(model).values()), next(model.parameters()))
    return batch.map(lambda x: x.to(like.device, like.dtype if x.is_floating_point() else None))


def _first_run(model: nn.Module, batch: Batch) -> list[Tensor]:
    if not all(x.isfinite().all() for x in batch.tensors() if x.is_floating_point()):
        raise ValueError("deploy: expected a finite example, got NaN or infinity in it")
    return outputs(model, batch)


def _flops(net: nn.Module, trace: Trace) -> tuple[int, int]:
    """Count the operations of a network's layers, of all weights and of those that are kept."""
    layers, kept = prunable(net), 0
    for name, use in trace.layers.items():
        kept += round(use.flops * float(mask_of(layers[name], name).double().mean()))
    return trace.flops, kept


def _device(batch: Batch) -> str:
    device = batch.tensors()[0].device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type.upper()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
