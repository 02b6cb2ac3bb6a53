"""Section of a study's page that shows another study beside it: both fronts, and both studies in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from archsearch.reports.rendering import formatting, tables
from archsearch.reports.rendering.plotting import Figure, base_layout, front_line, markers
from archsearch.reports.study.data import StudyData, title
from archsearch.score import ProtocolMismatch, comparable
from archsearch.stats.pareto import bounds, front, hypervolume
from archsearch.studies.storage.record import Candidate
from snapgen.errors import InputError

CHART = "both-fronts"
"""Id of the element that the chart is drawn in."""


@dataclass(frozen=True)
class SideBySide:
    """Two studies whose common objectives mean the same.

    Attributes:
        own: the study of the page.
        other: the study beside it.
        names: objectives of the first that both have measured.
        remarks: differences that do not prevent the comparison.
    """

    own: StudyData
    other: StudyData
    names: tuple[str, ...]
    remarks: tuple[str, ...]

    @classmethod
    def create(cls, own: StudyData, other: StudyData) -> SideBySide:
        """Compare two studies.

        Raises:
            InputError: if no objective was measured by both.
            ProtocolMismatch: if their qualities are of different protocols.
        """
        names = tuple(name for name in own.objectives if name in other.measures)
        if not names:
            problem = f"has none of the objectives of {own.name}: {', '.join(own.objectives)}"
            raise InputError(f"study {other.name}", problem, "name one that has")
        qualities = [c.score.quality for study in (own, other) for c in study.scored[:1] if c.score.quality]
        if len(qualities) == 2 and set(own.quality_measures) & set(names):
            try:
                comparable(*qualities)
            except ProtocolMismatch as error:
                remedy = "name a study of the same protocol"
                raise ProtocolMismatch(f"study {other.name}", error.problem, remedy, place=error.place) from None
        return cls(own, other, names, tuple(_remarks(own, other)))

    @cached_property
    def _points(self) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
        """The common objectives of each study's scored candidates."""
        own, other = ([_values(study, c, self.names) for c in study.scored] for study in (self.own, self.other))
        return own, other

    def _numbers(self) -> Iterator[tuple[str, list[str]]]:
        """Name of each number, and the number of both studies."""
        studies, points = (self.own, self.other), self._points
        best, reference = bounds([*points[0], *points[1]])
        box = hypervolume([best], reference)
        yield "scored", [str(len(study.scored)) for study in studies]
        fronts = [front(each) for each in points]
        yield "on its front", [str(len(each)) for each in fronts]
        joint = set(front([*points[0], *points[1]]))
        yield "on the front of both", [str(sum(point in joint for point in each)) for each in fronts]
        yield (
            "hypervolume of the box of both",
            [formatting.percent(hypervolume(each, reference) / box) for each in points],
        )
        for i, name in enumerate(self.names):
            lowest = [min(study.scored, key=lambda c: _values(study, c, self.names)[i]) for study in studies]
            yield f"lowest {self.own.column(name)}", [_shown(s, c, name) for s, c in zip(studies, lowest, strict=True)]
        yield "recommended", [title(study.best) for study in studies]
        for name in self.names:
            yield f"its {self.own.column(name)}", [_shown(study, study.best, name) for study in studies]

    def _table(self) -> tables.Table:
        return tables.Table(
            ("number", self.own.name, self.other.name), [(name, *both) for name, both in self._numbers()]
        )

    def _introduction(self) -> str:
        names = " and ".join(self.own.label(name) for name in self.names)
        return (
            f"{self.own.name} and {self.other.name} by {names}; smaller is better. The box reaches from the lowest "
            "values of both to a little beyond the highest. A difference within the intervals tells nothing."
        )

    def html(self) -> str:
        """Render the section as an HTML fragment for the study's page."""
        from archsearch.reports.rendering import html

        return html.render_template(
            "side_by_side.html",
            own=self.own.name,
            other=self.other.name,
            introduction=self._introduction(),
            remarks=self.remarks,
            numbers=self._table(),
            chart=CHART if len(self.names) > 1 else "",
        )

    def charts(self) -> dict[str, Figure]:
        """The fronts of both studies, by the first two of the common objectives."""
        if len(self.names) < 2:
            return {}
        y, x = self.names[:2]
        data = []
        for study, color in ((self.own, "var(--front)"), (self.other, "var(--knee)")):
            numbers = [(a, b, c) for c in study.scored if (a := study.value_of(c, x)) and (b := study.value_of(c, y))]
            hover = [f"{study.name}, {title(c)}" for _, _, c in numbers]
            marker = {"size": 8, "color": color}
            data.append(front_line(front([(a.value, b.value) for a, b, _ in numbers]), color, opacity=0.7))
            trace = markers([a for a, _, _ in numbers], [b for _, b, _ in numbers], color)
            data.append(trace | {"name": study.name, "marker": marker, "hovertext": hover})
        return {CHART: {"data": data, "layout": base_layout(self.own.axis(x), self.own.axis(y))}}

    def markdown(self) -> str:
        """The section as a part of the report's Markdown file."""
        lines = [f"## {self.own.name} beside {self.other.name}", self._introduction(), *self.remarks]
        return "\n\n".join([*lines, tables.markdown(*self._table())])


def _values(study: StudyData, candidate: Candidate, names: tuple[str, ...]) -> tuple[float, ...]:
    return tuple(value.value for name in names if (value := study.value_of(candidate, name)))


def _shown(study: StudyData, candidate: Candidate, name: str) -> str:
    value = study.value_of(candidate, name)
    return formatting.format_value(value, name, ends=True) if value else "–"


def _remarks(own: StudyData, other: StudyData) -> Iterator[str]:
    spaces = [study.attrs["space"] for study in (own, other)]
    if spaces[0]["digest"] != spaces[1]["digest"]:
        yield f"Their spaces differ: {spaces[0]['name']} and {spaces[1]['name']}."
    conditions = [{record.conditions for record in study.latencies} for study in (own, other)]
    if all(conditions) and conditions[0] != conditions[1]:
        yield "Their latencies were taken under different conditions, and may not be comparable."
    if own.timed_pass.text != other.timed_pass.text:
        yield f"A latency of {own.name} is of {own.timed_pass.text}; one of {other.name} of {other.timed_pass.text}."
    limits = [study.attrs["settings"].get("constraints") or {} for study in (own, other)]
    if limits[0] != limits[1]:
        yield "Their limits differ; candidates outside of its own limits count for neither."
