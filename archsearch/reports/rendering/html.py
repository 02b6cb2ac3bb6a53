"""Templates filled in, and data embedded into a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any


def render_page(template: str, *, name: str, data: Mapping[str, Any], script: str = "", **context: object) -> str:
    """A page of a template that extends ``page.html``: one file with its style, scripts, plotly and data inside.

    Args:
        name: of the study, its heading.
        data: what the scripts read; ``charts`` maps an element's id to its figure.
        script: the template's own, run after ``charts.js``.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    scripts = "\n".join(_resource(file) for file in ("charts.js", script or "plain.js"))
    return render_template(
        template,
        name=name,
        style=Markup(_resource("report.css")),
        script=Markup(scripts),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        data=Markup(json_for_script(data)),
        **context,
    )


def render_template(template: str, /, **context: object) -> str:
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


def json_for_script(value: object) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    folder = "templates" if name.endswith(".html") else "static"
    return resources.files(__package__).joinpath(folder, name).read_text()
