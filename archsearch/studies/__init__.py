"""Studies: which candidates are scored, in which order and with what budget (search, ablation, evolution, audit)."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.studies.config.study import StudyConfig as StudyConfig, load_config as load_config
    from archsearch.studies.search.candidates import load_candidates as load_candidates
    from archsearch.studies.storage.database import open_study as open_study
    from archsearch.studies.storage.record import Candidate as Candidate
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
