"""Puts the page together: template, style, script, plotly and data in one file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from archsearch.reports.rendering import formatting, images
from archsearch.reports.rendering.html import render_page
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study import audit, candidates, charts, summary
from archsearch.reports.study.data import StudyData, estimates, title
from archsearch.reports.study.knob_effects import knob_table


class PageSection(Protocol):
    """A part of the page that another room makes, such as the section on an evolution."""

    def html(self) -> str: ...

    def charts(self) -> dict[str, Figure]:
        """Charts by the id of the element that each is drawn in."""
        ...


def render(facts: StudyData, *, source: str, beside: Path, evolved: PageSection | None = None) -> str:
    """The page as HTML: its style, its script, plotly and the data are inside.

    Args:
        source: how the command line names the study.
        beside: where artifacts are looked for if the folder that the study names is gone.
        evolved: of a study whose trials are rounds.
    """
    from markupsafe import Markup

    audited = audit.kept(facts.attrs)
    agreements = summary.agreements_of(facts)
    context = {
        "facts": facts,
        "source": shlex.quote(source),
        "headline": summary.headline(facts),
        "tiles": summary.tiles(facts),
        "warnings": summary.warnings(facts, agreements),
        "recommended": summary.recommended(facts),
        "axes": [[(n, formatting.axis(n, facts.extractor)) for n in side] for side in charts.chart_axes(facts)],
        "picks": [(c.number, title(c), c.number in facts.front) for c in candidates.display_order(facts)],
        "knobs": knob_table(facts, facts.objectives),
        "others": knob_table(facts, [n for n in facts.measures if n not in facts.objectives]),
        "reference": summary.reference(facts),
        "seeds": facts.seeds,
        "agreements": [summary.agreement_row(facts, name, found) for name, found in agreements.items()],
        "table": candidates.table(facts),
        "verdicts": summary.verdicts(facts, agreements),
        "sources": summary.sources(facts),
        "protocol": flat(unnested(facts.attrs.get("protocol", {}))),
        "machine": flat(facts.attrs.get("machine", {})),
        "settings": flat({k: v for k, v in facts.attrs["settings"].items() if k != "protocol"}),
        "audit": Markup(audit.section(audited)) if audited else "",
        "evolution": Markup(evolved.html()) if evolved else "",
    }
    repeated = [name for name, found in agreements.items() if found.n > 1]
    data = _data(facts, repeated, beside)
    if evolved:
        data["charts"] |= evolved.charts()
    return render_page("report.html", name=facts.name, script="report.js", data=data, **context)


def _data(facts: StudyData, repeated: Sequence[str], beside: Path) -> dict[str, Any]:
    """What the script reads; ``repeated``: the metrics that several candidates have of two seeds."""
    down, across = charts.chart_axes(facts)
    figures = {f"{y}/{x}": charts.front_chart(facts, y, x) for y in down for x in across if x != y}
    scatters = {f"seeds-{n}": charts.seeds_chart(facts, estimates(facts, n)) for n in repeated}
    pictures = images.embed_images(_pictures(facts, beside))
    return {
        "best": facts.best.number,
        "fronts": figures,
        "charts": {"hypervolume": charts.hypervolume_chart(facts), **scatters},
        "candidates": {c.number: candidates.details(facts, c) for c in facts.candidates},
        "samples": pictures,
    }


def _pictures(facts: StudyData, beside: Path) -> list[tuple[int, Path]]:
    """Where each candidate's grid should be: in the study's artifact folder, or in the run's own if that was moved."""
    named = Path(facts.attrs.get("artifacts", beside))
    folder = named if named.is_dir() else beside
    drawn = [c for c in candidates.display_order(facts) if "samples.png" in c.artifacts]
    return [(c.number, folder / c.artifacts["samples.png"]) for c in drawn]


def unnested(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved protocol's own fields first, then the digests of what it names."""
    return {**protocol.get("protocol", {}), **{key: value for key, value in protocol.items() if key != "protocol"}}


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows of dotted names."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
