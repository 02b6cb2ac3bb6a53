"""The ablation table: every row ours beside the published, as HTML, Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Mapping

from archsearch.reports.ablation import reproduction
from archsearch.reports.rendering import formatting, tables
from archsearch.score import metric_label
from archsearch.studies.config.ablation import Group, Quantity
from archsearch.studies.experiments.ablation_results import COSTS, Ablation, RowResult

GROUPS: Mapping[Group, str] = {
    "ladder": "The ladder: each row on the one named",
    "without": "Leave one out: the final design without one choice",
    "alone": "One at a time: the base with one choice",
}


_UNITS: Mapping[str, tuple[float, str]] = {"params": (1e6, "M"), "macs": (1e9, "G"), "latency_ms": (1, "ms")}


_NAMES = {"params": "params", "macs": "MACs", "latency_ms": "latency"}


NONE = "–"


def header(ablation: Ablation, group: Group) -> list[str]:
    """The names of a group's columns; published ones only where something of it was published."""
    shown = ["row", "change", "vs"]
    for name in COSTS:
        shown += [f"{_NAMES[name]} {_UNITS[name][1]}", f"Δ {_NAMES[name]}"]
        shown += ["published", "points apart"] if _published(ablation, group, name) else []
    for metric in ablation.metrics:
        shown += [metric_label(metric, ablation.extractor), "difference", "verdict"]
    return shown + (["published FID"] if _published(ablation, group, "frechet_distance") else [])


def lines(ablation: Ablation, group: Group) -> list[list[str]]:
    """The cells of a group's rows, in the order of `header`."""
    return [_line(ablation, r) for r in ablation.results if r.planned.group == group]


def _line(ablation: Ablation, r: RowResult) -> list[str]:
    cells = [r.planned.name, r.planned.title, r.planned.over or NONE]
    for name in COSTS:
        cells += [_amount(r, name), _percent(r.changes.get(name))]
        if _published(ablation, r.planned.group, name):
            cells += [_said(r, name), _apart(r, name)]
    for metric in ablation.metrics:
        estimate, effect = r.quality.get(metric), r.effects.get(metric)
        cells += [formatting.format_interval(estimate) if estimate else r.error or NONE]
        cells += (
            [formatting.format_change(effect.difference, relative=False), effect.verdict] if effect else [NONE, NONE]
        )
    fid = _published(ablation, r.planned.group, "frechet_distance")
    return cells + ([_said(r, "frechet_distance")] if fid else [])


def _published(ablation: Ablation, group: Group, name: Quantity) -> bool:
    return any(name in r.planned.published for r in ablation.results if r.planned.group == group)


def _amount(r: RowResult, name: Quantity) -> str:
    if r.score is None:
        return r.error or NONE
    if name == "latency_ms":
        latency = formatting.value_of(r.score, name)
        return formatting.format_interval(latency) if latency else NONE
    scale, _ = _UNITS[name]
    return f"{getattr(r.score.cost, name) / scale:.4g}"


def _percent(change: float | None) -> str:
    return NONE if change is None else f"{_signed(change, 1)} %"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return "0" + text[2:] if not float(text) else text.replace("-", "−")


def _said(r: RowResult, name: Quantity) -> str:
    published = r.planned.published.get(name)
    if published is None:
        return NONE
    if name == "frechet_distance":
        return f"{published.value:g}" if published.value is not None else published.says
    value = "" if published.value is None else f"{_signed(published.value, 0)} %"
    return f"{published.says} ({value})" if published.says and value else published.says or value


def _apart(r: RowResult, name: Quantity) -> str:
    points = r.apart(name)
    return NONE if points is None else _signed(points, 1)


def sum_lines(ablation: Ablation) -> tuple[list[str], list[list[str]]]:
    """Single effects against the joint one: header and rows."""
    shown = ["number", "single effects of", "added up", "together", "together less added up", "the gains"]
    rows = []
    for s in ablation.sums:
        relative = s.excess is None
        single, joint = (_percent(v) if relative else f"{v:+.4f}".replace("-", "−") for v in (s.single, s.joint))
        excess = (
            formatting.format_change(s.excess, relative=False)
            if s.excess
            else f"{_signed(s.joint - s.single, 1)} points"
        )
        label = _NAMES.get(s.name) or metric_label(s.name, ablation.extractor)
        rows.append([label, s.group, single, joint, excess, s.verdict])
    return shown, rows


def markdown(ablation: Ablation) -> str:
    """All of it as Markdown: what was reproduced, the groups' tables, the sums, the sources."""
    parts = [f"# {ablation.name}\n", *(f"{line}\n" for line in reproduction.sentences(ablation))]
    for group, title in GROUPS.items():
        if rows := lines(ablation, group):
            parts += [f"## {title}\n", tables.markdown(header(ablation, group), rows, words=3)]
    shown, rows = sum_lines(ablation)
    if rows:
        parts += ["## Do the gains add up?\n", tables.markdown(shown, rows, words=2)]
    parts += ["## Sources\n", *(f"- {name}: {text}" for name, text in reproduction.sources(ablation))]
    return "\n".join(parts) + "\n"


_TEX = {
    **{"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$", "{": r"\{", "}": r"\}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$", "×": r"$\times$", "−": "$-$"},
    **{"–": "--", "\u00a0": "~", "é": r"\'e", "≤": r"$\leq$"},
}


def latex(ablation: Ablation) -> str:
    """A tabular for each group as LaTeX, for ``\\usepackage{booktabs}``; plain ASCII."""
    told = [*reproduction.sentences(ablation), *(f"{name}: {text}" for name, text in reproduction.sources(ablation))]
    parts = [f"% {_tex(line)}\n" for line in told]
    for group, title in GROUPS.items():
        if rows := lines(ablation, group):
            shown = header(ablation, group)
            parts.append(f"\n% {_tex(title)}\n\\begin{{tabular}}{{lll{'r' * (len(shown) - 3)}}}\n\\toprule\n")
            parts += [" & ".join(map(_tex, shown)) + " \\\\\n\\midrule\n"]
            parts += [" & ".join(map(_tex, row)) + " \\\\\n" for row in rows]
            parts.append("\\bottomrule\n\\end{tabular}\n")
    return "".join(parts)


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text).encode("ascii", "replace").decode()
