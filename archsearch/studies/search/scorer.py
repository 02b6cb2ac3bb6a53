"""What a study asks of whoever scores a candidate, in the order in which it asks; and archsearch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from archsearch.score import OBJECTIVES, Cost, LatencyRecord, Quality
from archsearch.studies.config.study import StudyConfig, error_context
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError

if TYPE_CHECKING:
    from archsearch.spaces.space import Space

NOTES = "notes.json"
"""What `Scorer.quality` leaves for the trial itself."""

Report = Callable[[str, float], None]
"""Told the stage and which fraction of it is done."""


class Scorer(Protocol):
    """Scores candidates. Making one prepares and caches all that candidates share, so that the next one is quick."""

    def describe(self) -> Mapping[str, Any]:
        """``protocol`` as JSON, ``protocol_hash`` and ``machine``, which the study keeps.

        Of a study that does not train, the protocol is empty and its hash None.
        """

    def check(self, arch: Architecture) -> None:
        """Raise InputError if the protocol can not train such an architecture."""

    def cost(self, arch: Architecture) -> Cost:
        """Seconds, no weights."""

    def latency(self, arch: Architecture) -> LatencyRecord:
        """Free next to training. Of a device elsewhere it may be a prediction as yet."""

    def settled_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        """What stands once the candidate is trained: ``first``, or the measurement that has come meanwhile."""

    def quality(self, arch: Architecture, *, progress: Report, artifacts: Path) -> Quality:
        """Minutes to hours. Whatever is left in the folder ``artifacts`` is kept beside the trial.

        `NOTES` there, a JSON mapping, becomes attributes of the trial.
        """


ScorerFactory = Callable[[StudyConfig, "Space"], Scorer]
"""A function of a module, so that worker processes find it by its name."""


class ArchsearchScorer:
    """Cost from the meta device, latency from the study's backend, quality from a short run.

    Where the study ranks by cost and latency alone, nothing that a training needs is looked for.
    """

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        from archsearch.devices import backend
        from archsearch.quality.evaluator import Evaluator
        from archsearch.studies.remote.client import RemoteLatency

        self._settings, self._space = settings, space
        latency = settings.latency
        with error_context(settings, "latency"):
            self._remote = RemoteLatency(settings, space) if latency.remote else None
            self._backend = None if latency.remote else backend(latency.device, **latency.backend_options)
        self._evaluator = Evaluator(settings.protocol) if settings.trains else None
        for name in (*settings.objectives, *settings.limits):
            if OBJECTIVES[name].label.endswith("distance") and not settings.protocol.samples:
                problem = f"{name} needs samples, and the protocol draws none"
                raise InputError(settings.source, problem, "raise it", place="protocol.samples")

    def describe(self) -> Mapping[str, Any]:
        """As `Scorer`."""
        from archsearch.machine import system_info

        resolved = self._evaluator.resolved if self._evaluator else None
        return {
            "protocol": resolved.model_dump(mode="json") if resolved else {},
            "protocol_hash": resolved.hash if resolved else None,
            "machine": system_info(),
        }

    def check(self, arch: Architecture) -> None:
        """As `Scorer`."""
        if self._evaluator:
            self._evaluator.check(arch)

    def cost(self, arch: Architecture) -> Cost:
        """As `Scorer`."""
        from archsearch.cost.counter import cost

        return cost(arch, self._space.latent_size, context_tokens=self._space.context_tokens)

    def latency(self, arch: Architecture) -> LatencyRecord:
        """As `Scorer`."""
        if self._remote is not None:
            return self._remote.first(arch)
        assert self._backend is not None
        return self._backend.measure(arch, self._space.latent_size, self._space.context_tokens)

    def settled_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        """As `Scorer`."""
        return first if self._remote is None else self._remote.settled(arch, first)

    def quality(self, arch: Architecture, *, progress: Report, artifacts: Path) -> Quality:
        """As `Scorer`; only of a study that trains."""
        assert self._evaluator is not None
        return self._evaluator.score(arch, study_seed=self._settings.seed, progress=progress, artifacts=artifacts)
