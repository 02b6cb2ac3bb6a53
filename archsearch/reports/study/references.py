"""The reference designs of the space against the candidates that the search proposed: shared choices, and distances."""

from __future__ import annotations

from dataclasses import dataclass

from archsearch.reports.rendering import formatting, html, tables
from archsearch.reports.rendering.tables import Table
from archsearch.reports.study.candidates import state_of
from archsearch.reports.study.data import StudyData, estimates, title
from archsearch.reports.study.summary import count_candidates
from archsearch.score import QUALITY_METRICS
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import independent_difference, verdict
from archsearch.studies.storage.record import Candidate

MAX_CHOICE_TABLES = 3
"""Number of references up to which the choices of each are listed; of more only those of the space's last one are."""

NONE = "–"

Row = tuple[str, ...]


@dataclass(frozen=True)
class ReferenceSection:
    """The section of the report on the reference designs of the study's space."""

    study: StudyData

    def html(self) -> str:
        """Render the section as an HTML fragment; empty if the space has no references."""
        if not self._choices:
            return ""
        return html.render_template(
            "references.html",
            introduction=self.introduction(),
            distances=self.distances(),
            choice_tables=[(name, self.summary(name), self.choices(name)) for name in self._listed],
        )

    def markdown(self) -> str:
        """Format the section as a Markdown document; empty if the space has no references."""
        if not self._choices:
            return ""
        lines = [f"# {self.study.name}", "## Against the references", self.introduction()]
        lines.append(tables.markdown(*self.distances()))
        for name in self._listed:
            lines += [f"### Choices of {name}", self.summary(name), tables.markdown(*self.choices(name))]
        return "\n\n".join(line.strip() for line in lines) + "\n"

    @property
    def _choices(self) -> dict[str, dict[str, str]]:
        """Choice of each reference for each knob."""
        choices: dict[str, dict[str, str]] = self.study.attrs["space"].get("references", {})
        return choices

    @property
    def _listed(self) -> list[str]:
        names = list(self._choices)
        return names if len(names) <= MAX_CHOICE_TABLES else names[-1:]

    @property
    def _proposed(self) -> list[Candidate]:
        """Candidates on the front that the search proposed: those without a name."""
        return [c for c in self.study.scored if c.number in self.study.front and c.name is None]

    @property
    def _axes(self) -> tuple[str, str] | None:
        """The first quality metric and the first other number among the objectives; None without either."""
        quality = next((n for n in self.study.objectives if n in QUALITY_METRICS), None)
        cost = next((n for n in self.study.objectives if n not in QUALITY_METRICS), None)
        return (quality, cost) if quality and cost else None

    def introduction(self) -> str:
        """Text that explains the tables, and what their numbers rest on."""
        proposed = count_candidates(len(self._proposed))
        lines = [f"The designs that the space names, against {proposed} that the search proposed."]
        if self._axes:
            quality, cost = self._axes
            short = self.study.label(cost, short=True)
            lines += [
                f"Gap: a design's {self.study.label(quality)}, minus the lowest of the others with at most its",
                f"{short}; below zero, none of them is as good. Ratio: its {short} over the lowest of",
                "those that are at least as good; in parentheses, of those that are not significantly worse.",
            ]
            if not self._has_seed_intervals:
                lines.append("With a single seed the gap has no interval.")
            if any(c.score.latency and c.score.latency.source == "predicted" for c in self.study.scored):
                lines.append("Latency is predicted, so that the ratios are as good as the device's profile.")
            lines.append("A gap or a ratio is to the lowest of several, which is a little too low by chance.")
        return " ".join(lines)

    def distances(self) -> Table:
        """One row per reference: its distances from the other candidates, and its choices that they share."""
        distances: Row = ()
        if self._axes:
            quality, cost = self._axes
            seeds = "95 % interval" if self._has_seed_intervals else ""
            heads = (formatting.with_interval(title, seeds) for title in (self.study.axis(quality), "gap"))
            own, gap = heads
            distances = (own, self.study.column(cost), gap, "ratio")
        header = ("reference", *distances, "choices shared by the front", "by the recommended")
        return Table(header, [(name, *self._distances(name), *self._shares(name)) for name in self._choices])

    def _shares(self, name: str) -> Row:
        of = len(self._choices[name])
        counts = [self._shared(c, name) for c in self._proposed]
        front = f"{sum(counts) / len(counts):.1f} of {of}" if counts else NONE
        return front, f"{self._shared(self.study.best, name)} of {of}"

    def _shared(self, candidate: Candidate, name: str) -> int:
        return len(self._choices[name].items() & self.study.choices(candidate).items())

    def _distances(self, name: str) -> Row:
        if self._axes is None:
            return ()
        quality = self._axes[0]
        design = self._candidate(name)
        if design is None:
            named = self._named(name)
            return (state_of(self.study, named) if named else "not scored", NONE, NONE, NONE)
        own, own_cost = self._point(design)
        others = [self._point(c) for c in self.study.scored if c is not design and c in self.study.trained]
        as_fast = [q for q, x in others if x.value <= own_cost.value]
        gap = self._difference(own, min(as_fast, key=lambda q: q.value)) if as_fast else None
        as_good = [x.value for q, x in others if q.value <= own.value]
        maybe = [x.value for q, x in others if verdict(self._difference(q, own)) != "worse"]
        ratio = f"{own_cost.value / min(as_good):.2f}" if as_good else NONE
        if self._has_seed_intervals and maybe:
            ratio += f" ({own_cost.value / min(maybe):.2f})"
        return (
            formatting.format_value(own, quality, ends=self._has_seed_intervals),
            formatting.format_interval(own_cost),
            formatting.format_change(gap, relative=False) if gap else NONE,
            ratio,
        )

    def _candidate(self, name: str) -> Candidate | None:
        """The scored candidate of a reference, or the one with the same architecture."""
        named = self._named(name)
        same = (c for c in self.study.scored if named and c.architecture.id == named.architecture.id)
        return next((c for c in same if c in self.study.trained), None)

    def _named(self, name: str) -> Candidate | None:
        return next((c for c in self.study.candidates if c.name == name), None)

    def _point(self, candidate: Candidate) -> tuple[Estimate, Estimate]:
        assert self._axes
        quality, cost = (self.study.value_of(candidate, name) for name in self._axes)
        assert quality
        assert cost
        return quality, cost

    @property
    def _has_seed_intervals(self) -> bool:
        """Whether the intervals are those of the spread between seeds, which cancels what candidates have in common."""
        axes = self._axes
        return axes is not None and sum(len(e.by_seed) > 1 for _, e in estimates(self.study, axes[0])) > 1

    def _difference(self, a: Estimate, b: Estimate) -> Estimate:
        return independent_difference(a, b) if self._has_seed_intervals else Estimate.exact(a.value - b.value)

    def summary(self, name: str) -> str:
        """Number of the reference's choices that the front and the recommended candidate share, next to chance."""
        design = self._candidate(name)
        by_chance = sum(1 / len(f.choices) for f in self.study.factors)
        front, recommended = self._shares(name)
        where = "is on the front" if design and design.number in self.study.front else "is not on the front"
        return (
            f"{name} {where}. Candidates that the search put there share {front} of its choices on average, the "
            f"recommended candidate ({title(self.study.best)}) {recommended}; a random point shares {by_chance:.1f}."
        )

    def choices(self, name: str) -> Table:
        """One row per knob: the reference's choice, and who shares it."""
        header = (
            "knob",
            name,
            f"shared by the front ({count_candidates(len(self._proposed))})",
            "by chance",
            "recommended",
        )
        front = [self.study.choices(c) for c in self._proposed]
        best = self.study.choices(self.study.best)
        rows: list[Row] = []
        for factor in self.study.factors:
            choice = self._choices[name][factor.name]
            shared = sum(choices.get(factor.name) == choice for choices in front)
            own = best.get(factor.name, NONE)
            chance = formatting.percent(1 / len(factor.choices))
            rows.append((factor.name, choice, f"{shared} of {len(front)}", chance, "same" if own == choice else own))
        return Table(header, rows, text_columns=2)
