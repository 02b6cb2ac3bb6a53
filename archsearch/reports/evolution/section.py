"""The section of the report on an evolving study: HTML, charts and Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.reports.evolution import baseline, tables as tables_
from archsearch.reports.evolution.baseline import BaselineComparison
from archsearch.reports.evolution.charts import importance_map, path_chart
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study.data import StudyData


@dataclass(frozen=True)
class EvolutionSection:
    """An evolving study, and its comparison with another study, if any."""

    evolution: Evolution
    comparison: BaselineComparison | None

    @classmethod
    def create(cls, evolution: Evolution, compare_with: StudyData | None = None) -> EvolutionSection:
        """Create the section, with a comparison if another study is given."""
        return cls(evolution, baseline.compare(evolution, compare_with) if compare_with else None)

    def html(self) -> str:
        """Render the section as an HTML fragment for the study's page."""
        from archsearch.reports.rendering import html

        table = tables_.load_block_table(self.evolution.study.attrs)
        return html.render_template(
            "evolution.html",
            headline=tables_.headline(self.evolution),
            next=self.evolution.last.round.next,
            has_importance=any(r.round.worths for r in self.evolution.rounds),
            paths=[(f"path-{m}", self.evolution.label(m)) for m in self.evolution.metrics],
            rounds=tables_.rounds(self.evolution),
            counts=tables_.counts(tables_.block_counts(self.evolution)),
            published=tables_.counts(tables_.PUBLISHED_COUNTS),
            check=tables_.check_lines(table) if table else [],
            round_check=tables_.round_check(self.evolution),
            comparison=self.comparison,
        )

    def charts(self) -> dict[str, Figure]:
        """Charts of the section, by the id of the element that each is drawn in."""
        other = self.comparison.baseline if self.comparison and not self.comparison.mismatch else None
        charts = {
            f"path-{m}": path_chart(self.evolution, m, other if m == baseline.METRIC else None)
            for m in self.evolution.metrics
        }
        if any(r.round.worths for r in self.evolution.rounds):
            charts["importance-map"] = importance_map(self.evolution)
        return charts

    def markdown(self) -> str:
        """Format the rounds, block counts, check of the block table and comparison as a Markdown document."""
        lines = [f"# {self.evolution.study.name}", tables_.headline(self.evolution), self.evolution.last.round.next]
        lines += [tables.markdown(*tables_.rounds(self.evolution)), "## Blocks kept", "This study:"]
        lines.append(tables.markdown(*tables_.counts(tables_.block_counts(self.evolution))))
        lines.append("Published, SD-1.5 → SnapFusion (arXiv 2306.00980):")
        lines.append(tables.markdown(*tables_.counts(tables_.PUBLISHED_COUNTS)))
        table = tables_.load_block_table(self.evolution.study.attrs)
        if table:
            lines += ["## The block table", *tables_.check_lines(table), tables_.round_check(self.evolution)]
        if self.comparison:
            lines.append(f"## Compared with {self.comparison.baseline.name}")
            if self.comparison.mismatch:
                lines.append(self.comparison.mismatch)
            else:
                lines += [self.comparison.introduction, tables.markdown(*self.comparison.table)]
                lines.append("\n".join(f"- {line}" for line in self.comparison.remarks))
        return "\n\n".join(line.strip() for line in lines if line) + "\n"
