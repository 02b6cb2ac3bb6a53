"""Propose, score, report one candidate after another."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.search.candidates import (
        Recommendation as Recommendation,
        best as best,
        load_candidates as load_candidates,
    )
    from archsearch.studies.search.run import search as search
    from archsearch.studies.search.scorer import ArchsearchScorer as ArchsearchScorer, Scorer as Scorer
    from archsearch.studies.storage.record import Candidate as Candidate
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
