"""Statistics: estimates with intervals, rank correlation, regression, Pareto fronts."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.stats.estimate import Estimate
    from archsearch.stats.intervals import contrast, pool_intervals, verdict
    from archsearch.stats.pareto import hypervolume
    from archsearch.stats.rank_correlation import spearman
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Estimate", "contrast", "hypervolume", "pool_intervals", "spearman", "verdict"]
