"""`prune`: walk a network layer by layer, choose each mask, re-fit the weights that stay, and keep what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune as torch_prune
from torch.utils._pytree import tree_map

from snows import memory, network
from snows.horizon import Horizon, Metric, Reconstruction, Sensitivities
from snows.layers import SparseConv2d, SparseLinear
from snows.network import Inputs, Order, Plan, Stream
from snows.operators import Factors
from snows.report import LayerReport, Report
from snows.run import Run
from snows.selectors import LayerStatistics, Selector, alps
from snows.solvers import Fit, Newton, Step
from snows.sparsity import MaskedWeight, Pattern, Unstructured, allocate

PatternChoice = Pattern | Mapping[str, Pattern] | Callable[[str, nn.Module], Pattern | None] | None
Only = Callable[[str, nn.Module], bool]


@memory.kept()
def prune(
    model: nn.Module,
    batches: Iterable[Any],
    pattern: PatternChoice,
    *,
    select: Selector | Mapping[str, Tensor] | nn.Module = alps,
    solver: Newton | None = Newton(),  # noqa: B008 - frozen
    horizon: int | Literal["end"] = 3,
    targets: Literal["dense", "local"] = "dense",
    scaling: Literal["output", "variance", "none"] = "output",
    cap: float = 0.95,
    only: Only | None = None,
    recalibrate: bool = True,
    out: Path | str | None = None,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, Report]:
    """Prune a trained network in one shot.

    Args:
        model: any module in evaluation mode, in float32 or float64; left as it was.
        batches: unlabelled calibration batches: tensors, `(images, labels)` pairs (labels ignored) or mappings of
            keyword inputs. Read once and kept. The last of the largest (or an eighth of the last, with fewer than four) is
            held back: each layer keeps the weight that is best there.
        pattern: for all layers, by layer name, or a function of name and module that may return None for dense. An
            `Unstructured` given alone is one exact budget over the prunable weights. None with masks from elsewhere.
        select: a rule, masks by layer name (bool, weight.shape), or a network that is already pruned. By default
            ALPS: a mask by ADMM and least squares on it.
        solver: Newton's settings; None keeps what `select` gives.
        horizon: operations matched after each layer; "end" matches up to and with the network's output.
        targets: "dense": what the dense network computes on its own; "local": what the layer's dense weight computes
            from the pruned network's features, as published.
        scaling: how a matched output's mismatch is measured: "output": by how strongly the network's output feels it,
            channel by channel (one backward pass of the dense network); "variance": divided by the variance;
            "none": as it is, as published.
        cap: the largest share a layer may lose under an `Unstructured` budget.
        only: which layers to prune; by default all that run but the first and the last.
        recalibrate: correct the statistics of BatchNorm at the end by how far pruning moved them.
        out: a folder; every finished layer is saved there at once.
        resume: go on with the run in `out`.
        seed: of all that is random.
        progress: show a progress bar.

    Returns:
        The pruned copy, of the same class and with the same `state_dict` keys, and the report.

    Raises:
        ValueError: an argument does not fit; the sentence says which, and what to do.
    """
    _check_model(model)
    _check_settings(solver, horizon, targets, scaling, cap, out, resume, seed)
    inputs = _read_batches(batches)
    masks, starts = _given(model, select, pattern)
    dense, sparse = _working_copy(model), _working_copy(model)
    _check_weights(sparse)
    device = next(sparse.parameters()).device
    inputs = [x.to(device) for x in inputs]
    _prefer_channels_last((sparse, dense), inputs[0])
    order = network.learn_order(sparse, inputs[0])
    _check_forward(sparse, inputs, order)
    report = Report(weights=sum(p.numel() for p in model.parameters()))
    patterns = _assign(sparse, order, pattern, masks, only, report)
    settings = {
        "pattern": {name: str(p) for name, p in patterns.items()} if isinstance(pattern, Mapping) or callable(pattern) else str(pattern),
        "select": _name(select), "solver": str(solver), "horizon": horizon, "targets": targets, "scaling": scaling,
        "cap": cap, "recalibrate": recalibrate, "seed": seed, "layers": list(patterns),
    }
    report.settings = settings
    if isinstance(pattern, Unstructured) and not masks:
        patterns = _budget(dense, patterns, pattern, cap)
    run = Run.open(Path(out), settings, model, inputs, masks, starts, resume) if out is not None else None
    layers = network.prunable(sparse)
    walk = _Walk(dense, sparse, order, inputs, solver, horizon, targets, scaling, seed)
    chooser = select if not masks else None
    with _progress(progress, len(patterns)) as tell:
        for index, (name, layer_pattern) in enumerate(patterns.items()):
            finished = run.finished(index, layers[name].weight.shape) if run else None
            if finished is None:
                start = MaskedWeight(starts[name].to(device), masks[name].to(device)) if masks else None
                masked, layer_report = walk.layer(index, name, layer_pattern, chooser, start, tell)
                if run:
                    run.keep(index, masked, layer_report)
            else:
                masked, layer_report = finished
                masked = MaskedWeight(*(x.to(device) for x in masked))
            with torch.no_grad():
                layers[name].weight.copy_(masked.weight)
            walk.masks[name] = masked.mask
            report.layers = [layer_report if x.name == name else x for x in report.layers]
            if layer_report.stop.startswith("a number stopped"):
                report.notes.append(f"{name}: numbers stopped being finite; it keeps the best weight found before.")
            tell.done(name)
    if recalibrate:
        recalibrate_statistics(sparse, dense, inputs)
    sparse.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    network.close_attention(sparse)
    for name, module in network.prunable(model).items():  # as it lay
        weight: Any = sparse.get_submodule(name).weight
        weight.data = torch.empty_like(module.weight).copy_(weight.data)
    for name, module in network.prunable(model).items():
        if torch_prune.is_pruned(module):  # same keys as the network that came in
            torch_prune.custom_from_mask(sparse.get_submodule(name), "weight", walk.masks[name])
    if run:
        run.finish(sparse, walk.masks, report)
    return sparse, report


# ---------------------------------------------------------------- the walk


class _Walk:
    """Both streams through the network, and what is done at a layer."""

    def __init__(self, dense: nn.Module, sparse: nn.Module, order: Order, inputs: Sequence[Inputs], solver: Newton | None,
                 horizon: int | Literal["end"], targets: str, scaling: str, seed: int) -> None:
        self.solver, self.horizon, self.targets, self.scaling, self.seed = solver, horizon, targets, scaling, seed
        training, held = _hold_back(inputs)
        self.training = len(training)
        self.judge = self.training if held is not None else 0  # the batch to judge by
        batches = [*training, *([held] if held else [])]
        self.probe = _split(max(batches, key=_size), 64)[0]
        self.dense_net, self.sparse_net = dense, sparse
        changed: set[tuple[str, int]] = set()  # one for both: what is learnt on one network holds for its twin
        plans = Plan(dense, order, changed), Plan(sparse, order, changed)
        self.dense = [Stream(plans[0], x) for x in batches]
        self.sparse = [Stream(plans[1], x) for x in batches]
        self.masks: dict[str, Tensor] = {}

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Of the dense network, on a few dozen samples."""
        return Sensitivities(self.dense_net, self.probe, torch.Generator().manual_seed(self.seed))

    def layer(self, index: int, name: str, pattern: Pattern | None, select: Any, start: MaskedWeight | None,
              tell: _Tell) -> tuple[MaskedWeight, LayerReport]:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        calls = [stream.advance(name) for stream in self.sparse]
        dense_calls = [stream.advance(name) for stream in self.dense]
        for call in calls:
            if not call.x.sum().isfinite():  # one pass; isfinite().all() takes twenty times as long
                raise ValueError(f"{name}: its inputs are not finite; check the weights before it and the images")
        module: Any = self.sparse_net.get_submodule(name)
        weight = module.weight.detach().clone()
        losses = _Losses(self, name, weight)
        statistics = LayerStatistics(calls[: self.training], dense_calls[: self.training],
                                     lambda: losses.sensitivity(network.groups_of(module)))
        masked = start if start is not None else _selected(select, name, weight, statistics, pattern)
        if self.solver is None:
            fit = Fit(masked, [], math.nan, math.nan)
        else:
            factors = Factors(statistics.gram, statistics.sensitivity) if self.solver.preconditioner != "none" else None
            fit = self.solver.solve(losses, masked, held=losses.held, factors=factors, generator=generator,
                                    tell=partial(tell.step, name))
        report = LayerReport(
            name=name, shape=tuple(weight.shape), pattern=str(pattern) if pattern else "mask", kept=int(masked.mask.sum()),
            before=fit.before, after=fit.after, iterations=sum(s.iterations for s in fit.steps), steps=len(fit.steps),
            stop=fit.steps[-1].stop.value if fit.steps else "", seconds=time.perf_counter() - began,
        )
        return fit.masked, report


def _allows(pattern: Pattern, mask: Tensor) -> bool:
    return bool((pattern.mask(mask.float()) | ~mask).all())


def _selected(select: Any, name: str, weight: Tensor, statistics: LayerStatistics, pattern: Pattern | None) -> MaskedWeight:
    found = select(weight, statistics, pattern)
    shape, wanted = tuple(weight.shape), (weight.dtype, torch.bool)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
        raise TypeError(f"prune: expected select to return a snows.sparsity.MaskedWeight for {name}, got a {type(found).__name__}")
    for what, tensor, dtype in zip(("weight", "mask"), found, wanted, strict=True):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"prune: expected the {what} that select returns for {name} to be {dtype} of {shape}, "
                             f"got {tensor.dtype} of {tuple(tensor.shape)}")
    if pattern is not None and not _allows(pattern, found[1]):
        raise ValueError(f"prune: the mask that select returns for {name} keeps more than the pattern {pattern} allows")
    return MaskedWeight(found[0].masked_fill(~found[1], 0), found[1])


class _Losses:
    """One reconstruction a batch, each with its targets made when it is used and dropped after; all in the same metrics."""

    def __init__(self, walk: _Walk, layer: str, weight: Tensor) -> None:
        self.walk, self.layer, self.weight = walk, layer, weight
        self.metrics: list[Metric] | None = None

    @cached_property
    def horizon(self) -> Horizon:
        return Horizon(self.walk.sparse_net, self.layer, self.walk.horizon, self.walk.sparse[0])

    def sensitivity(self, groups: int) -> Tensor:
        """Of the network's output to the layer's, per group: (groups, out / groups, out / groups)."""
        out = len(self.weight)
        felt = self.walk.sensitivities.of(self.layer, [0])
        return felt[0].matrix(out, groups) if felt else torch.eye(out // groups).to(self.weight).repeat(groups, 1, 1)

    @cached_property
    def held(self) -> Reconstruction:
        """Of the samples to judge by; of the first batch where none are held back."""
        return self.at(self.walk.judge)

    def at(self, batch: int) -> Reconstruction:
        walk = self.walk
        source = walk.dense[batch] if walk.targets == "dense" else walk.sparse[batch]
        with torch.no_grad():
            targets = self.horizon.outputs(self.weight, source)
        if self.metrics is None:  # of the first batch that is asked for, so that all agree
            felt = walk.sensitivities.of(self.layer, self.horizon.counted) if walk.scaling == "output" else []
            self.metrics = felt + [Metric.plain(y, "none" if walk.scaling == "none" else "variance") for y in targets[len(felt):]]
        return Reconstruction(self.horizon, walk.sparse[batch], targets, self.metrics)

    def __len__(self) -> int:
        return self.walk.training

    def __iter__(self) -> Iterator[Reconstruction]:
        return (self.at(batch) for batch in range(len(self)))


def recalibrate_statistics(sparse: nn.Module, dense: nn.Module, inputs: Sequence[Inputs]) -> None:
    """Correct the statistics of every BatchNorm by how far pruning moved them, in place.

    Each BatchNorm's running mean moves by the difference of its input's means in the pruned and in the dense network,
    its variance by their ratio, both over all calibration images. So a network that was not pruned stays as it is, and
    images that differ from those of training (without their augmentation, say) do no harm; where they do not differ
    this is the usual re-estimation. One pass each; in the pruned network each BatchNorm normalises with what it sees.

    Args:
        sparse: the pruned network, in evaluation mode.
        dense: the dense network with the same BatchNorms.
        inputs: the calibration batches.
    """
    own = {name: m for name, m in sparse.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    theirs = {name: dense.get_submodule(name) for name in own}
    if not own:
        return
    totals = {name: [_Moments(), _Moments()] for name in own}
    origin = {name: (m.running_mean.clone(), m.running_var.clone()) for name, m in own.items()}  # type: ignore[union-attr]
    seen: dict[str, list[_Moments]] = {}

    def set_statistics(name: str, before: _Moments, after: _Moments) -> None:
        mean, var = origin[name]
        own[name].running_mean.copy_(mean + after.mean - before.mean)  # type: ignore[union-attr]
        own[name].running_var.copy_(var * (after.var + own[name].eps) / (before.var + own[name].eps))  # type: ignore[union-attr]

    def watch_dense(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[name].append(_Moments.of(args[0]))

    def watch_sparse(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        before, after = seen[name].pop(0), _Moments.of(args[0])
        set_statistics(name, before, after)  # what comes after is to see it as it will be
        totals[name][0].add(before)
        totals[name][1].add(after)

    hooks = [m.register_forward_pre_hook(partial(watch_dense, name)) for name, m in theirs.items()]
    hooks += [m.register_forward_pre_hook(partial(watch_sparse, name)) for name, m in own.items()]
    try:
        with torch.no_grad(), network.plain_forward():
            for x in inputs:
                seen.update({name: [] for name in own})
                dense(*x.args, **x.kwargs)
                sparse(*x.args, **x.kwargs)
            for name, (before, after) in totals.items():
                if before.count:
                    set_statistics(name, before, after)
    finally:
        for hook in hooks:
            hook.remove()


class _Moments:
    """Mean and mean square per channel, pooled over batches in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Of a BatchNorm's input, (B, C, ...)."""
        moments, x = cls(), x.detach()
        corner = (slice(1), slice(None), *(slice(1) for _ in range(2, x.ndim)))
        origin = x[corner]  # subtracted, so that a constant channel varies by nothing
        mean, var = (m.double() for m in torch.ops.aten.batch_norm_update_stats(x - origin, None, None, 0.0))
        moments.count, moments.mean = x.numel() // x.shape[1], origin.flatten().double() + mean
        moments.square = var + moments.mean.square()
        return moments

    @property
    def var(self) -> Tensor:
        return self.square - self.mean.square()

    def add(self, other: _Moments) -> None:
        total = self.count + other.count
        self.mean = (self.count * self.mean + other.count * other.mean) / total
        self.square = (self.count * self.square + other.count * other.square) / total
        self.count = total


# ---------------------------------------------------------------- what comes in


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune: expected an nn.Module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("prune: expected a model as it was before torch.compile; pass model._orig_mod, and compile what comes back")
    if torch.is_inference_mode_enabled():
        raise ValueError("prune: expected to be called outside torch.inference_mode(), where nothing can be differentiated")
    if any(m.training for m in model.modules()):
        raise ValueError("prune: expected a model in evaluation mode, got one in training mode; call model.eval() first")
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear | SparseConv2d):
            raise ValueError(f"prune: expected dense weights, but {name} is packed already; prune the network it was made from")
    if next(model.parameters(), None) is None:
        raise ValueError("prune: expected a model with weights, got one without parameters")
    for name, p in model.named_parameters():
        if p.is_meta:
            raise ValueError(f"prune: expected weights with values, got {name} on the meta device; load the weights first")
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"prune: expected float32 or float64 weights, got {name} in {p.dtype}; call model.float() first")


def _check_settings(solver: Any, horizon: Any, targets: Any, scaling: Any, cap: Any, out: Any, resume: Any, seed: Any) -> None:
    if solver is not None and not isinstance(solver, Newton):
        raise TypeError(f"prune: expected solver to be a snows.Newton or None, got {solver!r}")
    if horizon != "end" and not (isinstance(horizon, int) and horizon >= 0):
        raise ValueError(f'prune: expected horizon to be a whole number of at least 0, or "end", got {horizon!r}')
    for name, value, allowed in (("targets", targets, ("dense", "local")), ("scaling", scaling, ("output", "variance", "none"))):
        if value not in allowed:
            raise ValueError(f"prune: expected {name} to be one of {', '.join(allowed)}, got {value!r}")
    if not (isinstance(cap, int | float) and 0 < cap <= 1):
        raise ValueError(f"prune: expected cap to be above 0 and at most 1, got {cap!r}")
    if resume and out is None:
        raise ValueError("prune: resume=True needs out=, the folder of the run to go on with")
    if not (isinstance(seed, int) and seed >= 0):
        raise ValueError(f"prune: expected seed to be a whole number of at least 0, got {seed!r}")


def _check_weights(net: nn.Module) -> None:
    owners: dict[int, str] = {}
    for name, module in network.prunable(net).items():
        weight: Any = module.weight
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"prune: expected {name}.weight to be a plain parameter, got one computed by a parametrisation; "
                             "remove it first (torch.nn.utils.parametrize.remove_parametrizations)")
        if id(weight) in owners:
            raise ValueError(f"prune: {owners[id(weight)]} and {name} share one weight; give each its own, or exclude "
                             "such networks")
        owners[id(weight)] = name
        if not weight.isfinite().all():
            raise ValueError(f"prune: expected finite weights, got NaN or infinity in {name}.weight")


def _read_batches(batches: Iterable[Any]) -> list[Inputs]:
    if isinstance(batches, Tensor | Mapping | str):
        raise ValueError(f"prune: expected an iterable of batches, got a {type(batches).__name__}; wrap one batch in a list")
    inputs = [network.as_inputs(batch) for batch in batches]
    if not inputs:
        raise ValueError("prune: expected at least one batch of calibration images, got none")
    for i, x in enumerate(inputs):
        for tensor in x.tensors():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"prune: expected finite inputs, got NaN or infinity in batch {i}")
            if tensor.ndim == 0 or len(tensor) == 0:
                raise ValueError(f"prune: expected batches of at least one sample, got an empty tensor in batch {i}")
    return inputs


def _check_forward(net: nn.Module, inputs: Sequence[Inputs], order: Order) -> None:
    first = network.output_tensors(order.output)
    with torch.no_grad(), network.plain_forward():
        second = network.output_tensors(net(*inputs[0].args, **inputs[0].kwargs))
    for a, b in zip(first, second, strict=True):
        if not a.isfinite().all():
            raise ValueError("prune: the dense network's output is not finite on the first batch; check weights and images")
        if not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item()):
            raise ValueError("prune: expected a deterministic model, got two different outputs for the first batch; is "
                             "dropout active, or something random in forward?")
    seen: set[tuple[tuple[torch.dtype, torch.Size], ...]] = set()
    for x in inputs:  # of each kind one
        kind = tuple((t.dtype, t.shape[1:]) for t in x.tensors())
        if kind not in seen and seen:
            with torch.no_grad(), network.plain_forward():
                network.output_of(net, x)
        seen.add(kind)


def _working_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights are plain parameters and whose attention is open; masks of `torch.nn.utils.prune` come off."""
    copied = network.copied(model)
    for module in network.prunable(copied).values():
        if torch_prune.is_pruned(module) and hasattr(module, "weight_orig"):
            original = module.get_parameter("weight_orig").detach().clone()
            torch_prune.remove(module, "weight")
            module.weight.data.copy_(original)
    network.open_attention(copied)
    return copied


def _prefer_channels_last(nets: Sequence[nn.Module], inputs: Inputs) -> None:
    """Lay convolutions out channels-last, up to three times faster on a CPU, unless the network cannot run that way."""
    try:
        for net in nets:
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            nets[0](*inputs.args, **inputs.kwargs)
    except RuntimeError:  # a view that needs the other layout
        for net in nets:
            net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _given(model: nn.Module, select: Any, pattern: PatternChoice) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and start weights from elsewhere, by layer; empty when `select` is a rule."""
    pruned = [name for name, m in network.prunable(model).items() if torch_prune.is_pruned(m)]
    if pattern is not None and not (isinstance(pattern, Pattern | Mapping) or callable(pattern)):
        raise TypeError(f"prune: expected a pattern such as snows.NM(2, 4) or snows.Unstructured(0.7), got {pattern!r}; "
                        "snows.parse_pattern reads texts")
    if not isinstance(select, Mapping | nn.Module):
        if not callable(select):
            raise TypeError(f"prune: expected select to be a rule, masks by layer name, or a pruned network, got {type(select).__name__}")
        if pruned:
            raise ValueError(f"prune: {pruned[0]} carries a mask of torch.nn.utils.prune; pass select=model to keep the masks, "
                             "or remove them first (torch.nn.utils.prune.remove)")
        if pattern is None:
            raise ValueError("prune: expected a pattern such as NM(2, 4) or Unstructured(0.7), got None without masks")
        return {}, {}
    opened = _working_copy(model)
    layers = network.prunable(opened)
    if isinstance(select, nn.Module):
        closed = network.copied(select)
        masks = network.bake_masks(closed)
        network.open_attention(closed)
        sources = network.prunable(closed)
        if sources.keys() != layers.keys():
            raise ValueError("prune: expected select to be a pruned copy of the model, got a network with other layers: "
                             f"{sorted(sources.keys() ^ layers.keys())[:5]}")
        for name, module in sources.items():
            masks.setdefault(name, module.weight.detach() != 0)
        masks = {name: mask for name, mask in masks.items() if not mask.all()}
        starts = {name: sources[name].weight.detach() for name in masks}
    else:
        masks, starts = dict(select), {}
        for name in masks:
            if name not in layers:
                raise ValueError(f"prune: expected masks for layers of the model, got one for {name!r}; the layers are "
                                 f"{', '.join(list(layers)[:8])}, ...")
            starts[name] = layers[name].weight.detach()
    for name, mask in masks.items():
        shape = tuple(layers[name].weight.shape)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            got = f"{mask.dtype} of {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"prune: expected the mask of {name} to be torch.bool of {shape}, got {got}")
        starts[name] = (starts[name] * mask.to(starts[name].device)).clone()
    if not masks:
        raise ValueError("prune: expected select to hold masks, got none; a pruned network needs zeros in its weights")
    return masks, starts


def _assign(net: nn.Module, order: Order, pattern: PatternChoice, masks: Mapping[str, Tensor], only: Only | None,
            report: Report) -> dict[str, Pattern | None]:
    """The pattern of each layer to prune, in order of execution; the report gets a line for every layer."""
    layers = network.prunable(net)
    if isinstance(pattern, Mapping) and (unknown := [name for name in pattern if name not in layers]):
        raise ValueError(f"prune: expected patterns for layers of the model, got one for {unknown[0]!r}")
    ends = {order.layers[0], order.layers[-1]} if len(order.layers) > 2 else set()
    chosen: dict[str, Pattern | None] = {}
    for name in [*order.layers, *(n for n in layers if n not in order.calls)]:
        module: Any = layers[name]
        shape = module.weight.shape
        wanted: Pattern | None
        if isinstance(pattern, Mapping):
            wanted = pattern.get(name)
        elif pattern is None or isinstance(pattern, Pattern):
            wanted = pattern
        else:
            wanted = pattern(name, module)
        if wanted is not None and not isinstance(wanted, Pattern):
            raise TypeError(f"prune: expected a pattern such as snows.NM(2, 4) for {name}, got {wanted!r}")
        explicit = name in masks or (isinstance(pattern, Mapping) and name in pattern)
        reason = ""
        if name not in order.calls:
            reason = "never runs"
        elif masks and name not in masks:
            reason = "no mask given"
        elif wanted is None and not masks:
            reason = "no pattern given"
        elif only is not None and not only(name, module):
            reason = "excluded"
        elif only is None and not explicit and name in ends:
            reason = "first layer" if name == order.layers[0] else "last layer"
        elif not masks and wanted is not None and not wanted.fits(shape):
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1 and shape[1] == 1
            reason = "depthwise" if depthwise else f"{shape[1]} input channels do not divide into groups of {getattr(wanted, 'm', '?')}"
        elif order.calls[name] > 1:
            raise ValueError(f"prune: {name} is called {order.calls[name]} times in one forward pass; such a layer cannot be "
                             "pruned yet, exclude it with only=lambda name, module: ...")
        elif masks and wanted is not None and not _allows(wanted, masks[name]):
            raise ValueError(f"prune: the mask of {name} keeps more than the pattern {wanted} allows")
        if not reason:
            chosen[name] = wanted
        report.layers.append(LayerReport(name, tuple(shape), "dense" if reason else str(wanted or "mask"), shape.numel(), reason))
    if not chosen:
        telling = [x for x in report.layers if x.reason not in ("no pattern given", "no mask given")] or report.layers
        reasons = "; ".join(f"{x.name}: {x.reason}" for x in telling[:4])
        raise ValueError(f"prune: no layer is left to prune ({reasons or 'the model has no Linear or Conv2d that runs'})")
    return chosen


def _budget(net: nn.Module, patterns: Mapping[str, Pattern | None], budget: Unstructured, cap: float) -> dict[str, Pattern | None]:
    """Spend an `Unstructured` budget over the layers by ``|W| sqrt(sqrt(groups) / rms(W))``.

    Half-way, in the logarithm, between the global magnitude ranking and one where a weight counts by its layer's rms and, in a
    grouped convolution, by its share of the output, which `groups` times fewer weights make; and better than both.
    """
    layers = network.prunable(net)
    scores = {}
    for name in patterns:
        weight = layers[name].weight.detach()
        rms = weight.square().mean().sqrt().clamp_min(1e-30)
        scores[name] = weight.abs() * (network.groups_of(layers[name]) ** 0.5 / rms).sqrt()
    counts = allocate(scores, budget.sparsity, cap)
    shares = {name: counts[name] / score.numel() for name, score in scores.items()}
    if not any(shares.values()):
        raise ValueError(f"prune: a sparsity of {budget.sparsity:g} removes none of {sum(s.numel() for s in scores.values())} weights; raise it")
    return {name: Unstructured(share) for name, share in shares.items() if share > 0}


def _hold_back(inputs: Sequence[Inputs]) -> tuple[list[Inputs], Inputs | None]:
    """The batches to fit, and the samples to judge by: the last of the largest batches, or an eighth of the last with fewer than four."""
    if len(inputs) >= 4:
        judge = max(range(len(inputs)), key=lambda i: (_size(inputs[i]), i))
        return [x for i, x in enumerate(inputs) if i != judge], inputs[judge]
    size = _size(inputs[-1])
    parts = _split(inputs[-1], size - max(1, size // 8))
    return ([*inputs[:-1], parts[0]], parts[1]) if len(parts) > 1 else (list(inputs), None)


def _size(x: Inputs) -> int:
    return len(x.tensors()[0])


def _split(x: Inputs, size: int) -> list[Inputs]:
    """A batch in parts of `size` samples; whole if its tensors do not agree on how many there are."""
    count = _size(x)
    if size < 1 or any(len(t) != count for t in x.tensors()):
        return [x]
    return [Inputs(*tree_map(lambda t, i=i: t[i : i + size] if isinstance(t, Tensor) else t, tuple(x))) for i in range(0, count, size)]


def _name(select: Any) -> str:
    if isinstance(select, partial):
        settings = ", ".join(f"{k}={_name(v) if callable(v) else v!r}" for k, v in select.keywords.items())
        return f"{_name(select.func)}({settings})"
    if isinstance(select, Mapping | nn.Module):
        return "masks"
    return getattr(select, "__name__", type(select).__name__)


class _Tell:
    """The progress bar: layer, step, loss, time left."""

    def __init__(self, bar: Progress, task: Any) -> None:
        self.bar, self.task, self.name, self.steps = bar, task, "", 0

    def step(self, name: str, step: Step) -> None:
        self.steps = self.steps + 1 if name == self.name else 1
        self.name = name
        self.bar.update(self.task, description=f"{name} step {self.steps}: loss {step.before:.4g} -> {step.after:.4g}")

    def done(self, name: str) -> None:
        self.bar.update(self.task, advance=1, description=name)


class _progress:  # noqa: N801 - reads as a verb where it is used
    def __init__(self, show: bool, total: int) -> None:
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            console=Console(stderr=True), disable=not show, transient=True)
        self.total = total

    def __enter__(self) -> _Tell:
        self.bar.start()
        return _Tell(self.bar, self.bar.add_task("", total=self.total))

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
