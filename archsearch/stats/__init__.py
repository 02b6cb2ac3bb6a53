"""Statistics: estimates with intervals, rank correlation, regression, Pareto fronts."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.stats.contrasts import SeedTable as SeedTable
    from archsearch.stats.estimate import Estimate as Estimate
    from archsearch.stats.intervals import pool_intervals as pool_intervals, verdict as verdict
    from archsearch.stats.pareto import hypervolume as hypervolume
    from archsearch.stats.rank_correlation import spearman as spearman
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
