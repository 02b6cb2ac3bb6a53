"""Suggest the next point with an Optuna sampler that is rebuilt for every suggestion.

A sampler's suggestion depends on its random state and on the order of the trials it sees. Neither survives a kill: the
state is lost with the process, and a trial that is run again gets a later number. Therefore each sampler makes one
suggestion only: its seed is derived from the study's seed, the slot and the attempt, and it sees an in-memory copy of
the study whose trials are sorted by slot.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import optuna
from optuna import samplers
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, QMCSampler, RandomSampler
from optuna.trial import TrialState, create_trial

from archsearch.samplers import EHVISampler
from archsearch.samplers.balanced import balanced_order
from archsearch.samplers.grid import Grid
from archsearch.score import QUALITY_METRICS
from archsearch.spaces.knob import Knob
from archsearch.spaces.space import LARGEST_COUNT, Space
from archsearch.spaces.summary import KnobSummary
from archsearch.studies.config.study import SamplerConfig
from archsearch.studies.storage.database import silence_optuna
from snapgen.errors import InputError
from snapgen.seeding import derive_seed

_GP_ATTRS = "gp:"
"""Prefix of system attributes that the GP sampler stores for other processes; they are not copied."""


@dataclass(frozen=True)
class ObservedTrial:
    """A candidate as the sampler sees it.

    Attributes:
        slot: index in the study's plan.
        point: index of the choice of each knob.
        values: values of the objectives; None where one was never measured. Ignored while the trial runs.
        runs: number of training runs behind its quality, or that would tell as much.
        excess: largest relative excess over any limit; at most 0: feasible. None: the study has no limits.
        sampler_attrs: attributes that the sampler itself stored, e.g. a generation.
    """

    slot: int
    point: Mapping[str, int]
    values: tuple[float | None, ...] = ()
    excess: float | None = None
    running: bool = False
    runs: float = 1
    sampler_attrs: Mapping[str, Any] = field(default_factory=dict)

    def shifted(self, objective: int, by: float) -> ObservedTrial:
        """The candidate with the value of one objective changed, if it has one."""
        if self.running or self.values[objective] is None:
            return self
        values = [v + by if i == objective and v is not None else v for i, v in enumerate(self.values)]
        return replace(self, values=tuple(values))

    @property
    def params(self) -> Mapping[str, int]:
        """The point, by the name that it has as an `archsearch.samplers.ehvi.TriedPoint`."""
        return self.point

    @property
    def user_attrs(self) -> Mapping[str, float]:
        """Number of runs, as a `TriedPoint` has it."""
        return {"runs": self.runs}

    @cached_property
    def state(self) -> TrialState:
        """Running; complete if all values were measured, else pruned."""
        if self.running:
            return TrialState.RUNNING
        return TrialState.PRUNED if None in self.values else TrialState.COMPLETE


def distributions(knobs: Iterable[Knob | KnobSummary]) -> dict[str, BaseDistribution]:
    """Optuna distribution of each knob: integers for ordered knobs, else categories; both index the choices from 0."""
    return {
        knob.name: IntDistribution(0, len(knob.choices) - 1)
        if knob.ordered
        else CategoricalDistribution(tuple(range(len(knob.choices))))
        for knob in knobs
    }


def build_sampler(
    settings: SamplerConfig,
    seed: int,
    *,
    slot: int = 0,
    sequence: int = 0,
    known: Mapping[str, Any] | None = None,
    source: str = "study",
) -> BaseSampler:
    """Build a freshly seeded sampler.

    Args:
        slot: index of the next element, for samplers that follow a sequence (qmc).
        sequence: seed of that sequence, the same for all its elements.
        known: what is known of points before they are tried, as arguments of `EHVISampler` (ehvi); None: nothing.

    Raises:
        InputError: if the sampler does not accept an option.
    """
    seed, sequence = seed % (1 << 32), sequence % (1 << 32)  # NumPy takes 32-bit seeds
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "ehvi": (EHVISampler, {}),
        # With tens of trials few should be spent on random startup; Optuna's own default is ten.
        "gp": (samplers.GPSampler, {"n_startup_trials": 6, "warn_independent_sampling": False}),
        "tpe": (samplers.TPESampler, {"n_startup_trials": 6, "multivariate": True, "constant_liar": True}),
        "nsga2": (samplers.NSGAIISampler, {"population_size": 8}),
        "nsga3": (samplers.NSGAIIISampler, {"population_size": 8}),
        "random": (samplers.RandomSampler, {}),
        "qmc": (_qmc, {"slot": slot, "sequence": sequence, "scramble": True}),
        "grid": (_grid, {}),
    }
    kind, defaults = kinds[settings.name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ExperimentalWarning, which users cannot act on
            knowledge = (known or _NOTHING_KNOWN) if settings.name == "ehvi" else {}
            sampler: BaseSampler = kind(**{**defaults, **settings.options, **knowledge, "seed": seed})
            return sampler
    except (TypeError, ValueError) as error:
        problem = f"sampler {settings.name} does not accept its options: {error}"
        raise InputError(source, problem, "correct or remove the option", place="sampler.options") from None


_NOTHING_KNOWN: Mapping[str, Any] = {"known": lambda _: {}, "objectives": (None, "latency_ms")}


def _qmc(*, slot: int, sequence: int, seed: int, **options: Any) -> BaseSampler:
    class AtSlot(QMCSampler):
        """Low-discrepancy sequence indexed by the slot instead of a counter that all workers share."""

        def _find_sample_id(self, study: Any, search_space: Any) -> int:  # noqa: ARG002
            return slot

    for_categories = RandomSampler(seed=seed)
    return AtSlot(seed=sequence, independent_sampler=for_categories, warn_independent_sampling=False, **options)


def _grid(*, seed: int) -> BaseSampler:
    """Asked only where a point of `every_point` cannot be scored: it takes no options."""
    return RandomSampler(seed=seed)


def every_point(space: Space, first: Sequence[Mapping[str, int]], *, seed: int, source: str) -> list[dict[str, int]]:
    """A point of each architecture of a space that is not that of one of the first points, in a balanced order.

    Args:
        first: points that are tried first.
        seed: the study's seed.
        source: the study's file, for the error message.

    Raises:
        InputError: if the space has too many points.
    """
    if space.size() > LARGEST_COUNT:
        problem = f"is grid, but {space.name} has {space.size():,} points; at most {LARGEST_COUNT:,} are enumerated"
        raise InputError(source, problem, "name another sampler, or a smaller space", place="sampler")
    seen = {space.architecture(point).id for point in first}
    others = [point for point in space.distinct_points() if space.architecture(point).id not in seen]
    grid = Grid(distributions(space.knobs))
    order = balanced_order(
        grid, grid.rows([*first, *others]), first=len(first), seed=derive_seed(seed, "grid") % (1 << 32)
    )
    return [grid.params(row) for row in order[len(first) :]]


def suggest(
    settings: SamplerConfig,
    past: Sequence[ObservedTrial],
    choices: Mapping[str, BaseDistribution],
    *,
    objectives: Sequence[str],
    seed: int,
    slot: int,
    attempt: int = 0,
    fixed: Mapping[str, int] | None = None,
    known: Mapping[str, Any] | None = None,
    source: str = "study",
) -> tuple[dict[str, int], dict[str, Any]]:
    """Suggest the next point.

    Args:
        past: all candidates so far, in any order.
        choices: distribution of each knob.
        objectives: names of the objectives.
        seed: the study's seed.
        slot: index in the study's plan.
        attempt: how often this slot was suggested for; each attempt has its own random state.
        fixed: a point to use; the sampler is asked all the same, since some samplers count their suggestions.
        known: what is known of points before they are tried; see `build_sampler`.

    Returns:
        The point, and the system attributes that the sampler needs when it is asked again.
    """
    own_seed, sequence = derive_seed(seed, "sampler", slot, attempt), derive_seed(seed, "sequence", attempt)
    with warnings.catch_warnings(), silence_optuna():
        warnings.simplefilter("ignore")
        sampler = build_sampler(settings, own_seed, slot=slot, sequence=sequence, known=known, source=source)
        if isinstance(sampler, EHVISampler) and (fixed is not None or past):
            # Our own sampler needs no copy of the study.
            point = fixed if fixed is not None else sampler.suggest(Grid(choices), past)
            return {name: int(value) for name, value in point.items()}, {}
        copy = optuna.create_study(directions=["minimize"] * len(objectives), sampler=sampler)
        copy.add_trials(_as_trials(past, choices, objectives))
        if fixed is not None:
            copy.enqueue_trial(dict(fixed))
        trial = copy.ask(dict(choices))
        stored = copy.get_trials(deepcopy=False)[-1].system_attrs
    attrs = {key: value for key, value in stored.items() if not key.startswith((_GP_ATTRS, "fixed_params"))}
    return {name: int(value) for name, value in trial.params.items()}, attrs


def _as_trials(
    past: Sequence[ObservedTrial], choices: Mapping[str, BaseDistribution], objectives: Sequence[str]
) -> list[Any]:
    """Frozen Optuna trials of the candidates, sorted by slot."""
    limited = any(p.excess is not None for p in past)
    known = [[v for p in past if not p.running and (v := p.values[i]) is not None] for i in range(len(objectives))]
    medians = [statistics.median(values) if values else 1.0 for values in known]
    trials = []
    for p in sorted(past, key=lambda p: p.slot):
        # An infeasible candidate was never trained. The median as its value carries no information about quality; the
        # sampler learns from the constraint that it broke.
        measured = () if p.running else zip(p.values, medians, objectives, strict=True)
        numbers = [(median if v is None else v, name) for v, median, name in measured]
        # Costs and times span decades, and knobs multiply them.
        values = [math.log(v) if name not in QUALITY_METRICS and v > 0 else v for v, name in numbers] or None
        trials.append(
            create_trial(
                state=TrialState.RUNNING if p.running else TrialState.COMPLETE,
                params=dict(p.point),
                distributions=dict(choices),
                values=values,
                constraints={"excess": p.excess or 0.0} if limited and not p.running else None,
                system_attrs=dict(p.sampler_attrs),
            )
        )
    return trials
