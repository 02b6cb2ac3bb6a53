"""The factorial ablation: what each choice does to each number of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import chi2

from archsearch.spaces.space import Space
from archsearch.spaces.summary import knob_summaries
from archsearch.stats.estimate import Estimate
from archsearch.stats.factorial import Change, FactorialFit, chance_of_sign, fit, fit_over_seeds
from archsearch.stats.intervals import Verdict, additive_fit, quantile, verdict
from archsearch.studies.config.ablation import AblationRow, PublishedNumber, Quantity, expand_rows
from archsearch.studies.config.study import load_config
from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable, Entry, Run

Direction = Literal["better", "worse"]

PUBLISHED = "ablation/emoji"
"""The ablation whose rows are changes of the table's knobs, with the published numbers."""

QUOTES: dict[str, Direction] = {"better": "better", "worse": "worse", "restored": "better"}
"""Directions that the paper gives in words."""

RESTORED = "restored"
"""The paper's word for a row that is compared with the row before it, whose loss it undoes."""


POOLED = 2
"""Seeds of the studies whose pooled intervals are tried."""


@dataclass(frozen=True)
class FreshVerdicts:
    """Verdicts of a table on its changes, against those from fresh pairs of seeds on a few architectures.

    Attributes:
        changes: number of changes.
        architectures: number of architectures with fresh seeds.
        pairs: number of fresh pairs of seeds.
        found: number of changes, over all pairs, that the table calls better or worse.
        called: number of these that the fresh pair, too, calls better or worse.
        agreeing: number of these on which both give the same verdict.
    """

    changes: int
    architectures: int
    pairs: int
    found: int
    called: int
    agreeing: int


def is_exact(name: str) -> bool:
    """Whether a number is counted or predicted, and so has no noise: neither a score nor the measured latency."""
    return name not in LOWER_IS_BETTER and name != "latency_ms"


def effects_on(table: BenchmarkTable, name: str) -> FactorialFit:
    """Effects on a score of the short runs, a cost, a latency (``latency_ms``) or a predicted one (by its profile).

    Costs and latencies are in logarithms, so that an effect is a ratio. On what `is_exact`, the ends of an effect are
    the smallest and the largest over all contexts (the choices of the other knobs).

    Raises:
        ValueError: if the table has too few architectures with that number.
    """
    knobs = knob_summaries(table.space)
    if name in LOWER_IS_BETTER:
        scores = _scores(table.short_runs, name)
        return fit_over_seeds([table.entries[i].point for i in scores], [*scores.values()], knobs)
    entries = table.entries.values()
    found = fit([e.point for e in entries], [float(np.log(e.number(name))) for e in entries], knobs)
    if not is_exact(name):
        return found
    return replace(found, main={change: _range(table, change, name, size) for change, size in found.main.items()})


def _range(table: BenchmarkTable, change: Change, name: str, mean: Estimate) -> Estimate:
    """An effect on the logarithm of a number, with its smallest and its largest size over all contexts as ends."""
    sizes = [float(np.log(b.number(name) / a.number(name))) for a, b in _contexts(table, change)]
    return Estimate(value=mean.value, low=min(sizes), high=max(sizes)) if sizes else mean


def _scores(runs: Mapping[str, Mapping[int, Run]], metric: str) -> dict[str, dict[int, float]]:
    """A metric by architecture and seed, of the architectures all of whose runs have it."""
    return {
        i: {seed: run.scores[metric] for seed, run in by_seed.items()}
        for i, by_seed in runs.items()
        if all(metric in run.scores for run in by_seed.values())
    }


def _contexts(table: BenchmarkTable, change: Change) -> Iterator[tuple[Entry, Entry]]:
    """Pairs of architectures, before the change and after it, that differ in it alone."""
    knob = next(k for k in table.space.knobs if k.name == change.knob)
    before, after = (knob.choices.index(choice) for choice in (change.before, change.after))
    by_point = {tuple(entry.point.items()): entry for entry in table.entries.values()}
    for entry in table.entries.values():
        other = by_point.get(tuple({**entry.point, knob.name: after}.items()))
        if entry.point[knob.name] == before and other is not None:
            yield entry, other


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
    a, b = (None if row is None else space.point_of(row.architecture) for row in (before, after))
    different = [knob for knob in space.knobs if a and b and a[knob.name] != b[knob.name]]
    if a is None or b is None or len(different) != 1:
        return None
    [knob] = different
    return Change(knob.name, knob.choices[a[knob.name]], knob.choices[b[knob.name]])


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
    for entries in _contexts(table, change):
        ours, theirs = ([table.short_runs[entry.id][s] for s in table.seeds] for entry in entries)
        if all(metric in run.scores for run in (*ours, *theirs)):
            found.append([b.scores[metric] - a.scores[metric] for a, b in zip(ours, theirs, strict=True)])
    return found


def fresh_verdicts(table: BenchmarkTable, metric: str) -> FreshVerdicts | None:
    """Hold the table's verdicts against those from pairs of seeds that they do not rest on; None without such pairs, or
    if too few architectures have them.

    Main effects alone are fitted to the fresh pairs, for there are fewer architectures than interactions.
    """
    scores, knobs = _scores(table.short_runs, metric), knob_summaries(table.space)
    better: Literal["lower", "higher"] = "lower" if LOWER_IS_BETTER[metric] else "higher"

    def verdicts(found: FactorialFit) -> dict[Change, Verdict]:
        return {change: verdict(effect, better) for change, effect in found.main.items()}

    fresh = sorted({seed for by_seed in scores.values() for seed in by_seed} - {*table.seeds})
    architectures = pairs = found = called = agreeing = 0
    for pair in zip(fresh[::2], fresh[1::2], strict=False):
        few = [i for i, by_seed in scores.items() if by_seed.keys() >= {*pair}]
        means = [(scores[i][pair[0]] + scores[i][pair[1]]) / 2 for i in few]
        try:
            said = verdicts(fit([table.entries[i].point for i in few], means, knobs, interactions=False))
        except ValueError:
            continue  # too few architectures have the pair
        others = [{s: v for s, v in by_seed.items() if s not in pair} for by_seed in scores.values()]
        whole = verdicts(fit_over_seeds([table.entries[i].point for i in scores], others, knobs))
        known = [change for change, each in whole.items() if each != "cannot tell"]
        architectures, pairs = max(architectures, len(few)), pairs + 1
        found += len(known)
        called += sum(said[change] != "cannot tell" for change in known)
        agreeing += sum(said[change] == whole[change] for change in known)
    return FreshVerdicts(len(whole), architectures, pairs, found, called, agreeing) if pairs else None


def pooled_coverage(table: BenchmarkTable, metric: str) -> dict[str, float]:
    """How often 95 % intervals as of a study with two seeds hold the difference that other seeds see.

    Such intervals are pooled (`archsearch.stats.intervals.pool_intervals`): the variance between seeds counts as equal
    for all candidates. Every pair of seeds of the architectures with further ones is a study, their remaining seeds say
    what is true, with their own noise.

    Returns:
        Shares of the pairs of architectures that differ in each knob, by its name, and of all pairs as ``any``; empty
        without further seeds.
    """
    scores = _scores(table.short_runs, metric)
    most = max(map(len, scores.values()), default=0)
    ids = [i for i, by_seed in scores.items() if len(by_seed) == most]
    if most < 2 * POOLED or len(ids) < 2:
        return {}
    values = np.array([[scores[i][seed] for seed in sorted(scores[i])] for i in ids])  # (architectures, seeds)
    first, second = np.triu_indices(len(ids), k=1)
    held = np.zeros(len(first))
    studies = [*itertools.combinations(range(most), POOLED)]
    for seeds in studies:
        fitted = additive_fit(values[:, seeds].tolist())
        assert fitted is not None
        excess = values[:, seeds].mean(axis=1) - np.delete(values, seeds, axis=1).mean(axis=1)
        difference = excess[first] - excess[second]
        variance = 2 * fitted.variance * (1 / POOLED + 1 / (most - POOLED))
        held += np.abs(difference) <= quantile(fitted.freedom) * variance**0.5
    points = [table.entries[i].point for i in ids]
    differ = {
        knob: np.array([points[a][knob] != points[b][knob] for a, b in zip(first, second, strict=True)])
        for knob in points[0]
    }
    everything = np.ones(len(first), dtype=bool)
    return {
        name: float(held[pairs].mean()) / len(studies)
        for name, pairs in {"any": everything, **differ}.items()
        if pairs.any()
    }


@dataclass(frozen=True)
class Noise:
    """Standard deviation of a metric between runs of an architecture, without what a seed does to all of them.

    Attributes:
        deviation: the standard deviation with its 95 % interval.
        architectures, runs: number of architectures with several runs, and of their runs.
    """

    deviation: Estimate
    architectures: int
    runs: int


def run_noise(table: BenchmarkTable, metric: str) -> float:
    """Standard deviation of a metric between runs of an architecture; 0 if none has several. See `Noise`."""
    noise = _noise(table.short_runs, metric)
    return 0.0 if noise is None else noise.deviation.value


def noise_by_source(table: BenchmarkTable, metric: str) -> dict[str, Noise]:
    """Noise of the runs in which all that is random was varied, and of those in which the initial weights, the order of
    the images or the noise was alone, as far as the table has such runs."""
    runs = {"all": table.short_runs}
    for source in ("weights", "order", "noise"):
        protocol = table.protocol_where(varied=lambda value, source=source: value == source)
        if protocol is not None:
            runs[source] = table.runs_like(protocol)
    return {source: noise for source, of_source in runs.items() if (noise := _noise(of_source, metric)) is not None}


def _noise(runs: Mapping[str, Mapping[int, Run]], metric: str) -> Noise | None:
    scores = [[by_seed[s] for s in sorted(by_seed)] for by_seed in _scores(runs, metric).values() if len(by_seed) > 1]
    fitted = additive_fit(scores)
    if fitted is None:
        return None
    low, high = (fitted.variance * fitted.freedom / chi2.ppf(p, fitted.freedom) for p in (0.975, 0.025))
    deviation = Estimate(value=fitted.variance**0.5, low=low**0.5, high=high**0.5)
    return Noise(deviation, len(scores), sum(map(len, scores)))
