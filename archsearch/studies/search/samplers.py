"""Which point comes next: an Optuna sampler, made anew for every ask and shown the study in the order of its slots.

A sampler's suggestion depends on its random state and on the order of the trials it sees. Neither survives a kill:
the state is in the process, and a trial that is run again has a later number. So no sampler lives longer than one ask:
its seed comes from the study's seed, the slot and the attempt, and the trials it sees are a copy of the study in
memory, sorted by slot.
"""

from __future__ import annotations

import logging
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from archsearch.studies.config.study import SamplerConfig
from snapgen.errors import InputError
from snapgen.seeding import derive_seed

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler

    from archsearch.spaces.space import Space

_PRIVATE = "gp:"
"""System attributes that the GP sampler leaves for other processes; the copy does without."""


@dataclass(frozen=True)
class Past:
    """A candidate as the sampler sees it.

    Attributes:
        values: of the objectives; None where it was never taken. Ignored while the trial runs.
        excess: the most that it is over any limit, relative to it; at most 0: feasible. None: the study has no limits.
        system_attrs: what the sampler itself noted when it was asked, e.g. a generation.
    """

    slot: int
    point: Mapping[str, int]
    values: tuple[float | None, ...] = ()
    excess: float | None = None
    running: bool = False
    system_attrs: Mapping[str, Any] = field(default_factory=dict)


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Ordered knobs are integers to the sampler, others categories; both count the choices from 0."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    return {
        knob.name: IntDistribution(0, len(knob.choices) - 1)
        if knob.ordered
        else CategoricalDistribution(tuple(range(len(knob.choices))))
        for knob in space.knobs
    }


def build_sampler(
    settings: SamplerConfig, seed: int, *, slot: int = 0, sequence: int = 0, source: str = "study"
) -> BaseSampler:
    """The sampler of that name, freshly seeded.

    Args:
        slot: which element of a sequence is next, for those samplers that follow one.
        sequence: the seed of that sequence, the same for all its elements.

    Raises:
        InputError: naming an option that the sampler does not take.
    """
    from optuna import samplers

    seed, sequence = seed % (1 << 32), sequence % (1 << 32)  # numpy's
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        # Of tens of trials few should be spent on a random start; benchmarks/samplers.py has the figures.
        "gp": (samplers.GPSampler, {"n_startup_trials": 6, "warn_independent_sampling": False}),
        "tpe": (samplers.TPESampler, {"n_startup_trials": 6, "multivariate": True, "constant_liar": True}),
        "nsga2": (samplers.NSGAIISampler, {"population_size": 8}),
        "nsga3": (samplers.NSGAIIISampler, {"population_size": 8}),
        "random": (samplers.RandomSampler, {}),
        "qmc": (_qmc, {"slot": slot, "sequence": sequence, "scramble": True}),
    }
    kind, defaults = kinds[settings.name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental" says nothing to whoever runs a study
            made: BaseSampler = kind(**{**defaults, **settings.options, "seed": seed})
            return made
    except (TypeError, ValueError) as error:
        problem = f"{settings.name} refuses its options: {error}"
        raise InputError(source, problem, "correct or remove the option", place="sampler.options") from None


def _qmc(*, slot: int, sequence: int, seed: int, **options: Any) -> BaseSampler:
    from optuna.samplers import QMCSampler, RandomSampler

    class AtSlot(QMCSampler):
        """A low-discrepancy sequence whose next element is the slot's, not the one a shared counter says."""

        def _find_sample_id(self, study: Any, search_space: Any) -> int:  # noqa: ARG002
            return slot

    unordered = RandomSampler(seed=seed)
    return AtSlot(seed=sequence, independent_sampler=unordered, warn_independent_sampling=False, **options)


def suggest(
    settings: SamplerConfig,
    past: Sequence[Past],
    choices: Mapping[str, BaseDistribution],
    *,
    objectives: Sequence[str],
    seed: int,
    slot: int,
    attempt: int = 0,
    fixed: Mapping[str, int] | None = None,
    source: str = "study",
) -> tuple[dict[str, int], dict[str, Any]]:
    """The next point, and what the sampler wants to find at the trial when it is asked again.

    Args:
        past: every candidate that is known, in any order.
        objectives: their names.
        seed: the study's.
        attempt: of this slot; another attempt is another random state.
        fixed: a point that is set; the sampler is asked all the same, since some keep count of what they were asked.
    """
    import optuna

    fresh, sequence = derive_seed(seed, "sampler", slot, attempt), derive_seed(seed, "sequence", attempt)
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        sampler = build_sampler(settings, fresh, slot=slot, sequence=sequence, source=source)
        copy = optuna.create_study(directions=["minimize"] * len(objectives), sampler=sampler)
        copy.add_trials(_seen(past, choices, objectives))
        if fixed is not None:
            copy.enqueue_trial(dict(fixed))
        trial = copy.ask(dict(choices))
        noted = copy.get_trials(deepcopy=False)[-1].system_attrs
    attrs = {key: value for key, value in noted.items() if not key.startswith((_PRIVATE, "fixed_params"))}
    return {name: int(value) for name, value in trial.params.items()}, attrs


def _seen(past: Sequence[Past], choices: Mapping[str, BaseDistribution], objectives: Sequence[str]) -> list[Any]:
    from optuna.trial import TrialState, create_trial

    limited = any(p.excess is not None for p in past)
    usual = [_usual(past, i) for i in range(len(objectives))]
    trials = []
    for p in sorted(past, key=lambda p: p.slot):
        # An infeasible candidate was never trained. Its place in the middle says nothing about quality either way;
        # the limit it broke is what the sampler learns from it.
        values = None if p.running else [u if v is None else v for u, v in zip(usual, p.values, strict=True)]
        trials.append(
            create_trial(
                state=TrialState.RUNNING if p.running else TrialState.COMPLETE,
                params=dict(p.point),
                distributions=dict(choices),
                values=[_scaled(v, name) for v, name in zip(values, objectives, strict=True)] if values else None,
                constraints={"excess": p.excess or 0.0} if limited and not p.running else None,
                system_attrs=dict(p.system_attrs),
            )
        )
    return trials


def _usual(past: Sequence[Past], i: int) -> float:
    known = [value for p in past if not p.running and (value := p.values[i]) is not None]
    return statistics.median(known) if known else 1.0


def _scaled(value: float, objective: str) -> float:
    """Costs and times as logarithms: they span decades, and a knob multiplies them."""
    return math.log(value) if objective in ("latency_ms", "params", "macs", "activation_bytes") and value > 0 else value


class _silent:
    """Optuna says "a new study created in memory" at every ask otherwise."""

    def __enter__(self) -> None:
        import optuna

        self._level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        import optuna

        optuna.logging.set_verbosity(self._level)
