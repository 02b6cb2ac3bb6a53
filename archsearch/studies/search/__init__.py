"""Propose, score, report one candidate after another."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.search.candidates import Recommendation, best, load_candidates
    from archsearch.studies.search.run import search
    from archsearch.studies.search.scorer import ArchsearchScorer, Scorer
    from archsearch.studies.storage.record import Candidate
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["ArchsearchScorer", "Candidate", "Recommendation", "Scorer", "best", "load_candidates", "search"]
