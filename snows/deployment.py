"""`deploy`: run a pruned network on packed layers wherever that is faster or smaller, and say of each layer what came of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from snows import intake, network
from snows.layers import SparseConv2d, SparseLinear
from snows.measuring import REPEATS, SCATTER, Race, race
from snows.network import Inputs, Layer
from snows.reference import innermost_images
from snows.report import add_row, named_table, read, render, to_json
from snows.rewriting import Site, Trace, activations, difference, fold_normalisations, outputs, plain, substitute
from snows.sparsity import NM

LAYER_SECONDS, NETWORK_SECONDS = 0.15, 1.0  # for so long a layer or a network is timed
MARGINS = 1.0, 1.3  # a layer is packed if it is so many times as fast alone; the second is tried if the first makes a slower network

# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class DeployedLayer:
    """One layer with zeros, and how it runs now.

    Attributes:
        name: of the layer.
        shape: of its weight.
        pattern: found in its zeros.
        kernel: what would run or runs it packed: "native", or "reference" (unpack and multiply); and the layout it is in.
        dense_ms, sparse_ms: median time of all its calls on the example, with the activation that both compute.
        dense_bytes, sparse_bytes: of weight and bias.
        reason: why it stayed dense; empty if it is packed.
    """

    name: str
    shape: tuple[int, ...]
    pattern: str = ""
    kernel: str = ""
    dense_ms: float = float("nan")
    sparse_ms: float = float("nan")
    dense_bytes: int = 0
    sparse_bytes: int = 0
    reason: str = ""


@dataclass
class Deployment:
    """What `deploy` did. Times are medians on the example, sizes of all that a file would hold.

    Attributes:
        layers: those with zeros, in order of execution.
        device: that was measured, with its threads.
        samples: in the example.
        dense_ms, sparse_ms: of the network as it came, and as it runs now.
        dense_bytes, sparse_bytes: of the two.
        dense_flops, sparse_flops: of Linear and Conv2d on the example, a multiplication and an addition being two.
        difference: largest difference of an output from the network as it came, relative to the largest output; NaN where the
            network returns no floating-point tensor, so that nothing could be compared.
        folded: BatchNorms that are now in the convolution before them, and activations in the packed layer before them.
        notes: sentences that a reader should see.
    """

    layers: list[DeployedLayer] = field(default_factory=list)
    device: str = ""
    samples: int = 0
    dense_ms: float = float("nan")
    sparse_ms: float = float("nan")
    dense_bytes: int = 0
    sparse_bytes: int = 0
    dense_flops: int = 0
    sparse_flops: int = 0
    difference: float = float("nan")
    folded: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def table(self) -> Table:
        table = named_table(("weight", "pattern", "kernel"), ("dense ms", "sparse ms", "ratio", "bytes"))
        table.add_column("", overflow="fold")
        for x in self.layers:
            known = x.sparse_ms == x.sparse_ms
            add_row(
                table, x.name, "x".join(map(str, x.shape)), x.pattern, "dense" if x.reason else x.kernel,
                *((f"{x.dense_ms:.3f}", f"{x.sparse_ms:.3f}", f"{x.dense_ms / x.sparse_ms:.2f}") if known else ("", "", "")),
                f"{100 * x.sparse_bytes / x.dense_bytes:.0f} %" if x.sparse_bytes else "", x.reason)
        return table

    def summary(self) -> str:
        packed = sum(not x.reason for x in self.layers)
        return (f"{packed} of {len(self.layers)} layers with zeros are packed; {self.dense_ms:.2f} ms dense, {self.sparse_ms:.2f} ms now "
                f"({self.dense_ms / self.sparse_ms:.2f} times as fast, {1e3 * self.samples / self.sparse_ms:.0f} images/s; {self.samples} at a "
                f"time on {self.device}); {self.sparse_bytes / 1e6:.2f} of {self.dense_bytes / 1e6:.2f} MB, {self.sparse_flops / 1e9:.3g} of "
                f"{self.dense_flops / 1e9:.3g} GFLOP; "
                + (f"outputs differ by at most {self.difference:.1e} of the largest" if self.difference == self.difference else
                   "nothing was compared, for the network returns no floating-point tensor"))

    def __str__(self) -> str:
        return "\n".join([render(self.table(), width=160), self.summary(), *self.notes])

    def to_json(self) -> str:
        return to_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Deployment:
        """Read what `to_json` wrote.

        Raises:
            ValueError: it is no JSON, or its entries are not a report's.
        """
        return read(cls, DeployedLayer, text)


# ---------------------------------------------------------------- deploy


def deploy(
    model: nn.Module,
    example: Any,
    *,
    objective: Literal["speed", "size"] = "speed",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> nn.Module:
    """Put the layers of a pruned network on packed weights.

    BatchNorm is folded into a convolution whose output goes to it alone. Then every layer with zeros is timed on the
    example, dense against packed, and the better one stays. With 16 images or a multiple of it, convolutions are also tried
    with the images innermost in memory, a layout that they hand on; the faster network stays. No layer is changed that the
    network uses in another way than by calling it. The result computes what the masked network computed, on any machine.

    Args:
        model: any module in evaluation mode with zeros in its weights, whoever pruned it; left as it was.
        example: one batch: a tensor, `(images, labels)` or a mapping of keyword inputs. Its shapes, device and layout are
            what the choice is made for; a few tenths of a second are spent on each layer.
        objective: "speed" keeps the faster of dense and packed; "size" packs whatever becomes smaller.
        dtype: of the result's weights and inputs; None keeps the model's.
        progress: show a progress bar.

    Returns:
        A copy with packed layers; its attribute `report` is a `Deployment`.

    Raises:
        ValueError: the model is in training mode, has no zeros, holds NaN, or is packed already; or cannot run the example.
    """
    _check(model, objective)
    given = _like(model, network.as_inputs(example))
    with torch.autocast(given.tensors()[0].device.type, enabled=False):
        return _deployed(model, given, objective, dtype, progress)


def _deployed(model: nn.Module, given: Inputs, objective: str, dtype: torch.dtype | None, progress: bool) -> nn.Module:
    expected = _first_run(model, given)
    net = network.copied(model)
    network.take_masks_off(net)
    network.open_attention(net)
    if not any((layer.weight == 0).any() for layer in network.prunable(net).values()):
        raise ValueError("deploy: expected a model with zeros in its Linear or Conv2d weights, got none; prune it first")
    report = Deployment(device=_device(given), samples=_samples(given), dense_bytes=_nbytes(model))
    trace = Trace(net, given)
    folds = fold_normalisations(net, given, trace)
    report.folded = list(folds.values())
    followers = activations(trace, folds)
    inputs = given
    if dtype is not None:
        net.to(dtype)
        inputs = Inputs(*tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tuple(given)))
    layers = network.prunable(net)
    for name, site in trace.sites.items():
        flops = sum(2 * entries * layers[name].weight[0].numel() for entries in site.outputs)
        report.dense_flops += flops
        report.sparse_flops += round(flops * float((layers[name].weight != 0).double().mean()))
    dense = network.copied(net)
    network.close_attention(dense)
    times: dict[Any, Race] = {}  # of layers that are equal, in all that is tried
    for margin in MARGINS:
        terms = _Terms(objective, margin, False, times)
        candidates = [_pack(network.copied(net), trace, followers, terms, progress)]
        convolves = any(isinstance(m, SparseConv2d) for m in candidates[0].net.modules())
        if objective == "speed" and report.samples % 16 == 0 and convolves and next(net.parameters()).is_cpu:
            candidates.append(_pack(network.copied(net), trace, followers, terms._replace(innermost=True), progress))
        runs = [(model, given), (dense, inputs), *((found.net, inputs) for found in candidates)]
        whole = race([lambda run=run: outputs(*run) for run in runs], NETWORK_SECONDS,  # type: ignore[misc]
                     _whole_scatters)
        report.dense_ms, folded_ms, *taken = whole.medians
        report.sparse_ms, best = min(zip(taken, candidates, strict=True), key=lambda x: x[0])
        report.layers = best.rows
        packed = [x for x in best.rows if not x.reason]
        if objective == "size" or report.sparse_ms <= 1.02 * folded_ms or not packed:
            net = best.net
            report.folded += best.fused
            break
    else:
        report.notes.append(f"Layer by layer the packed ones were faster, the network as a whole was not ({report.sparse_ms:.2f} ms, "
                            f"{folded_ms:.2f} ms with dense layers), so all stay dense.")
        net, report.sparse_ms = dense, folded_ms
        report.layers = [replace(x, reason=x.reason or "the network as a whole was faster without it") for x in report.layers]
    if objective == "speed":
        report.notes += _scatter(times, whole, margin)
    report.difference = difference(expected, outputs(net, inputs)) if expected else float("nan")
    report.sparse_bytes = _nbytes(net)
    net.report = report  # type: ignore[assignment]
    return net


class _Terms(NamedTuple):
    """What a packed layer has to be: smaller, or `margin` times as fast; `times` remembers what equal layers took."""

    objective: str
    margin: float
    innermost: bool  # hand images on innermost in memory
    times: dict[Any, Race]


class _Packed(NamedTuple):
    """A network with packed layers, what is said of each layer with zeros, and the activations that layers took over."""

    net: nn.Module
    rows: list[DeployedLayer]
    fused: list[str]


def _pack(net: nn.Module, trace: Trace, followers: dict[str, str], terms: _Terms, progress: bool) -> _Packed:
    """Put packed layers in, in place, where they are better."""
    found = _Packed(net, [], [])
    layers = network.prunable(net)
    for name, site in track(trace.sites.items(), "deploying", console=Console(stderr=True), transient=True, disable=not progress):
        layer = layers[name]
        if (layer.weight != 0).all():
            continue
        activation = net.get_submodule(followers[name]) if name in followers else None
        packed, row = _choose(name, layer, site, activation, terms)
        found.rows.append(row)
        if packed is not None:
            substitute(net, layer, packed)
            if activation is not None:
                substitute(net, activation, nn.Identity().eval())
                found.fused.append(followers[name])
    network.close_attention(net)
    return found


def _choose(
    name: str, layer: Layer, site: Site, activation: nn.Module | None, terms: _Terms,
) -> tuple[SparseLinear | SparseConv2d | None, DeployedLayer]:
    """The packed layer if it is better by the terms, and what the report says of it."""
    size = _nbytes(layer)
    row = DeployedLayer(name, tuple(layer.weight.shape), dense_bytes=size, reason=site.oddity)
    if not row.reason and network.groups_of(layer) > 1:
        row = replace(row, reason=f"{network.groups_of(layer)} groups")
    if row.reason:
        return None, row
    mine = plain(layer, site)
    follow: Literal["relu", "gelu"] | None = None if activation is None else "relu" if isinstance(activation, nn.ReLU) else "gelu"
    kind = SparseLinear if isinstance(mine, nn.Linear) else SparseConv2d
    innermost = terms.innermost and kind is SparseConv2d
    try:
        packed = kind.from_dense(mine, activation=follow)  # type: ignore[arg-type]
        if isinstance(packed, SparseConv2d):
            packed.innermost = innermost
    except ValueError as error:
        return None, replace(row, reason=str(error))
    row = replace(row, sparse_bytes=_nbytes(packed), kernel=f"{packed.kernel}, images innermost" if innermost else packed.kernel,
                  pattern=str(packed.pattern) if isinstance(packed.pattern, NM) else f"{100 * packed.pattern.sparsity:.1f} %")
    x = [_random(shape, stride, layer.weight) for shape, stride in site.inputs]
    laid = [innermost_images(a) for a in x] if innermost else x
    key = (kind, tuple(layer.weight.shape), tuple(site.inputs), row.pattern, follow, str(site.settings), layer.weight.is_contiguous(),
           innermost)
    if key not in terms.times:
        terms.times[key] = race([lambda: [mine(a) if activation is None else activation(mine(a)) for a in x],
                                 lambda: [packed(a) for a in laid]], LAYER_SECONDS,
                                lambda race: terms.objective == "speed" and race.scatters(0, 1, terms.margin))
    dense_ms, sparse_ms = terms.times[key].medians
    row = replace(row, dense_ms=dense_ms, sparse_ms=sparse_ms)
    if terms.objective == "size":
        row = replace(row, reason="" if row.sparse_bytes < size else "smaller as it is")
    elif packed.kernel == "reference":
        row = replace(row, reason=f"no packed kernel here for {str(layer.weight.dtype).removeprefix('torch.')}")
    elif terms.margin * row.sparse_ms >= row.dense_ms:
        slower = row.sparse_ms >= row.dense_ms
        row = replace(row, reason="faster as it is" if slower else f"less than {terms.margin} times as fast: the network was faster without it")
    return (None if row.reason else packed), row


def _random(shape: torch.Size, stride: tuple[int, ...], like: Tensor) -> Tensor:
    x = torch.empty(shape, dtype=like.dtype, device=like.device) if 0 in stride else \
        torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)
    return x.normal_()


def _whole_scatters(whole: Race) -> bool:
    """Whether a packed network cannot be told from the dense one with its normalisation folded; the network as it came is the first."""
    return any(whole.scatters(1, i) for i in range(2, len(whole.rounds[0])))


def _scatter(times: dict[Any, Race], whole: Race, margin: float) -> list[str]:
    """Say of which choices the times mean little."""
    unsure = sum(x.scatters(0, 1, margin) for x in times.values())
    notes = []
    if unsure:
        notes.append(f"The times of {unsure} of {len(times)} kinds of layer scatter by more than {100 * SCATTER:.0f} % although they were taken "
                     f"{REPEATS} times, so that choosing between dense and packed means little there; run deploy again on a quieter machine.")
    if _whole_scatters(whole):
        notes.append(f"The times of the whole network scatter by more than {100 * SCATTER:.0f} % although they were taken {REPEATS} times, so that "
                     "its ratio means little; run deploy again on a quieter machine.")
    return notes


def _check(model: nn.Module, objective: str) -> None:
    intake.check_model("deploy", model)
    if objective not in ("speed", "size"):
        raise ValueError(f'deploy: expected an objective of "speed" or "size", got {objective!r}')
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"deploy: expected finite weights, got NaN or infinity in {name}")


def _first_run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    if not all(x.isfinite().all() for x in inputs.tensors() if x.is_floating_point()):
        raise ValueError("deploy: expected a finite example, got NaN or infinity in it")
    return outputs(model, inputs)


def _like(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs on the model's device, in the precision of its first layer: another parameter, the first of all too, may have its own."""
    like = next((layer.weight for layer in network.prunable(model).values()), next(model.parameters()))
    return Inputs(*tree_map(
        lambda x: x.to(like.device, like.dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x, tuple(inputs)))


def _samples(inputs: Inputs) -> int:
    return inputs.samples()


def _device(inputs: Inputs) -> str:
    device = inputs.tensors()[0].device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def _nbytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in module.state_dict().values() if isinstance(x, Tensor))
