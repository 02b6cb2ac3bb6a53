"""Effects of the knobs on what can be counted, without estimating: costs, and a latency that is predicted.

Each knob of a few candidates is changed to each of its other choices, with the candidate's other choices as they are,
and the result is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from archsearch.predictor.backend import PredictedBackend, model_behind
from archsearch.predictor.model import LatencyModel
from archsearch.score import LatencyRecord
from archsearch.spaces.summary import KnobSummary
from archsearch.stats.estimate import Estimate
from archsearch.stats.main_effects import Effect, Effects, Knob, changes
from archsearch.studies.search.known_costs import COSTS, count_numbers
from snapgen.architecture.overrides import apply_overrides
from snapgen.architecture.schema import Architecture
from snapgen.io.cache import JSON, cached_tensors
from snapgen.progress import ProgressLog

Array = NDArray[np.float64]
Point = Mapping[str, int]
Count = Callable[[Architecture], Mapping[str, float]]
"""Counts an architecture's numbers, all positive."""

CACHE_REVISION = 1
"""Raised when a count changes, so that older entries of the cache are not used."""
MAX_COUNTED = 60
"""Architectures that are counted for the effects at most, unless one candidate has more neighbors."""
MAX_CANDIDATES = 3
"""Candidates whose neighbors are counted at most."""


@dataclass(frozen=True)
class CountedNeighbors:
    """Numbers of some candidates and of all points that differ from one of them in a single knob.

    Attributes:
        factors: the knobs.
        logarithms: the logarithm of each number with each choice of each knob, by the names of number and knob,
            (candidates, choices); NaN where the choices are not valid in combination.
    """

    factors: Sequence[KnobSummary]
    logarithms: Mapping[str, Mapping[str, Array]]

    def effects(self, name: str) -> Effects:
        """Relative effects of all knobs on a number, each with its smallest and its largest size."""
        tables = self.logarithms[name]
        # The variance of a knob's main effect over equally frequent choices, as a share of that of all knobs.
        variances = {f.name: _variance(tables[f.name]) for f in self.factors}
        total = sum(variances.values()) or 1.0
        knobs = [
            Knob(f.name, Estimate.exact(variances[f.name] / total), _effects(f, tables[f.name])) for f in self.factors
        ]
        knobs.sort(key=lambda knob: -knob.share.value)
        count = len(tables[self.factors[0].name])
        return Effects(count, relative=True, explained=1.0, knobs=tuple(knobs), constant=(), counted=True)


def count_neighbors(
    attrs: Mapping[str, Any],
    factors: Sequence[KnobSummary],
    points: Sequence[Point],
    *,
    predicted: LatencyRecord | None,
) -> CountedNeighbors:
    """Count the neighbors of some of a study's points, or read them from the cache.

    Args:
        attrs: attributes of the study, with its space and settings.
        factors: its knobs.
        points: points of valid candidates, in an order of interest; those counted are evenly spread over them.
        predicted: latency of one of the candidates if all are predicted, under equal conditions; its model is used, if
            it still exists.
    """
    space = attrs["space"]
    latency = attrs["settings"].get("latency", {})
    device = latency.get("provisional") or latency.get("device", "")
    model = model_behind(predicted, device) if predicted else None
    names = (*COSTS, *(("latency_ms",) if model else ()))
    chosen = _spread(points, factors)

    def tables() -> dict[str, torch.Tensor]:
        count = _counter(space["latent_size"], space["context_tokens"], model)
        log = ProgressLog(str(space["name"]), "counted the neighbors of", "knobs", len(factors))
        found = {}
        for factor in factors:
            found[factor.name] = torch.from_numpy(_table(space, factor, chosen, names, count))
            log.add()
        return found

    key: dict[str, JSON] = {
        "revision": CACHE_REVISION,
        "space": space["digest"],
        "points": [dict(point) for point in chosen],
        "model": model.to_json() if model else None,
    }
    found = {f: np.asarray(t) for f, t in cached_tensors("neighbors", key, tables).items()}
    return CountedNeighbors(factors, {n: {f: t[..., i] for f, t in found.items()} for i, n in enumerate(names)})


def _spread(points: Sequence[Point], factors: Sequence[KnobSummary]) -> list[Point]:
    neighbors = sum(len(f.choices) - 1 for f in factors)
    count = min(len(points), MAX_CANDIDATES, max(1, MAX_COUNTED // max(1, neighbors)))
    return [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]


def _table(
    space: Mapping[str, Any], factor: KnobSummary, points: Sequence[Point], names: Sequence[str], count: Count
) -> Array:
    """Logarithms of the numbers of each point with each choice of a knob: (points, choices, names)."""
    base = Architecture.model_validate(space["base"])
    missing = [math.nan] * len(names)

    def logarithms(point: Point) -> list[float]:
        changes_of_point = {k: v for knob in space["knobs"] for k, v in knob["changes"][point[knob["name"]]].items()}
        try:
            numbers = count(apply_overrides(base, changes_of_point))
        except ValueError:
            return missing
        return [math.log(numbers[name]) for name in names]

    return np.array([[logarithms({**p, factor.name: i}) for i in range(len(factor.choices))] for p in points])


def _counter(latent_size: int, context_tokens: int, model: LatencyModel | None) -> Count:
    """Counts each architecture once."""
    predictor = PredictedBackend(model) if model else None
    known: dict[str, dict[str, float]] = {}

    def count(arch: Architecture) -> Mapping[str, float]:
        if arch.id not in known:
            known[arch.id] = count_numbers(arch, latent_size, context_tokens, predictor)
        return known[arch.id]

    return count


def _variance(table: Array) -> float:
    """Variance of a knob's choices, (candidates, choices), averaged over the candidates."""
    known = np.ma.masked_invalid(table)
    return float((known - known.mean(axis=1, keepdims=True)).mean(axis=0).var())


def _effects(factor: KnobSummary, table: Array) -> tuple[Effect, ...]:
    found = []
    for change, pairs in changes(factor):
        sizes = np.stack([table[:, new] - table[:, old] for old, new in pairs])
        sizes = sizes[np.isfinite(sizes)]
        if len(sizes):
            value, low, high = (float(np.expm1(f(sizes))) for f in (np.mean, np.min, np.max))
            found.append(Effect(change, Estimate(value=value, low=low, high=high)))
    return tuple(found)
