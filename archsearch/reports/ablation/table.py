"""Table of an ablation: our numbers next to the published ones, as cells, Markdown and LaTeX."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from archsearch.reports.ablation import reproduction
from archsearch.reports.rendering import formatting, tables
from archsearch.score import interval_name, metric_label
from archsearch.studies.config.ablation import Group, PublishedNumber, Quantity
from archsearch.studies.experiments.ablation_results import COSTS, Ablation, RowResult
from snapgen.errors import printable

GROUPS: Mapping[Group, str] = {
    "ladder": "Ladder: each row changes the row in the column “vs”",
    "leave_one_out": "Leave one out: the final design without one choice",
    "one_at_a_time": "One at a time: the base with one choice",
}


_UNITS: Mapping[str, tuple[float, str]] = {"params": (1e6, "M"), "macs": (1e9, "G"), "latency_ms": (1, "ms")}


_LABELS = {"params": "params", "macs": "MACs"}


_SINGLE_EFFECTS: Mapping[Group, str] = {"leave_one_out": "leave one out", "one_at_a_time": "one at a time"}


MISSING = "–"


_FIRST_COLUMNS = ("row", "change", "vs")


def header(ablation: Ablation, group: Group) -> list[str]:
    """Column names of a group's table; columns of published numbers appear only if the group has any."""
    columns = [*_FIRST_COLUMNS]
    for name in COSTS:
        label, unit = _label(ablation, name), _UNITS[name][1]
        interval = interval_name(name, ablation.latencies)
        columns += [formatting.with_interval(f"{label} {unit}", interval), f"Δ {label}"]
        columns += ["published", "difference, points"] if _published(ablation, group, name) else []
    for metric in ablation.metrics:
        titles = (_label(ablation, metric), "difference")
        columns += [*(formatting.with_interval(title, interval_name(metric)) for title in titles), "verdict"]
    return columns + (["published FID"] if _published(ablation, group, "frechet_distance") else [])


def column_groups(ablation: Ablation, group: Group) -> list[tuple[str, list[str]]]:
    """The columns of `header` by the number that they are of, each with its name beneath that of the number."""
    groups = [("", [*_FIRST_COLUMNS])]
    for name in COSTS:
        columns = [formatting.with_interval(_UNITS[name][1], interval_name(name, ablation.latencies)), "Δ"]
        columns += ["published", "points apart"] if _published(ablation, group, name) else []
        groups.append((_label(ablation, name), columns))
    for metric in ablation.metrics:
        interval = interval_name(metric)
        columns = [formatting.with_interval(title, interval) for title in ("value", "difference")]
        groups.append((_label(ablation, metric), [*columns, "verdict"]))
    return groups + ([("FID", ["published"])] if _published(ablation, group, "frechet_distance") else [])


def _label(ablation: Ablation, name: str) -> str:
    return _LABELS.get(name) or metric_label(name, ablation.extractor, records=ablation.latencies)


def lines(ablation: Ablation, group: Group) -> list[list[str]]:
    """Cells of a group's rows, in the order of `header`."""
    return [_line(ablation, r) for r in ablation.results if r.planned.group == group]


def _line(ablation: Ablation, r: RowResult) -> list[str]:
    cells = [r.planned.name, r.planned.title, r.planned.baseline or MISSING]
    for name in COSTS:
        cells += [_cost(r, name), _percent(r.changes.get(name))]
        if _published(ablation, r.planned.group, name):
            points = r.apart(name)
            cells += [_published_change(r, name), MISSING if points is None else _signed(points, 1)]
    for metric in ablation.metrics:
        estimate, effect = r.quality.get(metric), r.effects.get(metric)
        cells += [formatting.format_interval(estimate) if estimate else r.error or MISSING]
        cells += (
            [formatting.format_change(effect.difference, relative=False), effect.verdict]
            if effect
            else [MISSING, MISSING]
        )
    fid = _published(ablation, r.planned.group, "frechet_distance")
    return cells + ([_published_change(r, "frechet_distance")] if fid else [])


def _published(ablation: Ablation, group: Group, name: Quantity) -> bool:
    return any(name in r.planned.published for r in ablation.results if r.planned.group == group)


def _cost(r: RowResult, name: Quantity) -> str:
    if r.score is None:
        return r.error or MISSING
    if name == "latency_ms":
        latency = formatting.value_of(r.score, name)
        return formatting.format_interval(latency) if latency else MISSING
    scale, _ = _UNITS[name]
    return f"{getattr(r.score.cost, name) / scale:.4g}"


def _percent(change: float | None) -> str:
    return MISSING if change is None else f"{_signed(change, 1)} %"


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return "0" + text[2:] if not float(text) else text.replace("-", "−")


def _published_change(r: RowResult, name: Quantity) -> str:
    text = published_number(r.planned.published.get(name), name)
    return f"{text}, fitted to" if name == "latency_ms" and r.is_latency_fitted and text != MISSING else text


def published_number(published: PublishedNumber | None, name: Quantity) -> str:
    """A published number of a row as text: an FID, or a change in percent, with the paper's wording if it has one."""
    if published is None:
        return MISSING
    if name == "frechet_distance":
        return f"{published.value:g}" if published.value is not None else published.quote
    value = "" if published.value is None else f"{_signed(published.value, 0)} %"
    return f"{published.quote} ({value})" if published.quote and value else published.quote or value


def sum_lines(ablation: Ablation) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that compares the sum of the single effects with the joint effect."""
    excess_column = formatting.with_interval("joint − sum", "95 % interval" if ablation.metrics else "")
    columns = ["number", "single effects", "sum of single effects", "joint effect", excess_column, "verdict"]
    rows = []
    for s in ablation.sums:
        relative = s.excess is None
        single, joint = (_percent(v) if relative else f"{v:+.4f}".replace("-", "−") for v in (s.single, s.joint))
        excess = (
            formatting.format_change(s.excess, relative=False)
            if s.excess
            else f"{_signed(s.joint - s.single, 1)} points"
        )
        rows.append([_label(ablation, s.name), _SINGLE_EFFECTS.get(s.group, s.group), single, joint, excess, s.verdict])
    return columns, rows


def markdown(ablation: Ablation) -> str:
    """Format the ablation as Markdown: what was reproduced, a table per group, the additivity, and the sources."""
    blocks = [f"# {ablation.name}\n", *(f"{line}\n" for line in reproduction.sentences(ablation))]
    for group, title in GROUPS.items():
        if rows := lines(ablation, group):
            blocks += [f"## {title}\n", tables.markdown(header(ablation, group), rows, text_columns=3)]
    columns, rows = sum_lines(ablation)
    if rows:
        blocks += ["## Do the gains add up?\n", tables.markdown(columns, rows, text_columns=2)]
    blocks += ["## Sources\n", *(f"- {name}: {text}" for name, text in reproduction.sources(ablation))]
    return "\n".join(blocks) + "\n"


_CAPTION = "Δ: change relative to the row in the column “vs”."
_CAPTION_PUBLISHED = " Published: the paper's change; points apart: ours minus the published one, in percentage points."
"""End of a caption in LaTeX, where the table has published numbers."""

_LATEX_SYMBOLS = str.maketrans(
    {"Δ": r"$\Delta$", "×": r"$\times$", "−": "$-$", "≤": r"$\leq$", "–": "--", "“": "``", "”": "''", "é": r"\'e"}
    | {"\u00a0": "~"}
)


def latex(ablation: Ablation) -> str:
    """Format the ablation as LaTeX: a captioned ``table`` per group, with the columns of each number under its name."""
    notes = [*reproduction.sentences(ablation), *(f"{name}: {text}" for name, text in reproduction.sources(ablation))]
    text = "".join(f"% {line}\n" for line in [*notes, r"Needs \usepackage{booktabs} and \usepackage{graphicx}."])
    text += "".join(_latex_table(ablation, group) for group in GROUPS if lines(ablation, group))
    return text.translate(_LATEX_SYMBOLS).encode("ascii", "replace").decode()


def _latex_table(ablation: Ablation, group: Group) -> str:
    """One group's table, scaled to the width of the text."""
    import pandas

    groups = column_groups(ablation, group)
    columns = [(name, column) for name, names in groups for column in names]
    cells = [[printable(cell) for cell in row] for row in lines(ablation, group)]
    frame = pandas.DataFrame(cells, columns=pandas.MultiIndex.from_tuples(columns))
    tabular = frame.to_latex(
        index=False,
        escape=True,
        multicolumn_format="c",
        column_format=f"lll{'r' * (len(columns) - 3)}",
    )
    ends = list(itertools.accumulate(len(names) for _, names in groups))
    rules = " ".join(rf"\cmidrule(lr){{{a + 1}-{b}}}" for a, b in itertools.pairwise(ends))
    first, rest = tabular.split("\\\\\n", 1)
    has_published = any("published" in names for _, names in groups)
    caption = f"{ablation.name.replace('_', chr(92) + '_')}. {GROUPS[group]}. {_CAPTION}"
    caption += _CAPTION_PUBLISHED if has_published else ""
    return (
        f"\n\\begin{{table}}[t]\n\\centering\n\\caption{{{caption}}}\n\\label{{tab:{ablation.name}-{group}}}\n"
        f"\\resizebox{{\\linewidth}}{{!}}{{%\n{first}\\\\\n{rules}\n{rest.rstrip()}%\n}}\n\\end{{table}}\n"
    )
