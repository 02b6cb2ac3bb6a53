"""The section of a study's report on the evolution of a network, round by round."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.evolution.data import Evolution, load_evolution
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["Evolution", "load_evolution"]
