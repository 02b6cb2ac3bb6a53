"""Render the HTML templates and embed data into a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any


def render_page(template: str, *, name: str, data: Mapping[str, Any], script: str = "", **context: object) -> str:
    """Render a template that extends ``page.html`` to one file that embeds its style, scripts, plotly and data.

    Args:
        template: file name in ``templates/``.
        name: name of the study, used as heading and title.
        data: JSON data for the scripts; its ``charts`` map the id of an element to the figure drawn in it.
        script: script in ``static/`` that runs after ``charts.js``; default: ``plain.js``, which draws the charts.
        context: other variables of the template.
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
    """Render one of the templates in ``templates/``; all text is HTML-escaped."""
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
    """Serialize to JSON that is safe inside a ``<script>`` element, whatever the strings contain."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _resource(name: str) -> str:
    folder = "templates" if name.endswith(".html") else "static"
    return resources.files(__package__).joinpath(folder, name).read_text()
