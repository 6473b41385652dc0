"""Rules that choose a layer's mask, and the weights that go with it."""

from snows.matching.statistics import LayerStatistics, Selector
from snows.selectors.alps import alps
from snows.selectors.least_squares import least_squares
from snows.selectors.scores import magnitude, wanda
from snows.selectors.sparsegpt import sparsegpt

__all__ = ["LayerStatistics", "Selector", "alps", "least_squares", "magnitude", "sparsegpt", "wanda"]
