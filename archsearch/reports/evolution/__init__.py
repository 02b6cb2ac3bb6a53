"""The section of a study's report on the evolution of a network, round by round."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.evolution.data import Evolution as Evolution, load_evolution as load_evolution
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
