"""The section on an evolving study's page, its charts, and the same as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from reports import evolution as told
from reports import rivals as beside
from reports import tables
from reports.charts import Figure
from reports.evolution import Evolution
from reports.evolution_charts import path_chart, worth_map
from reports.facts import Facts
from reports.rivals import Rivals


@dataclass(frozen=True)
class Section:
    """An evolving study, and the study that it is shown beside."""

    evolution: Evolution
    rivals: Rivals | None

    @classmethod
    def of(cls, evolution: Evolution, other: Facts | None = None) -> Section:
        """Of a study, with another one beside it or alone."""
        return cls(evolution, beside.against(evolution, other) if other else None)

    def html(self) -> str:
        """As the page holds it."""
        from reports import page

        table = told.table_of(self.evolution.facts.attrs)
        return page.fragment(
            "evolution.html",
            headline=told.headline(self.evolution),
            next=self.evolution.last.round.next,
            valued=any(s.round.worths for s in self.evolution.steps),
            paths=[(f"path-{m}", self.evolution.label(m)) for m in self.evolution.metrics],
            header=told.round_header(self.evolution),
            rounds=told.round_rows(self.evolution),
            words=told.WORDS,
            count_header=told.COUNT_COLUMNS,
            counts=told.count_rows(told.counted(self.evolution)),
            published=told.count_rows(told.PUBLISHED),
            check=told.check_lines(table) if table else [],
            round_check=told.round_check(self.evolution),
            rivals=self.rivals,
            rival_header=beside.COLUMNS,
            rival_rows=beside.rows(self.rivals) if self.rivals and not self.rivals.refused else [],
            rival_lead=beside.lead(self.rivals) if self.rivals and not self.rivals.refused else "",
            rival_words=beside.WORDS,
        )

    def charts(self) -> dict[str, Figure]:
        """By the id of the element that each is drawn in."""
        drawn = None if self.rivals is None or self.rivals.refused else self.rivals.other
        found = {
            f"path-{m}": path_chart(self.evolution, m, drawn if m == beside.METRIC else None)
            for m in self.evolution.metrics
        }
        if any(s.round.worths for s in self.evolution.steps):
            found["worth-map"] = worth_map(self.evolution)
        return found

    def markdown(self) -> str:
        """The rounds, the counts, the check and the comparison, for a file of results."""
        lines = [f"# {self.evolution.facts.name}", told.headline(self.evolution), self.evolution.last.round.next]
        lines.append(
            tables.markdown(told.round_header(self.evolution), told.round_rows(self.evolution), words=told.WORDS)
        )
        lines += ["## Blocks kept", "This study:"]
        lines.append(tables.markdown(told.COUNT_COLUMNS, told.count_rows(told.counted(self.evolution))))
        lines.append("Published, SD-1.5 → SnapFusion (arXiv 2306.00980):")
        lines.append(tables.markdown(told.COUNT_COLUMNS, told.count_rows(told.PUBLISHED)))
        table = told.table_of(self.evolution.facts.attrs)
        if table:
            lines += ["## The block table", *told.check_lines(table), told.round_check(self.evolution)]
        if self.rivals:
            lines.append(f"## Beside {self.rivals.other.name}")
            if self.rivals.refused:
                lines.append(self.rivals.refused)
            else:
                lines += [
                    beside.lead(self.rivals),
                    tables.markdown(beside.COLUMNS, beside.rows(self.rivals), words=beside.WORDS),
                ]
                lines.append("\n".join(f"- {line}" for line in self.rivals.remarks))
        return "\n\n".join(line.strip() for line in lines if line) + "\n"
