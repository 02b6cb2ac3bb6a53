"""The table of an ablation as HTML, Markdown, LaTeX, CSV and JSON."""

from typing import TYPE_CHECKING

from snapgen.lazy import lazy_exports

if TYPE_CHECKING:
    from archsearch.reports.ablation.report import write_ablation as write_ablation
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
