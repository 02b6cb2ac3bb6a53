"""Reports on studies, ablations, evolutions and comparisons of recipes: HTML pages, Markdown, LaTeX and CSV."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.ablation.report import write_ablation as write_ablation
    from archsearch.reports.study.audit import write_audit as write_audit
    from archsearch.reports.study_report import write_report as write_report
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
