"""Numbers that a study knows of an architecture before it is tried: its costs, and a latency that is predicted."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from archsearch.cost.counter import cost
from archsearch.devices import backend
from archsearch.predictor.backend import PredictedBackend
from archsearch.samplers.grid import Grid, Params
from archsearch.samplers.screening import Screening
from archsearch.score import QUALITY_METRICS, Cost, LatencyRecord
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.samplers import distributions
from archsearch.studies.storage.record import Candidate
from snapgen.architecture.schema import Architecture
from snapgen.io.cache import JSON, cached_tensors

COSTS = ("params", "macs", "activation_bytes")
"""Numbers of a score that are counted."""

CACHE_REVISION = 1
"""Raised when a count changes, so that older entries of the cache are not used."""


class KnownCosts:
    """Known numbers of a space's points, for `archsearch.samplers.ehvi.EHVISampler`.

    Counting one architecture takes about 0.1 s, so the sample that predicts the others is kept in the disk cache.

    Args:
        numbers: known numbers of all architectures by id, where nothing has to be counted.
    """

    def __init__(
        self, settings: StudyConfig, space: Space, *, numbers: Mapping[str, dict[str, float]] | None = None
    ) -> None:
        self._settings, self._space = settings, space
        self._screening = Screening(self)
        self._numbers = dict(numbers or {})
        self._ids: dict[Any, str | None] = {}
        self._choices = operator.itemgetter(*(knob.name for knob in space.knobs))

    def observe(self, trial: Candidate) -> None:
        """Take an ended trial's architecture and numbers from its record; they need not be counted again."""
        self._ids[self._choices(trial.point)] = trial.architecture.id
        latency = trial.score.latency if self._predictor else None
        if self._predictor is None or latency is not None:
            self._screening.learn(trial.point, known_numbers(trial.score.cost, latency))

    def sampler_arguments(self) -> dict[str, Any]:
        """Arguments of the sampler for the study."""
        if not self._numbers:
            self._numbers = self._sample()
        objectives = [None if name in QUALITY_METRICS else name for name in self._settings.objectives]
        bounded = {*self._names, *objectives}
        limits = {name: bound for name, bound in upper_bounds(self._settings, self._space).items() if name in bounded}
        return {
            "known": self,
            "objectives": objectives,
            "limits": limits,
            "screening": self._screening,
            "identity": self._identity,
        }

    def __call__(self, point: Params) -> Mapping[str, float] | None:
        """The known numbers of a point; None if its choices are not valid in combination."""
        arch = self._architecture(point)
        if arch is None:
            return None
        if arch.id not in self._numbers:
            self._numbers[arch.id] = self._count(arch)
        return self._numbers[arch.id]

    def _identity(self, point: Params) -> str | None:
        """Id of a point's architecture; None if its choices are not valid in combination."""
        key = self._choices(point)
        if key not in self._ids:
            arch = self._architecture(point)
            self._ids[key] = arch.id if arch else None
        return self._ids[key]

    def _architecture(self, point: Params) -> Architecture | None:
        try:
            return self._space.architecture(point)
        except ValueError:
            return None

    def _count(self, arch: Architecture) -> dict[str, float]:
        return count_numbers(arch, self._space.latent_size, self._space.context_tokens, self._predictor)

    @property
    def _names(self) -> list[str]:
        """Names of the known numbers."""
        return [*COSTS, *(["latency_ms"] if self._predictor else [])]

    @cached_property
    def _predictor(self) -> PredictedBackend | None:
        latency = self._settings.latency
        if latency.remote or not latency.device.startswith("predicted:"):
            return None
        built = backend(latency.device, **latency.backend_options)
        return built if isinstance(built, PredictedBackend) else None

    def _sample(self) -> dict[str, dict[str, float]]:
        """Numbers of the architectures of the screening's sample, by id, from the cache if it has them."""
        grid = Grid(distributions(self._space.knobs))
        rows = self._screening.sample(grid, lambda row: self._space.valid(grid.params(row)))
        points = [grid.params(row) for row in rows]
        archs = {arch.id: arch for point in points if (arch := self._architecture(point))}
        names = self._names

        def count() -> dict[str, torch.Tensor]:
            counted = [self._count(arch) for arch in archs.values()]
            return {"numbers": torch.tensor([[c[name] for name in names] for c in counted], dtype=torch.float64)}

        key: dict[str, JSON] = {
            "revision": CACHE_REVISION,
            "space": self._space.digest,
            "ids": list(archs),
            "predictor": self._predictor.model.to_json() if self._predictor else None,
        }
        table = np.asarray(cached_tensors("costs", key, count)["numbers"])
        return {i: dict(zip(names, map(float, row), strict=True)) for i, row in zip(archs, table, strict=True)}


def count_numbers(
    arch: Architecture, latent_size: int, context_tokens: int, predictor: PredictedBackend | None
) -> dict[str, float]:
    """Count an architecture's `known_numbers`; its latency is one of them if there is a predictor."""
    latency = predictor.measure(arch, latent_size, context_tokens) if predictor else None
    return known_numbers(cost(arch, latent_size, context_tokens=context_tokens), latency)


def known_numbers(cost: Cost, latency: LatencyRecord | None) -> dict[str, float]:
    """Numbers of a candidate that are known before it is trained, for the model of quality, which takes logarithms.

    Args:
        cost: its costs, of which each is at least 1 here.
        latency: its predicted latency; None: it is measured, and so not known.
    """
    numbers = {name: float(max(1, getattr(cost, name))) for name in COSTS}
    return numbers if latency is None else {**numbers, "latency_ms": latency.median_ms}


def upper_bounds(settings: StudyConfig, space: Space) -> dict[str, float]:
    """Upper bound on each constrained number: the space's or the study's, whichever is lower."""
    bounds = [*space.constraints.items(), *settings.constraints.items()]
    return {name: min(bound for n, bound in bounds if n == name) for name, _ in bounds}
