"""The HTML page of a study, and its CSV."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.study.audit import write_audit as write_audit
    from archsearch.reports.study.data import StudyData as StudyData, load_study_data as load_study_data
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
