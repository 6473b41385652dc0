"""The plan: which layers are pruned, each by which rule and pattern, and why the others stay dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from snows.choosing.goals import Choosing, Given, Only, PatternChoice, ends, excluded, given, unfit
from snows.choosing.zeros import spend
from snows.matching.statistics import Selector
from snows.networks.layers import prunable
from snows.networks.masks import kept_mask
from snows.networks.twins import Twins
from snows.results.report import SPARED, LayerReport
from snows.sparsity import MaskedWeight, Pattern, Unstructured


@dataclass(frozen=True)
class LayerPlan:
    """Say how one layer is pruned.

    Attributes:
        select: gives the mask and the first weight; None where the layer is fitted anew on the mask it has.
        pattern: that the mask obeys; None where the mask came from elsewhere without one.
        start: mask and first weight from elsewhere; None for a rule.
    """

    select: Any
    pattern: Pattern | None
    start: MaskedWeight | None = None


@dataclass
class Plan:
    """Hold what was decided before anything is fitted.

    Attributes:
        choices: by layer, in order of execution.
        rows: a line for each layer of the network, as it will be reported; those of the chosen layers are
            replaced by fits.
        patterns: as they were asked, for the record of a run.
    """

    choices: dict[str, LayerPlan]
    rows: list[LayerReport] = field(default_factory=list)
    patterns: dict[str, str] = field(default_factory=dict)

    def over(self, other: Plan) -> Plan:
        """Return a plan of all layers of this one, in its order, in which the choices of another come first.

        Args:
            other: of the same network, with a line for each layer.
        """
        order = [x.name for x in other.rows if x.name in {**self.choices, **other.choices}]
        rows = {x.name: x for x in self.rows}
        return Plan(
            {name: {**self.choices, **other.choices}[name] for name in order},
            [x if x.name in other.choices else rows.get(x.name, x) for x in other.rows],
            other.patterns,
        )

    def starts(self) -> dict[str, MaskedWeight]:
        """Return masks and first weights from elsewhere, by layer."""
        return {name: choice.start for name, choice in self.choices.items() if choice.start is not None}


def decide(
    twins: Twins, pattern: PatternChoice, select: Choosing, only: Only | None, skip: Only | None, cap: float
) -> Plan:
    """Decide which layers are pruned, and how.

    Args:
        twins: the networks.
        pattern: for all layers, by layer name, or a function of name and module that may return None for
            dense.
        select: a rule, masks by layer name, or a pruned network.
        only: which layers to prune; by default all that run but the first and the last.
        skip: which of those to leave alone.
        cap: the largest share that a layer may lose under an `Unstructured` budget.

    Raises:
        TypeError: what stands for a layer's pattern is none.
        ValueError: a layer cannot be pruned as asked, or none is left to prune.
    """
    starts = given(twins, select)
    deciding = _Deciding(twins, pattern, starts, only, skip)
    reasons = {name: deciding.reason(name) for name in deciding.names}
    chosen = {name: deciding.wanted(name) for name, reason in reasons.items() if not reason}
    plan = Plan({}, [deciding.row(name, reason) for name, reason in reasons.items()] + _left_alone(twins))
    if not chosen:
        telling = [x for x in plan.rows if x.reason not in (NO_PATTERN, NO_MASK, EXCLUDED)] or plan.rows
        said = "; ".join(f"{x.name}: {x.reason}" for x in telling[:4])
        raise ValueError(
            f"prune: no layer is left to prune ({said or 'the model has no Linear or Conv2d that runs'})"
        )
    plan.patterns = {name: str(x) for name, x in chosen.items()}
    if isinstance(pattern, Unstructured) and not starts:
        layers = prunable(twins.sparse)
        budget = spend({name: layers[name] for name in chosen}, pattern, cap)
        plan.rows = [
            x if x.reason or x.name in budget else replace(x, pattern="dense", kept=x.size, reason=SPARED)
            for x in plan.rows
        ]
        chosen = dict(budget)
    kept = twins.mask_unchosen(chosen)
    plan.rows = [replace(x, kept=kept.get(x.name, x.kept)) for x in plan.rows]
    if filled := [name for name in chosen if name not in starts and _zeros(twins, name) > MANY_ZEROS]:
        twins.notes.append(
            f"{len(filled)} of the pruned layers were sparse before, {filled[0]} for one, and their zeros "
            "are not kept; prune(model, batches, None, select=model) keeps them."
        )
    for name, wanted in chosen.items():
        start = starts.get(name)
        plan.choices[name] = LayerPlan(Given(start) if start is not None else select, wanted, start)
    return plan


MANY_ZEROS = 0.1  # of a trained layer's weights: more were put there


def _zeros(twins: Twins, name: str) -> float:
    weight = prunable(twins.dense)[twins.reduction.source(name)].weight
    return float((weight == 0).double().mean())


NO_PATTERN, NO_MASK, EXCLUDED = "no pattern given", "no mask given", "excluded"


class _Deciding:
    """Ask of each layer whether it is pruned."""

    def __init__(
        self,
        twins: Twins,
        pattern: PatternChoice,
        starts: Mapping[str, MaskedWeight],
        only: Only | None,
        skip: Only | None,
    ) -> None:
        self.twins, self.pattern, self.starts, self.only, self.skip = twins, pattern, starts, only, skip
        self.layers: dict[str, Any] = dict(prunable(twins.sparse))
        if isinstance(pattern, Mapping) and (
            unknown := [name for name in pattern if name not in self.layers]
        ):
            raise ValueError(f"prune: expected patterns for layers of the model, got one for {unknown[0]!r}")
        order = twins.order
        self.names = [*order, *(name for name in self.layers if name not in order)]
        self.ends = ends(twins)
        self.unfit = unfit(twins)
        self._wanted: dict[str, Pattern | None] = {}

    def wanted(self, name: str) -> Pattern | None:
        """Return the pattern that is asked for a layer."""
        if name not in self._wanted:
            found: Any
            if isinstance(self.pattern, Mapping):
                found = self.pattern.get(name)
            elif self.pattern is None or isinstance(self.pattern, Pattern):
                found = self.pattern
            else:
                found = self.pattern(name, self.layers[name])
            if found is not None and not isinstance(found, Pattern):
                raise TypeError(f"prune: expected a pattern such as snows.NM(2, 4) for {name}, got {found!r}")
            self._wanted[name] = found
        return self._wanted[name]

    def reason(self, name: str) -> str:
        """Say why a layer stays dense; empty if it is pruned.

        Raises:
            ValueError: it is named among patterns or masks, and cannot be pruned.
        """
        module, wanted = self.layers[name], self.wanted(name)
        if excluded(name, module, self.only, self.skip):
            return EXCLUDED
        if self.starts and name not in self.starts:
            return NO_MASK
        if wanted is None and not self.starts:
            return NO_PATTERN
        explicit = name in self.starts or (isinstance(self.pattern, Mapping) and name in self.pattern)
        if why := self.unfit.get(name):
            if explicit:
                raise ValueError(f"prune: {name} cannot be pruned ({why}); leave it out, or name it in skip")
            return why
        if name not in self.twins.calls:
            return "its weight is computed before use" if self.twins.trace.called[name] else "never runs"
        if self.only is None and not explicit and name in self.ends:
            return self.ends[name]
        if not self.starts and wanted is not None and (why := wanted.fits(module.weight.shape)):
            depthwise = isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] == 1
            return "depthwise" if depthwise else why
        if self.starts and wanted is not None and not allows(wanted, self.starts[name].mask):
            raise ValueError(f"prune: the mask of {name} keeps more than the pattern {wanted} allows")
        return ""

    def row(self, name: str, reason: str) -> LayerReport:
        """Begin a layer's line of the report."""
        shape = tuple(self.layers[name].weight.shape)
        pattern = "dense" if reason else str(self.wanted(name) or "mask")
        mask = kept_mask(self.layers[name])
        kept = int(mask.sum()) if reason and mask is not None else math.prod(shape)
        return LayerReport(name, shape, pattern, kept, reason)


def _left_alone(twins: Twins) -> list[LayerReport]:
    """List what is not pruned although a reader will look for it: other convolutions, and bare parameters."""
    layers, rows = prunable(twins.sparse), []
    for name, other in twins.sparse.named_modules():
        if isinstance(other, _ConvNd) and name not in layers:
            shape = tuple(other.weight.shape)
            reason = f"a {type(other).__name__}: only Linear and Conv2d are pruned"
            rows.append(LayerReport(name, shape, "dense", math.prod(shape), reason))
    for name, shape in twins.trace.bare.items():
        reason = "a parameter used by a function: only Linear and Conv2d modules are pruned"
        rows.append(LayerReport(name, shape, "dense", math.prod(shape), reason))
    return rows


def allows(pattern: Pattern, mask: Tensor) -> bool:
    """Say whether a mask keeps no more than a pattern allows."""
    return bool((pattern.mask(mask.float()) | ~mask).all())


def checked(select: Selector, name: str, found: Any, weight: Tensor, pattern: Pattern | None) -> MaskedWeight:
    """Check what a rule returned for a layer, and make the weight zero off the mask.

    Raises:
        TypeError: it is no masked weight.
        ValueError: dtypes or shapes are not the weight's, or the mask keeps more than the pattern allows.
    """
    shape, dtypes = tuple(weight.shape), (weight.dtype, torch.bool)
    if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(t, Tensor) for t in found)):
        raise TypeError(
            f"prune: expected select to return a snows.sparsity.MaskedWeight for {name}, got a "
            f"{type(found).__name__}"
        )
    for what, tensor, dtype in zip(("weight", "mask"), found, dtypes, strict=True):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"prune: expected the {what} that select returns for {name} to be {dtype} of {shape}, "
                f"got {tensor.dtype} of {tuple(tensor.shape)}"
            )
    if pattern is not None and not isinstance(select, Given) and not allows(pattern, found[1]):
        raise ValueError(
            f"prune: the mask that select returns for {name} keeps more than the pattern {pattern} allows"
        )
    return MaskedWeight(found[0].masked_fill(~found[1], 0), found[1])
