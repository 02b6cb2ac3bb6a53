"""The published ablation beside a table's effects, and how often its rows would come out as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from archsearch.reports.ablation.table import published_number
from archsearch.reports.rendering import formatting, tables
from archsearch.reports.tabular.labels import effect_cell, is_relative, label
from archsearch.stats.factorial import FactorialFit
from archsearch.studies.config.ablation import Quantity
from archsearch.studies.tabular.effects import PublishedChange, reproduction
from archsearch.studies.tabular.table import BenchmarkTable

PHONE = "iphone-15-pro"
"""The phone of the published latencies, among the profiles of the predicted ones."""

FULL_SIZE: dict[Quantity, str] = {"params": "full_size_params", "macs": "full_size_macs", "latency_ms": PHONE}
"""Number of the full-size twins that stands beside each published one."""


def beside_the_paper(found: Mapping[str, FactorialFit], published: Sequence[PublishedChange]) -> list[str]:
    """The section with the published numbers of every row beside the table's effects; nothing without such rows."""
    if not published:
        return []
    scores = [name for name in found if not is_relative(name)]
    costs = [name for name in get_args(Quantity) if FULL_SIZE.get(name) in found]
    header = ["row", "published FID", *(label(name) for name in scores)]
    for name in costs:
        header += [f"published {label(name)}", "predicted" if name == "latency_ms" else "counted"]
    rows = []
    for each in published:
        fid = published_number(each.published.get("frechet_distance"), "frechet_distance")
        before = "" if each.baseline_fid is None or fid == "–" else f"{each.baseline_fid:g} → "
        rows.append([f"{each.row}: {each.title}", f"{before}{fid}"])
        rows[-1] += [effect_cell(found[name].main[each.change], name) for name in scores]
        for name in costs:
            ours = FULL_SIZE[name]
            rows[-1] += [published_number(each.published.get(name), name)]
            rows[-1] += [effect_cell(found[ours].main[each.cost_change], ours)]
    text = (
        "Published numbers are those of arXiv 2412.09619: FID on ImageNet, relative changes of one network, latency on "
        "an iPhone 15 Pro. Beside them stand the effects of this table: on the scores of its small networks, and on "
        "the full-size twins, averaged over the choices of all other knobs (smallest to largest). The prediction of "
        "latency was fitted to published figures, those in this column among them, so it reproduces none."
    )
    return ["## Beside the paper's table", text, tables.markdown(header, rows, text_columns=2)]


def from_few_seeds(table: BenchmarkTable, scores: Sequence[str], published: Sequence[PublishedChange]) -> list[str]:
    """The section on how often rows would come out as published; nothing if the paper judges none of them."""
    rows = []
    for each in published:
        for name in scores:
            found = reproduction(table, each, name)
            if found is None:
                continue
            shares = (found.observed, found.one_seed, found.three_seeds)
            row = f"{each.row}: {each.title}"
            rows.append([row, str(each.direction), label(name), str(found.contexts), *map(formatting.percent, shares)])
    text = (
        "How often a row would come out with the published sign, if two architectures that differ in it alone were "
        "compared: counted over all contexts and single seeds, and calculated for one seed and for three from the "
        "spread between contexts and the noise of a run."
    )
    header = ["row", "published", "score", "contexts", "counted", "one seed", "three seeds"]
    return ["## From few seeds", text, tables.markdown(header, rows, text_columns=3)] if rows else []
