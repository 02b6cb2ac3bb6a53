"""Compare an evolving study with another search: the best network of each at the target, for equal training compute."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from archsearch.reports.evolution.data import Evolution
from archsearch.reports.evolution.tables import format_latency, format_tera, latency_column
from archsearch.reports.rendering import formatting
from archsearch.reports.rendering.tables import Table
from archsearch.reports.study.data import StudyData
from archsearch.score import LatencyRecord
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import independent_difference, verdict

METRIC = "validation_loss"
"""The metric compared: both studies compute it on the same validation pairs."""

_FIELDS = ("resolution", "context_tokens", "validation_pairs", "prediction_type", "timestep_shift")
_DIGESTS = ("data_digest", "autoencoder_digest", "text_encoder_digest", "revision")


@dataclass(frozen=True)
class BaselineEntry:
    """A scored network and the training compute that its study had spent by then.

    Attributes:
        title: display name.
        quality: its `METRIC`.
        latency: its latency.
        training_macs: training MACs of the study up to and including this network.
    """

    title: str
    quality: Estimate
    latency: LatencyRecord
    training_macs: float


@dataclass(frozen=True)
class BaselineComparison:
    """An evolving study and the search that it is compared with.

    Attributes:
        evolution: the evolving study.
        baseline: the other study.
        evolution_entries: networks of the evolution, in the order of its rounds.
        baseline_entries: feasible trained networks of the other study, in the order of their slots.
        mismatch: why the numbers of the two are not comparable; empty if they are.
        remarks: differences that do not prevent the comparison.
    """

    evolution: Evolution
    baseline: StudyData
    evolution_entries: tuple[BaselineEntry, ...]
    baseline_entries: tuple[BaselineEntry, ...]
    mismatch: str
    remarks: tuple[str, ...]

    @property
    def budget(self) -> float:
        """Training MACs that both studies have spent."""
        return min(self.evolution_entries[-1].training_macs, self.baseline_entries[-1].training_macs)

    @property
    def introduction(self) -> str:
        """Text that explains the table."""
        name, limit = self.evolution.study.name, formatting.number(self.evolution.settings.max_ms)
        return (
            f"Networks with the lowest validation loss at a latency of at most {limit} ms (the target plus its "
            f"tolerance). “Equal for both” counts only the first {format_tera(self.budget)} TMACs of training of each "
            f"study, in the order of its trials. The verdict is that of {name} against {self.baseline.name}, for these "
            "networks as they were trained: another training may give another one."
        )

    @property
    def table(self) -> Table:
        """The best network of each study at or below the target, for equal and for all compute."""
        names = (self.evolution.study.name, self.baseline.name)
        sides = (self.evolution_entries, self.baseline_entries)
        cells = []
        for title, budget in (("equal for both", self.budget), ("all of each", math.inf)):
            best = [_best(entries, self.evolution.settings.max_ms, budget) for entries in sides]
            spent = [[e.training_macs for e in entries if e.training_macs <= budget] for entries in sides]
            # The verdict compares both rows, so only the first one shows it.
            verdicts = (_verdict(*best), "")
            for name, entry, macs, verdict_text in zip(names, best, spent, verdicts, strict=True):
                numbers = ["–", "–"]
                if entry:
                    numbers = [formatting.format_interval(entry.quality), format_latency(entry.latency)]
                used = format_tera(max(macs, default=0.0))
                cells.append([title, name, entry.title if entry else "none", verdict_text, *numbers, used])
        numbers = ["Validation loss [95 % interval]", latency_column(self.evolution), "TMACs used"]
        header = ["Training compute", "Study", "Best at the target", "Verdict", *numbers]
        return Table(header, cells, text_columns=4)


def compare(evolution: Evolution, baseline: StudyData) -> BaselineComparison:
    """Compare an evolving study with another study."""
    evolution_entries = tuple(_rounds(evolution))
    baseline_entries = tuple(_candidates(baseline))
    mismatch = _mismatch(evolution, baseline, evolution_entries, baseline_entries)
    remarks = tuple(_remarks(evolution, baseline))
    return BaselineComparison(evolution, baseline, evolution_entries, baseline_entries, mismatch, remarks)


def _verdict(evolved: BaselineEntry | None, baseline: BaselineEntry | None) -> str:
    """Verdict on the evolved network against the baseline, by the intervals of both."""
    if not evolved or not baseline:
        return "cannot tell"
    # Both use the same validation pairs, but the losses per pair that a paired comparison needs are not stored.
    difference = independent_difference(evolved.quality, baseline.quality)
    return f"{verdict(difference)}: {formatting.format_change(difference, relative=False)}"


def _best(entries: tuple[BaselineEntry, ...], max_ms: float, budget: float) -> BaselineEntry | None:
    eligible = [e for e in entries if e.latency.median_ms <= max_ms and e.training_macs <= budget]
    return min(eligible, key=lambda e: e.quality.value, default=None)


def _rounds(evolution: Evolution) -> list[BaselineEntry]:
    return [
        BaselineEntry(f"round {r.round.number}", quality, r.latency, evolution.cumulative_macs[r.round.number])
        for r in evolution.rounds
        if r.latency and (quality := r.quality(METRIC))
    ]


def _candidates(study: StudyData) -> list[BaselineEntry]:
    """Feasible trained candidates in the order of their slots; a reused one adds no compute.

    If the candidates inherit the weights of a trained supernet, its training is counted first.
    """
    trained = [c for c in study.candidates if c.score.quality]
    protocol = study.attrs["protocol"]["protocol"]
    images = float(protocol["steps"] * protocol["batch_size"])  # of one run
    # Forward and backward passes together cost about three forward passes.
    supernet_macs = 3.0 * _supernet_images(study.attrs) * (_base_macs(study) or 0)
    costs = [0.0 if c.is_reused else 3.0 * c.score.cost.macs * images * c.runs for c in trained]
    return [
        BaselineEntry(c.name or f"trial {c.number}", c.score.quality.validation_loss, c.score.latency, training_macs)
        for c, training_macs in zip(
            trained, (supernet_macs + macs for macs in itertools.accumulate(costs)), strict=True
        )
        if c.score.quality and c.score.latency and not c.infeasible and not c.score.quality.diverged
    ]


def _supernet_images(attrs: Mapping[str, Any]) -> float:
    """Number of images that the supernet was trained on whose weights the candidates inherit; 0 without one."""
    return float((attrs["settings"].get("supernet_audit") or {}).get("supernet_images", 0))


def _base_macs(study: StudyData) -> int | None:
    return next((c.score.cost.macs for c in study.distinct if c.architecture.id == study.base.id), None)


def _mismatch(
    evolution: Evolution,
    baseline: StudyData,
    evolution_entries: tuple[BaselineEntry, ...],
    baseline_entries: tuple[BaselineEntry, ...],
) -> str:
    if not evolution_entries or not baseline_entries:
        return "One of the studies has no network with both a latency and a validation loss."
    a, b = (study.attrs["protocol"] for study in (evolution.study, baseline))
    for name, (x, y) in {
        **{n: (a["protocol"].get(n), b["protocol"].get(n)) for n in _FIELDS},
        **{n: (a.get(n), b.get(n)) for n in _DIGESTS},
    }.items():
        if x != y:
            return f"The validation losses are not comparable: {name} is {x} here, {y} there."
    conditions, baseline_conditions = evolution_entries[-1].latency.conditions, baseline_entries[-1].latency.conditions
    pairs = zip(conditions, baseline_conditions, strict=True)
    difference = next((f"{x} here, {y} there" for x, y in pairs if x != y), None)
    return f"The latencies are not comparable: {difference}." if difference else ""


def _remarks(evolution: Evolution, baseline: StudyData) -> list[str]:
    a, b = (study.attrs["protocol"]["protocol"] for study in (evolution.study, baseline))
    different_fields = [
        f"{n} {a.get(n)} here, {b.get(n)} there" for n in sorted({*a, *b} - {*_FIELDS}) if a.get(n) != b.get(n)
    ]
    remarks = [
        "The data, the validation pairs and their number are the same; the training may differ.",
        "Training compute is forward MACs × 3 × images; it excludes sampling, block importance and failed attempts.",
        "Each network is the best of several by the number shown, so that number is slightly optimistic.",
    ]
    if different_fields:
        remarks.insert(1, f"Different settings: {'; '.join(different_fields)}.")
    if a.get("init_from"):
        remarks.append("The training of the network that the evolution starts from is not counted.")
    if b.get("init_from") and not (_supernet_images(baseline.attrs) and _base_macs(baseline)):
        remarks.append(f"The training of the network whose weights {baseline.name} inherits is not counted.")
    if evolution.study.attrs["space"] != baseline.attrs["space"]:
        remarks.insert(1, "The two studies search different spaces.")
    return remarks
