"""Table of training runs: every architecture of a space with its costs, its latency and the scores of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from optuna import Trial, TrialPruned
from pydantic import Field

from archsearch.protocol import MAX_CURVE_POINTS, ResolvedProtocol
from archsearch.score import Cost, Curve, LatencyRecord
from archsearch.spaces.space import Space
from snapgen.config import Config
from snapgen.errors import InputError

SECONDS = "seconds"
"""User attribute of an Optuna trial with the seconds that its runs took."""

SCORES = (
    "validation_loss",
    "frechet_distance",
    "frechet_error",
    "kernel_distance",
    "kernel_error",
    "retrieval_mrr",
    "retrieval_error",
)
"""Scores of a run: each metric, and its standard error where it is of samples."""

LOWER_IS_BETTER = {"validation_loss": True, "frechet_distance": True, "kernel_distance": True, "retrieval_mrr": False}
"""The metrics among them."""


ERROR_OF = {"frechet_distance": "frechet_error", "kernel_distance": "kernel_error", "retrieval_mrr": "retrieval_error"}
"""Their standard errors, of those that are of samples."""


class TableHeader(Config):
    """Everything that all rows of a table share."""

    format: Literal[1] = 1
    license: str = "CC-BY-4.0"
    space: dict[str, Any]
    """The space, as `Space.to_dict` writes it."""
    full_size: dict[str, Any] | None = None
    """The space of the full-size twins, whose costs are counted and whose latencies are predicted."""
    profiles: tuple[str, ...] = ()
    """Device profiles of the predicted latencies."""
    protocols: dict[str, ResolvedProtocol] = Field(min_length=1)
    """Protocols of the runs by hash; under the first, every architecture was trained."""
    num_runs: int = Field(ge=1)
    """Number of runs, by which a file that was cut off is told."""
    run_seconds: Literal["of trials", "timed"] = "of trials"
    """Whether the runs' durations are those of their trials, on machines that were busy or not, or were timed alike."""
    curve_points: int = Field(ge=0, le=MAX_CURVE_POINTS)
    """Evenly spaced steps at which the runs have a validation loss."""
    extractor: str
    """Feature extractor of the distances."""
    latency_device: str
    """Device of the latencies, as a study names it."""
    latency: LatencyRecord
    """Conditions of the latencies: the record of the first architecture."""
    machine: dict[str, Any] = Field(default={})
    """The machine that trained."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        seconds: duration of its trial, shared out to the trial's runs.
        scores: those of `SCORES` that it has.
    """

    architecture_id: str
    protocol_hash: str
    seed: int
    seconds: float
    diverged: bool
    scores: Mapping[str, float]
    curve: Curve


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        point: index of the choice of each knob.
        quartiles_ms: lower quartile, median and upper quartile of the latency.
        full_size: cost of the full-size twin.
        predicted_ms: its predicted latencies, by device profile.
    """

    id: str
    point: Mapping[str, int]
    cost: Cost
    quartiles_ms: tuple[float, float, float]
    full_size: Cost | None
    predicted_ms: Mapping[str, float]

    def number(self, name: str) -> float:
        """A cost, the median latency (``latency_ms``), a cost of the full-size twin (``full_size_…``), or its latency
        by a device profile."""
        if name in self.predicted_ms:
            return self.predicted_ms[name]
        if name == "latency_ms":
            return self.quartiles_ms[1]
        owner = self.full_size if name.startswith("full_size_") else self.cost
        return float(getattr(owner, name.removeprefix("full_size_")))


@dataclass(frozen=True)
class BenchmarkTable:
    """A complete table: every architecture of the space has a run of each of its first protocol's seeds.

    Attributes:
        source: the file, for error messages.
        space: the space of the architectures that were trained.
        entries: the architectures by id, in the order of the file.
    """

    source: str
    header: TableHeader
    space: Space
    entries: Mapping[str, Entry]
    runs: tuple[Run, ...]

    @property
    def protocol(self) -> ResolvedProtocol:
        """The protocol under which every architecture was trained."""
        return next(iter(self.header.protocols.values()))

    @cached_property
    def full_size(self) -> Space | None:
        """The space of the full-size twins, with this table's as its proxy."""
        if self.header.full_size is None:
            return None
        return Space.from_dict(self.header.full_size, source=self.source)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Seeds that every architecture was trained with."""
        return self.protocol.protocol.train_seeds

    @cached_property
    def short_runs(self) -> Mapping[str, Mapping[int, Run]]:
        """Runs under the first protocol, or one that differs in its seeds only, by architecture and seed."""
        return self.runs_like(self.protocol)

    def runs_like(self, protocol: ResolvedProtocol) -> dict[str, dict[int, Run]]:
        """Runs under a protocol, or one that differs in its seeds only, by architecture and seed."""
        wanted = without_seeds(protocol).hash
        hashes = {key for key, other in self.header.protocols.items() if without_seeds(other).hash == wanted}
        found: dict[str, dict[int, Run]] = {}
        for run in self.runs:
            if run.protocol_hash in hashes:
                found.setdefault(run.architecture_id, {})[run.seed] = run
        return found

    def protocol_where(self, **fields: Any) -> ResolvedProtocol | None:
        """The first protocol that differs from the table's own in these fields, among others; None if there is none.

        Args:
            **fields: names of fields of the protocol, with a function each that tells whether a value is wanted.
        """
        for resolved in list(self.header.protocols.values())[1:]:
            if all(wanted(getattr(resolved.protocol, name)) for name, wanted in fields.items()):
                return resolved
        return None

    def true_values(self, metric: str) -> dict[str, float]:
        """The best estimate of a metric of each architecture that did not diverge: its mean over `seeds`.

        Further runs of some architectures are left out: the draws of a seed suit some choices better than others, so
        means over unlike seeds are not comparable.
        """
        runs = {i: [by_seed[seed] for seed in self.seeds] for i, by_seed in self.short_runs.items()}
        known = {i: mean_scores(r) for i, r in runs.items()}
        return {i: scores[metric] for i, scores in known.items() if metric in scores}

    def numbers(self, name: str) -> dict[str, float]:
        """A metric of each architecture that did not diverge (`true_values`), or what `Entry.number` says of each."""
        if name in LOWER_IS_BETTER:
            return self.true_values(name)
        return {arch_id: entry.number(name) for arch_id, entry in self.entries.items()}

    def check_objectives(self, names: Sequence[str]) -> None:
        """Check that names are of numbers of this table that can be minimized.

        Raises:
            InputError: if one is not.
        """
        lower_is_better = (name for name, is_lower in LOWER_IS_BETTER.items() if is_lower and self.true_values(name))
        known = [*lower_is_better, "latency_ms", "params", "macs", *self.header.profiles]
        for name in names:
            if name not in known:
                raise InputError(self.source, f"has no objective {name!r:.60}", f"use {', '.join(known)}")

    def objective(
        self, names: Sequence[str] = ("validation_loss", "latency_ms"), *, seeds: Sequence[int] | None = None
    ) -> Callable[[Trial], tuple[float, ...]]:
        """An objective that looks its values up, for ``optuna.create_study(directions=["minimize", …])``.

        It asks for every knob, ordered ones as integers and others as categories, by the index of the choice. A trial
        whose choices are not valid in combination, or whose training diverged, is pruned. User attributes of a trial:
        ``seconds`` is the time that its training took, ``architecture_id`` its architecture's id.

        Args:
            names: numbers to minimize: scores of the short runs, ``latency_ms``, costs, or a profile of the predicted
                latencies.
            seeds: seeds of the runs whose mean a score is; None: the first of the table's.

        Raises:
            InputError: if a name or a seed is not in the table, or no seed is given.
        """
        seeds = self.seeds[:1] if seeds is None else tuple(seeds)
        remedy = f"use {', '.join(map(str, self.seeds))}"
        if unknown := [seed for seed in seeds if seed not in self.seeds]:
            raise InputError(self.source, f"has no seed {unknown[0]}", remedy)
        if not seeds:
            raise InputError("seeds", "is empty", remedy)
        self.check_objectives(names)

        def evaluate(trial: Trial) -> tuple[float, ...]:
            point = {
                knob.name: trial.suggest_int(knob.name, 0, len(knob.choices) - 1)
                if knob.ordered
                else trial.suggest_categorical(knob.name, range(len(knob.choices)))
                for knob in self.space.knobs
            }
            if not self.space.valid(point):
                raise TrialPruned
            entry = self.entries[self.space.architecture(point).id]
            runs = [self.short_runs[entry.id][seed] for seed in seeds]
            trial.set_user_attr(SECONDS, sum(run.seconds for run in runs))
            trial.set_user_attr("architecture_id", entry.id)
            scores = mean_scores(runs)
            if any(name in LOWER_IS_BETTER and name not in scores for name in names):
                raise TrialPruned
            return tuple(scores[name] if name in LOWER_IS_BETTER else entry.number(name) for name in names)

        return evaluate


def without_seeds(resolved: ResolvedProtocol) -> ResolvedProtocol:
    """A protocol by whose hash those are compared that may differ in their seeds."""
    protocol = resolved.protocol.model_copy(update={"train_seeds": (0,)})
    return resolved.model_copy(update={"protocol": protocol})


def mean_scores(runs: Sequence[Run]) -> dict[str, float]:
    """Mean over runs of each score that all of them have."""
    names = [name for name in SCORES if all(name in run.scores for run in runs)]
    return {name: sum(run.scores[name] for run in runs) / len(runs) for name in names} if runs else {}
