"""The HTML page of a study, and its CSV."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.study.audit import write_audit
    from archsearch.reports.study.data import StudyData, load_study_data
else:
    __getattr__, __dir__ = lazy_exports(__name__)

__all__ = ["StudyData", "load_study_data", "write_audit"]
