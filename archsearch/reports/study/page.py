"""Render the page of a study to one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from archsearch.reports.rendering import images
from archsearch.reports.rendering.html import render_page
from archsearch.reports.rendering.plotting import Figure
from archsearch.reports.study import audit, candidates, charts, summary
from archsearch.reports.study.data import StudyData, estimates, title
from archsearch.reports.study.knob_effects import knob_table
from archsearch.reports.study.quality_model import quality_model
from archsearch.reports.study.references import ReferenceSection


class PageSection(Protocol):
    """A section of the page that another package renders, such as that of an evolution."""

    def html(self) -> str:
        """The section as an HTML fragment."""
        ...

    def charts(self) -> dict[str, Figure]:
        """Charts of the section, by the id of the element that each is drawn in."""
        ...


def render(
    study: StudyData,
    *,
    source: str,
    assets_dir: Path,
    evolution: PageSection | None = None,
    beside: PageSection | None = None,
) -> str:
    """Render the page as HTML that embeds its style, script, plotly and data.

    Args:
        study: contents of the study.
        source: name of the study on the command line.
        assets_dir: folder of the sample grids if the study's own artifact folder no longer exists.
        evolution: section on the rounds, for a study that evolves a network.
        beside: section on another study that is shown beside this one.
    """
    from markupsafe import Markup

    audit_rows = audit.load_audit(study.attrs)
    agreements = summary.agreements_of(study)
    context = {
        "study": study,
        "source": shlex.quote(source),
        "headline": summary.headline(study),
        "tiles": summary.tiles(study),
        "warnings": summary.warnings(study, agreements),
        "recommended": summary.recommended(study),
        "axes": [[(n, study.axis(n)) for n in side] for side in charts.chart_axes(study)],
        "picks": [(c.number, title(c), c.number in study.front) for c in candidates.display_order(study)],
        "references": Markup(ReferenceSection(study).html()),
        "knobs": knob_table(study, study.objectives),
        "other_knobs": knob_table(study, [n for n in study.measures if n not in study.objectives]),
        "reference": summary.reference(study),
        "seeds": study.seeds,
        "runs": summary.runs_in_words(study),
        "agreements": [summary.agreement_row(study, name, agreement) for name, agreement in agreements.items()],
        "table": candidates.table(study),
        "verdicts": summary.verdicts(study, agreements),
        "model": model.text(study) if (model := quality_model(study)) else "",
        "sources": summary.sources(study),
        "protocol": flat(unnested(study.attrs.get("protocol", {}))),
        "machine": flat(study.attrs.get("machine", {})),
        "settings": flat({k: v for k, v in study.attrs["settings"].items() if k != "protocol"}),
        "audit": Markup(audit.section(audit_rows, steps=study.short_steps)) if audit_rows else "",
        "evolution": Markup(evolution.html()) if evolution else "",
        "beside": Markup(beside.html()) if beside else "",
    }
    repeated = [name for name, agreement in agreements.items() if agreement.n > 1]
    data = _data(study, repeated, assets_dir)
    for section in (evolution, beside):
        data["charts"] |= section.charts() if section else {}
    return render_page("report.html", name=study.name, script="report.js", data=data, **context)


def _data(study: StudyData, repeated: Sequence[str], assets_dir: Path) -> dict[str, Any]:
    """Data for the page's script; ``repeated``: metrics for which several candidates have two seeds."""
    y_axes, x_axes = charts.chart_axes(study)
    fronts = {f"{y}/{x}": charts.front_chart(study, y, x) for y in y_axes for x in x_axes if x != y}
    scatters = {f"seeds-{n}": charts.seeds_chart(study, estimates(study, n)) for n in repeated}
    samples = images.embed_images(_sample_paths(study, assets_dir))
    return {
        "best": study.best.number,
        "fronts": fronts,
        "charts": {"hypervolume": charts.hypervolume_chart(study), **scatters},
        "candidates": {c.number: candidates.details(study, c) for c in study.candidates},
        "samples": samples,
    }


def _sample_paths(study: StudyData, assets_dir: Path) -> list[tuple[int, Path]]:
    """Trial number and sample grid of each candidate; in ``assets_dir`` if the study's artifact folder has moved."""
    artifacts = Path(study.attrs.get("artifacts", assets_dir))
    folder = artifacts if artifacts.is_dir() else assets_dir
    with_samples = [c for c in candidates.display_order(study) if "samples.png" in c.artifacts]
    return [(c.number, folder / c.artifacts["samples.png"]) for c in with_samples]


def unnested(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a resolved protocol: its own fields first, then the digests of its data and models."""
    return {**protocol.get("protocol", {}), **{key: value for key, value in protocol.items() if key != "protocol"}}


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Flatten nested settings into rows of a dotted name and its value as text; None is dropped."""
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((prefix + key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
