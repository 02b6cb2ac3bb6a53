"""The section on an evolving study's page, its charts, and the same as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.reports.evolution import baseline
from archsearch.reports.evolution import tables as tables_
from archsearch.reports.evolution.baseline import BaselineComparison
from archsearch.reports.evolution.charts import path_chart, worth_map
from archsearch.reports.evolution.data import Evolution
from archsearch.reports.rendering import tables
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study.data import StudyData


@dataclass(frozen=True)
class EvolutionSection:
    """An evolving study, and the study that it is shown beside."""

    evolution: Evolution
    rivals: BaselineComparison | None

    @classmethod
    def of(cls, evolution: Evolution, other: StudyData | None = None) -> EvolutionSection:
        """Of a study, with another one beside it or alone."""
        return cls(evolution, baseline.compare(evolution, other) if other else None)

    def html(self) -> str:
        """As the page holds it."""
        from archsearch.reports.rendering import html

        table = tables_.table_of(self.evolution.facts.attrs)
        return html.render_template(
            "evolution.html",
            headline=tables_.headline(self.evolution),
            next=self.evolution.last.round.next,
            valued=any(s.round.worths for s in self.evolution.steps),
            paths=[(f"path-{m}", self.evolution.label(m)) for m in self.evolution.metrics],
            header=tables_.round_header(self.evolution),
            rounds=tables_.round_rows(self.evolution),
            words=tables_.WORDS,
            count_header=tables_.COUNT_COLUMNS,
            counts=tables_.count_rows(tables_.counted(self.evolution)),
            published=tables_.count_rows(tables_.PUBLISHED),
            check=tables_.check_lines(table) if table else [],
            round_check=tables_.round_check(self.evolution),
            rivals=self.rivals,
            rival_header=baseline.COLUMNS,
            rival_rows=baseline.rows(self.rivals) if self.rivals and not self.rivals.refused else [],
            rival_lead=baseline.introduction(self.rivals) if self.rivals and not self.rivals.refused else "",
            rival_words=baseline.WORDS,
        )

    def charts(self) -> dict[str, Figure]:
        """By the id of the element that each is drawn in."""
        drawn = None if self.rivals is None or self.rivals.refused else self.rivals.other
        found = {
            f"path-{m}": path_chart(self.evolution, m, drawn if m == baseline.METRIC else None)
            for m in self.evolution.metrics
        }
        if any(s.round.worths for s in self.evolution.steps):
            found["worth-map"] = worth_map(self.evolution)
        return found

    def markdown(self) -> str:
        """The rounds, the counts, the check and the comparison, for a file of results."""
        lines = [f"# {self.evolution.facts.name}", tables_.headline(self.evolution), self.evolution.last.round.next]
        lines.append(
            tables.markdown(
                tables_.round_header(self.evolution), tables_.round_rows(self.evolution), words=tables_.WORDS
            )
        )
        lines += ["## Blocks kept", "This study:"]
        lines.append(tables.markdown(tables_.COUNT_COLUMNS, tables_.count_rows(tables_.counted(self.evolution))))
        lines.append("Published, SD-1.5 → SnapFusion (arXiv 2306.00980):")
        lines.append(tables.markdown(tables_.COUNT_COLUMNS, tables_.count_rows(tables_.PUBLISHED)))
        table = tables_.table_of(self.evolution.facts.attrs)
        if table:
            lines += ["## The block table", *tables_.check_lines(table), tables_.round_check(self.evolution)]
        if self.rivals:
            lines.append(f"## Beside {self.rivals.other.name}")
            if self.rivals.refused:
                lines.append(self.rivals.refused)
            else:
                lines += [
                    baseline.introduction(self.rivals),
                    tables.markdown(baseline.COLUMNS, baseline.rows(self.rivals), words=baseline.WORDS),
                ]
                lines.append("\n".join(f"- {line}" for line in self.rivals.remarks))
        return "\n\n".join(line.strip() for line in lines if line) + "\n"
