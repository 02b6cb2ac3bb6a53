"""Puts the page together: template, style, script, plotly and data in one file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from reports import amounts, audit, charts, listing, samples, summary
from reports.evolution_section import Section
from reports.facts import Facts, estimates, title
from reports.knobs import knob_table


def render(facts: Facts, *, source: str, beside: Path, evolved: Section | None = None) -> str:
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
        "axes": [[(n, amounts.axis(n, facts.extractor)) for n in side] for side in charts.views(facts)],
        "picks": [(c.number, title(c), c.number in facts.front) for c in listing.shown(facts)],
        "knobs": knob_table(facts, facts.objectives),
        "others": knob_table(facts, [n for n in facts.measures if n not in facts.objectives]),
        "reference": summary.reference(facts),
        "seeds": facts.seeds,
        "agreements": [summary.agreement_row(facts, name, found) for name, found in agreements.items()],
        "table": listing.table(facts),
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
    return whole("report.html", name=facts.name, script="report.js", data=data, **context)


def whole(template: str, *, name: str, data: Mapping[str, Any], script: str = "", **context: object) -> str:
    """A page of a template that extends ``page.html``: one file with its style, scripts, plotly and data inside.

    Args:
        name: of the study, its heading.
        data: what the scripts read; ``charts`` maps an element's id to its figure.
        script: the template's own, run after ``charts.js``.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = "\n".join(_resource(file) for file in ("charts.js", script or "plain.js"))
    return fragment(
        template,
        name=name,
        style=Markup(_resource("report.css")),
        script=Markup(scripts),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=Markup(embedded(data)),
        **context,
    )


def fragment(template: str, /, **context: object) -> str:
    """One of the templates beside this file, filled in; all text in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def embedded(value: object) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    return resources.files("reports").joinpath(name).read_text()


def _data(facts: Facts, repeated: Sequence[str], beside: Path) -> dict[str, Any]:
    """What the script reads; ``repeated``: the metrics that several candidates have of two seeds."""
    down, across = charts.views(facts)
    figures = {f"{y}/{x}": charts.front_chart(facts, y, x) for y in down for x in across if x != y}
    scatters = {f"seeds-{n}": charts.seeds_chart(facts, estimates(facts, n)) for n in repeated}
    pictures = samples.embedded(_pictures(facts, beside))
    return {
        "best": facts.best.number,
        "fronts": figures,
        "charts": {"hypervolume": charts.hypervolume_chart(facts), **scatters},
        "candidates": {c.number: listing.details(facts, c) for c in facts.candidates},
        "samples": pictures,
    }


def _pictures(facts: Facts, beside: Path) -> list[tuple[int, Path]]:
    """Where each candidate's grid should be: in the study's artifact folder, or in the run's own if that was moved."""
    named = Path(facts.attrs.get("artifacts", beside))
    folder = named if named.is_dir() else beside
    drawn = [c for c in listing.shown(facts) if "samples.png" in c.artifacts]
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
