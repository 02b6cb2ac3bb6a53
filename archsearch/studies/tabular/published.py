"""Changes of the published ablation on a table: which knob each row changes, and how often its direction comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from archsearch.spaces.space import Space
from archsearch.stats.factorial import Change, chance_of_sign
from archsearch.studies.config.ablation import AblationRow, PublishedNumber, Quantity, expand_rows
from archsearch.studies.config.study import load_config
from archsearch.studies.tabular.effects import contexts
from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable

Direction = Literal["better", "worse"]

PUBLISHED = "ablation/emoji"
"""The ablation whose rows are changes of the table's knobs, with the published numbers."""

QUOTES: dict[str, Direction] = {"better": "better", "worse": "worse", "restored": "better"}
"""Directions that the paper gives in words."""

RESTORED = "restored"
"""The paper's word for a row that is compared with the row before it, whose loss it undoes."""


@dataclass(frozen=True)
class PublishedChange:
    """A row of the published ablation as a change of one knob.

    Attributes:
        change: the change whose quality the paper judges: of its baseline, or of the row before if that is "restored".
        cost_change: the change of its baseline, which the published costs are relative to.
        direction: how the paper judges it; None if it does not.
        published: the row's published numbers.
        baseline_fid: published FID of the row that it is judged against; None if there is none.
    """

    row: str
    title: str
    change: Change
    cost_change: Change
    direction: Direction | None
    published: Mapping[Quantity, PublishedNumber]
    baseline_fid: float | None


@dataclass(frozen=True)
class Reproduction:
    """How often a published row would come out as published, from experiments of one seed and of three.

    Attributes:
        contexts: number of pairs of architectures that differ in the change alone.
        observed: share of these pairs and of the single seeds in which it did.
        one_seed, three_seeds: probability from the spread between contexts and the noise of a run.
    """

    published: PublishedChange
    contexts: int
    observed: float
    one_seed: float
    three_seeds: float


def published_changes(table: BenchmarkTable, ablation: str = PUBLISHED) -> list[PublishedChange]:
    """The rows of an ablation that change one knob of the table's space, each against its baseline row."""
    config = load_config(ablation, "ablation")
    assert config.ablation is not None
    base = config.load_space().base
    rows = {row.name: row for row in expand_rows(config.ablation, base, source=config.source) if row.group == "ladder"}
    found = []
    previous: AblationRow | None = None
    for row in rows.values():
        fid, baseline = row.published.get("frechet_distance"), rows.get(row.baseline or "")
        judged = previous if fid is not None and fid.quote == RESTORED else baseline
        previous = row
        change, cost_change = (_change(table.space, before, row) for before in (judged, baseline))
        if judged is None or change is None or cost_change is None:
            continue
        before_fid = judged.published.get("frechet_distance")
        baseline_fid = None if before_fid is None else before_fid.value
        direction = QUOTES.get(fid.quote) if fid is not None else None
        if fid is not None and fid.value is not None and baseline_fid is not None:
            direction = "better" if fid.value < baseline_fid else "worse"
        found.append(PublishedChange(row.name, row.title, change, cost_change, direction, row.published, baseline_fid))
    return found


def _change(space: Space, before: AblationRow | None, after: AblationRow) -> Change | None:
    """The change from one row to another, if it is one of a single knob of the space."""
    if before is None:
        return None
    a, b = (space.point_of(row.architecture) for row in (before, after))
    if a is None or b is None:
        return None
    changed = [
        Change(k.name, k.choices[a[k.name]], k.choices[b[k.name]]) for k in space.knobs if a[k.name] != b[k.name]
    ]
    return changed[0] if len(changed) == 1 else None


def reproduction(table: BenchmarkTable, published: PublishedChange, metric: str) -> Reproduction | None:
    """How often a published direction comes out in a metric; None if the paper gives none."""
    if published.direction is None:
        return None
    sign = 1.0 if (published.direction == "better") == LOWER_IS_BETTER[metric] else -1.0
    pairs = sign * np.array(_pairs(table, published.change, metric))  # (contexts, seeds): below 0 is as published
    one, three = (chance_of_sign(pairs.tolist(), seeds=seeds) for seeds in (1, 3))
    return Reproduction(published, len(pairs), float((pairs < 0).mean()), one, three)


def _pairs(table: BenchmarkTable, change: Change, metric: str) -> list[list[float]]:
    """Difference that a change makes in each context, by seed."""
    found = []
    for entries in contexts(table, change):
        ours, theirs = ([table.short_runs[entry.id][s] for s in table.seeds] for entry in entries)
        if all(metric in run.scores for run in (*ours, *theirs)):
            found.append([b.scores[metric] - a.scores[metric] for a, b in zip(ours, theirs, strict=True)])
    return found
