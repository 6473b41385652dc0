"""`prune`: walk a network layer by layer, choose each mask, re-fit the weights that stay, and keep what was done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from snows import intake, memory, network
from snows.horizon import Horizon, Metric, Reconstruction, Sensitivities
from snows.network import Carried, Inputs, Order, Plan, Stream
from snows.normalisation import recalibrate_statistics
from snows.operators import Factors
from snows.report import SPARED, LayerReport, Report
from snows.run import Run
from snows.selectors import LayerStatistics, Selector, alps
from snows.solvers import Fit, Newton, Step, Stop
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
    intake.check_model("prune", model)
    intake.check_numbers(model)
    _check_settings(solver, horizon, targets, scaling, cap, out, resume, seed)
    inputs = intake.read_batches(batches)
    masks, starts = intake.given_masks(model, select, pattern)
    (dense, _), (sparse, carried) = intake.working_copy(model), intake.working_copy(model)
    device = next(sparse.parameters()).device
    with torch.autocast(device.type, enabled=False):
        first = inputs[0].to(device)
        intake.prefer_channels_last((sparse, dense), first)
        order = network.learn_order(sparse, first)
        intake.check_forward(sparse, inputs, order, device)
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
            report.layers = [x if x.reason or x.name in patterns else _spared(x) for x in report.layers]
        run = Run.open(Path(out), settings, model, inputs, masks, starts, resume) if out is not None else None
        _mask_unchosen(sparse, carried, patterns, report)
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
    _restore_layouts(sparse, model)
    _restore_masks(sparse, carried, walk.masks)
    if run:
        run.finish(sparse, walk.masks, report)
    return sparse, report


def _spared(layer: LayerReport) -> LayerReport:
    return replace(layer, pattern="dense", kept=layer.size, reason=SPARED)


def _mask_unchosen(sparse: nn.Module, carried: Sequence[Carried], chosen: Mapping[str, Any], report: Report) -> None:
    """Leave layers that came with a mask of `torch.nn.utils.prune` and are not pruned as they came: masked."""
    layers = network.prunable(sparse)
    for entry in carried:
        if entry.is_weight and entry.layer in layers and entry.layer not in chosen:
            with torch.no_grad():
                layers[entry.layer].weight.mul_(entry.mask)
            kept = int(entry.mask.sum())
            report.layers = [replace(x, kept=kept) if x.name == entry.layer else x for x in report.layers]


def _restore_layouts(sparse: nn.Module, model: nn.Module) -> None:
    """Give each layer's weight the memory format that it had in the model."""
    for name, module in network.prunable(model).items():
        weight: Any = sparse.get_submodule(name).weight
        weight.data = torch.empty_like(module.weight).copy_(weight.data)


def _restore_masks(sparse: nn.Module, carried: Sequence[Carried], masks: Mapping[str, Tensor]) -> None:
    """Put the parametrisations of `torch.nn.utils.prune` back, so that the result has the keys of the network that came in."""
    for entry in carried:
        new = masks.get(entry.layer) if entry.is_weight else None
        if new is None:
            sparse.get_submodule(entry.module).get_parameter(entry.parameter).data.copy_(entry.original)
        entry.back(sparse, entry.mask if new is None else new)


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
        self.probe = max(batches, key=Inputs.samples).split(64)[0]
        self.dense_net, self.sparse_net = dense, sparse
        changed: set[tuple[str, int]] = set()  # one for both: what is learnt on one network holds for its twin
        plans = Plan(dense, order, changed), Plan(sparse, order, changed)
        self.dense = [Stream(plans[0], x) for x in batches]
        self.sparse = [Stream(plans[1], x) for x in batches]
        self.masks: dict[str, Tensor] = {}

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Of the dense network, on a few dozen samples."""
        device = next(self.dense_net.parameters()).device
        return Sensitivities(self.dense_net, self.probe.to(device), torch.Generator().manual_seed(self.seed))

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
            stop=self._stop(fit), seconds=time.perf_counter() - began,
        )
        return fit.masked, report

    def _stop(self, fit: Fit) -> str:
        """Why the last conjugate gradients ended."""
        if not fit.steps or self.solver is None:
            return ""
        stop = fit.steps[-1].stop
        return f"{self.solver.max_iterations} iterations, as set" if stop is Stop.ITERATIONS else stop.value


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
        return Horizon(self.walk.sparse_net, self.layer, self.walk.horizon, self.walk.sparse[0].on_device())

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
            targets = self.horizon.outputs(self.weight, source.on_device())
        if self.metrics is None:  # of the first batch that is asked for, so that all agree
            felt = walk.sensitivities.of(self.layer, self.horizon.counted) if walk.scaling == "output" else []
            self.metrics = felt + [Metric.plain(y, "none" if walk.scaling == "none" else "variance") for y in targets[len(felt):]]
        return Reconstruction(self.horizon, walk.sparse[batch].on_device(), targets, self.metrics)

    def __len__(self) -> int:
        return self.walk.training

    def __iter__(self) -> Iterator[Reconstruction]:
        return (self.at(batch) for batch in range(len(self)))


# ---------------------------------------------------------------- which layers, and by which pattern


def _assign(net: nn.Module, order: Order, pattern: PatternChoice, masks: Mapping[str, Tensor], only: Only | None,
            report: Report) -> dict[str, Pattern | None]:
    """The pattern of each layer to prune, in order of execution; the report gets a line for every layer."""
    layers = network.prunable(net)
    if isinstance(pattern, Mapping) and (unknown := [name for name in pattern if name not in layers]):
        raise ValueError(f"prune: expected patterns for layers of the model, got one for {unknown[0]!r}")
    ends = {order.layers[0], order.layers[-1]} if len(order.layers) > 2 else set()
    chosen: dict[str, Pattern | None] = {}
    shared = intake.shared_weights(net)
    for name in [*order.layers, *(n for n in layers if n not in order.calls)]:
        module: Any = layers[name]
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
        if only is not None and not only(name, module):
            reason = "excluded"
        elif masks and name not in masks:
            reason = "no mask given"
        elif wanted is None and not masks:
            reason = "no pattern given"
        elif name not in order.calls:
            reason = f"it shares its weight with {shared[name]}" if name in shared else _why_unseen(name, module, order)
        elif only is None and not explicit and name in ends:
            reason = "first layer" if name == order.layers[0] else "last layer"
        elif not masks and wanted is not None and not wanted.fits(module.weight.shape):
            channels = module.weight.shape[1]
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1 and channels == 1
            reason = "depthwise" if depthwise else f"{channels} input channels do not divide into groups of {getattr(wanted, 'm', '?')}"
        elif name in shared:
            raise ValueError(f"prune: {name} and {shared[name]} share one weight; give each its own, or leave both out with only=")
        elif order.calls[name] > 1:
            raise ValueError(f"prune: {name} is called {order.calls[name]} times in one forward pass; such a layer cannot be "
                             "pruned yet, exclude it with only=lambda name, module: ...")
        elif masks and wanted is not None and not _allows(wanted, masks[name]):
            raise ValueError(f"prune: the mask of {name} keeps more than the pattern {wanted} allows")
        if not reason:
            chosen[name] = wanted
        shape = tuple(module.weight.shape)
        report.layers.append(LayerReport(name, shape, "dense" if reason else str(wanted or "mask"), math.prod(shape), reason))
    for name, other in net.named_modules():
        if isinstance(other, _ConvNd) and name not in layers:  # not among what is pruned, but a reader will look for them
            shape = tuple(other.weight.shape)
            report.layers.append(LayerReport(name, shape, "dense", math.prod(shape), f"a {type(other).__name__}: only Linear and Conv2d are pruned"))
    if not chosen:
        telling = [x for x in report.layers if x.reason not in ("no pattern given", "no mask given")] or report.layers
        reasons = "; ".join(f"{x.name}: {x.reason}" for x in telling[:4])
        raise ValueError(f"prune: no layer is left to prune ({reasons or 'the model has no Linear or Conv2d that runs'})")
    return chosen


def _why_unseen(name: str, module: nn.Module, order: Order) -> str:
    """Why no call of a function with this layer's own weight was seen."""
    if how := intake.how_computed(module):
        raise ValueError(f"prune: expected {name}.weight to be a plain parameter, got one computed by {how}, or leave the layer out with only=")
    return "its weight is computed before use" if name in order.entered else "never runs"


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
        judge = max(range(len(inputs)), key=lambda i: (inputs[i].samples(), i))
        return [x for i, x in enumerate(inputs) if i != judge], inputs[judge]
    size = inputs[-1].samples()
    parts = inputs[-1].split(size - max(1, size // 8))
    return ([*inputs[:-1], parts[0]], parts[1]) if len(parts) > 1 else (list(inputs), None)


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
        self.bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                            console=Console(stderr=True), disable=not show, transient=True)
        self.total = total

    def __enter__(self) -> _Tell:
        self.bar.start()
        return _Tell(self.bar, self.bar.add_task("", total=self.total))

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
