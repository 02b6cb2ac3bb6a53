"""An evolving study beside a search of another kind: the best of each at the target, for the same training compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archsearch.reports.evolution.data import Evolution
from archsearch.reports.evolution.tables import milliseconds, tera
from archsearch.reports.rendering import formatting
from archsearch.reports.study.data import StudyData
from archsearch.score import LatencyRecord
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import verdict

METRIC = "validation_loss"
"""What both have, of the same pairs."""

_FIELDS = ("resolution", "context_tokens", "validation_pairs", "prediction", "shift")
_DIGESTS = ("data_digest", "autoencoder_digest", "text_digest", "revision")

COLUMNS = ("Training compute", "Study", "Best at the target", "Verdict", "Validation loss", "ms", "TMACs used")
WORDS = 4
"""Columns of it that hold words."""


@dataclass(frozen=True)
class BaselineEntry:
    """A network, and what all training up to it took.

    Attributes:
        title: what to call it.
        spent: training MACs of the study up to and with it.
    """

    title: str
    quality: Estimate
    latency: LatencyRecord
    spent: float


@dataclass(frozen=True)
class BaselineComparison:
    """An evolving study and another one in the same plane.

    Attributes:
        refused: why their numbers do not compare; empty: they do.
        remarks: what is not the same in both, and yet compared as found.
    """

    evolution: Evolution
    other: StudyData
    ours: tuple[BaselineEntry, ...]
    theirs: tuple[BaselineEntry, ...]
    refused: str
    remarks: tuple[str, ...]

    @property
    def budget(self) -> float:
        """The training MACs that both have spent."""
        return min(self.ours[-1].spent, self.theirs[-1].spent)


def compare(evolution: Evolution, other: StudyData) -> BaselineComparison:
    """Another study beside an evolving one."""
    ours = tuple(_rounds(evolution))
    theirs = tuple(_candidates(other))
    refused = _refused(evolution, other, ours, theirs)
    return BaselineComparison(evolution, other, ours, theirs, refused, tuple(_remarks(evolution, other)))


def rows(rivals: BaselineComparison) -> list[list[str]]:
    """The best of each at or under the target, for the same training compute and for all that each took."""
    most = rivals.evolution.settings.most_ms
    names = (rivals.evolution.facts.name, rivals.other.name)
    found = []
    for told, budget in (("the same for both", rivals.budget), ("all that each took", math.inf)):
        best = [_best(entries, most, budget) for entries in (rivals.ours, rivals.theirs)]
        used = [max((e.spent for e in side if e.spent <= budget), default=0.0) for side in (rivals.ours, rivals.theirs)]
        decided = _decided(*best)
        for name, entry, macs, said in zip(names, best, used, (decided, ""), strict=True):
            numbers = [formatting.format_interval(entry.quality), milliseconds(entry.latency)] if entry else ["–", "–"]
            found.append([told, name, entry.title if entry else "none", said, *numbers, tera(macs)])
    return found


def introduction(rivals: BaselineComparison) -> str:
    """What the table says, in a sentence or two."""
    limit = formatting.number(rivals.evolution.settings.most_ms)
    return (
        f"The lowest validation loss at {limit} ms or under, the target and its tolerance. The same for both: the "
        f"first {tera(rivals.budget)} TMACs of each one's training, in the order of its trials. The verdict is on "
        f"{rivals.evolution.facts.name} against {rivals.other.name}."
    )


def _decided(ours: BaselineEntry | None, theirs: BaselineEntry | None) -> str:
    """The evolved one against the other, by their intervals."""
    if not ours or not theirs:
        return "cannot tell"
    a, b = ours.quality, theirs.quality
    value = a.value - b.value
    # Independent, as far as is known: the pairs are the same, but what each says of them is not kept.
    low, high = (
        value - math.hypot(a.value - a.low, b.high - b.value),
        value + math.hypot(a.high - a.value, b.value - b.low),
    )
    difference = Estimate(value=value, low=low, high=high)
    return f"{verdict(difference)}: {formatting.format_change(difference, relative=False)}"


def _best(entries: tuple[BaselineEntry, ...], most_ms: float, budget: float) -> BaselineEntry | None:
    able = [e for e in entries if e.latency.median_ms <= most_ms and e.spent <= budget]
    return min(able, key=lambda e: e.quality.value, default=None)


def _rounds(evolution: Evolution) -> list[BaselineEntry]:
    return [
        BaselineEntry(f"round {s.round.number}", quality, s.latency, evolution.spent[s.round.number])
        for s in evolution.steps
        if s.latency and (quality := s.quality(METRIC))
    ]


def _candidates(facts: StudyData) -> list[BaselineEntry]:
    """Those that were trained and keep the limits, in the order of their slots; a reused one costs nothing.

    Where candidates inherit a trained net's weights, its training comes first.
    """
    trained = [c for c in facts.candidates if c.score.quality]
    images = _images(facts.attrs)
    first = 3.0 * _inherited_images(facts.attrs) * (_base_macs(facts) or 0)
    costs = [0.0 if c.reused_from is not None else 3.0 * c.score.cost.macs * images for c in trained]
    return [
        BaselineEntry(c.name or f"trial {c.number}", c.score.quality.validation_loss, c.score.latency, spent)
        for c, spent in zip(trained, (first + macs for macs in itertools.accumulate(costs)), strict=True)
        if c.score.quality and c.score.latency and c.feasible and not c.score.quality.diverged
    ]


def _inherited_images(attrs: Mapping[str, Any]) -> float:
    """That the net was trained on whose weights a search's candidates begin with."""
    return float((attrs["settings"].get("elastic") or {}).get("supernet_images", 0))


def _base_macs(facts: StudyData) -> int | None:
    return next((c.score.cost.macs for c in facts.distinct if c.architecture.id == facts.base.id), None)


def _images(attrs: Mapping[str, Any]) -> float:
    """That every candidate of a search is trained on, seeds and all."""
    protocol = attrs["protocol"]["protocol"]
    return float(protocol["steps"] * protocol["batch"] * len(protocol["seeds"]))


def _refused(
    evolution: Evolution, other: StudyData, ours: tuple[BaselineEntry, ...], theirs: tuple[BaselineEntry, ...]
) -> str:
    if not ours or not theirs:
        return "One of them has no network with both a latency and a validation loss."
    a, b = (facts.attrs["protocol"] for facts in (evolution.facts, other))
    for name, (x, y) in {
        **{n: (a["protocol"].get(n), b["protocol"].get(n)) for n in _FIELDS},
        **{n: (a.get(n), b.get(n)) for n in _DIGESTS},
    }.items():
        if x != y:
            return f"Their validation losses do not compare: {name} is {x} here, {y} there."
    here, there = ours[-1].latency.conditions, theirs[-1].latency.conditions
    apart = next((f"{x} against {y}" for x, y in zip(here, there, strict=True) if x != y), None)
    return f"Their latencies do not compare: {apart}." if apart else ""


def _remarks(evolution: Evolution, other: StudyData) -> list[str]:
    a, b = (facts.attrs["protocol"]["protocol"] for facts in (evolution.facts, other))
    apart = [f"{n} {a.get(n)} here, {b.get(n)} there" for n in sorted({*a, *b} - {*_FIELDS}) if a.get(n) != b.get(n)]
    found = [
        "Numbers of different training are compared as found; data, pairs and their number are the same.",
        "Training compute is forward MACs × 3 × images, without that of sampling, valuing blocks and failed attempts.",
        "Each is the best of several by the very number that it is shown with, and so a little flattered.",
    ]
    if apart:
        found.insert(1, f"Not the same: {'; '.join(apart)}.")
    if a.get("inherit"):
        found.append("What the network took that the evolution began with is not in its compute.")
    if b.get("inherit") and not (_inherited_images(other.attrs) and _base_macs(other)):
        found.append(f"What the network took whose weights {other.name} inherits is not in its compute.")
    if evolution.facts.attrs["space"] != other.attrs["space"]:
        found.insert(1, "They do not search the same space.")
    return found
