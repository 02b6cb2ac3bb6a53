"""Evolve one network block by block."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.evolution.run import evolve as evolve
    from archsearch.studies.storage.rounds import BlockImportance as BlockImportance, EvolutionRound as EvolutionRound
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
