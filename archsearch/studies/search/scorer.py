"""The interface that scores a candidate, with its methods in the order in which a study calls them, and its default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from archsearch.cost.counter import cost
from archsearch.devices import backend
from archsearch.machine import system_info
from archsearch.score import OBJECTIVES, Cost, LatencyRecord, Quality
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.remote.client import RemoteLatency
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from snapgen.progress import ProgressCallback
from snapgen.training.trackers import Trackers, check_trackers

if TYPE_CHECKING:
    from archsearch.quality.short_run import Checkpoints

ROUND = "round.json"
"""File with an `EvolutionRound` for the trial's record, which `Scorer.quality` may write among its artifacts."""

CHECKPOINTS = "checkpoints"
"""Subfolder of a trial's artifacts that outlives an interruption."""

CHECKPOINT = f"{CHECKPOINTS}/{{seed}}.safetensors"
"""Path in a trial's artifacts of the checkpoint of one seed's run."""


class Scorer(Protocol):
    """Interface that scores candidates. Its construction prepares and caches everything that candidates share."""

    def describe(self) -> Mapping[str, Any]:
        """User attributes for the study: ``protocol`` as JSON, ``protocol_hash`` and ``machine``.

        If the study does not train, the protocol is empty and its hash None.
        """

    def check(self, arch: Architecture) -> None:
        """Raise `InputError` if the protocol cannot train an architecture of this kind."""

    def cost(self, arch: Architecture) -> Cost:
        """Parameters, MACs and activation memory; takes seconds and builds no weights."""

    def latency(self, arch: Architecture) -> LatencyRecord:
        """Latency, which is cheap next to training. With a remote device it may be a prediction at first."""

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        """Latency of a trained candidate: ``first``, or the measurement that has arrived in the meantime."""

    def quality(
        self,
        arch: Architecture,
        *,
        seeds: Sequence[int],
        progress: ProgressCallback,
        artifacts: Path,
        until: int | None = None,
    ) -> Quality:
        """Train and evaluate a candidate, which takes minutes to hours.

        Args:
            arch: the candidate, or its twin in a study with a proxy, which `Quality.proxy` then names.
            seeds: training seeds, of those of the protocol.
            artifacts: folder whose files are stored with the trial. `ROUND` in it becomes part of the trial's record
                instead. Its subfolder `CHECKPOINTS` is not stored, and is kept for the next attempt if the trial is
                interrupted.
            until: step at which the run of a single seed pauses, in a study with rungs. The quality is that after this
                step, `CHECKPOINT` holds all that the run needs to go on from it, and there are no other artifacts. The
                same call with a later step, or none, goes on from there. A run that diverged before is over. Scorers
                that do not know rungs may leave the argument out.
        """


ScorerFactory = Callable[[StudyConfig, "Space"], Scorer]
"""Builds a scorer. It must be a module-level function or class, so that worker processes can unpickle it."""


class ArchsearchScorer(Scorer):
    """Scorer with cost from the meta device, latency from the study's backend and quality from a short training run.

    If the study ranks by cost and latency alone, data and feature extractors are not loaded.
    """

    def __init__(self, settings: StudyConfig, space: Space) -> None:
        from archsearch.quality.candidate_evaluator import CandidateEvaluator

        self._settings, self._space = settings, space
        latency = settings.latency
        with settings.error_context("latency"):
            self._remote = RemoteLatency(settings, space) if latency.remote else None
            self._backend = None if latency.remote else backend(latency.device, **latency.backend_options)
        with settings.error_context("log_with"):
            check_trackers(settings.log_with)
        self._evaluator = None
        if settings.trains:
            with settings.error_context("protocol"):
                self._evaluator = CandidateEvaluator(settings.protocol)
        for name in (*settings.objectives, *settings.constraints):
            if OBJECTIVES[name].label.endswith("distance") and not settings.protocol.num_samples:
                problem = f"{name} needs samples, but the protocol draws none"
                raise InputError(settings.source, problem, "raise num_samples", place="protocol.num_samples")

    def describe(self) -> Mapping[str, Any]:
        resolved = self._evaluator.resolved if self._evaluator else None
        return {
            "protocol": resolved.model_dump(mode="json") if resolved else {},
            "protocol_hash": resolved.hash if resolved else None,
            "trained_latent_size": self._evaluator.evaluator.latent_shape[1] if self._evaluator else None,
            "machine": system_info(),
        }

    def check(self, arch: Architecture) -> None:
        if self._evaluator:
            self._evaluator.check(arch)

    def cost(self, arch: Architecture) -> Cost:
        return cost(arch, self._space.latent_size, context_tokens=self._space.context_tokens)

    def latency(self, arch: Architecture) -> LatencyRecord:
        if self._remote is not None:
            return self._remote.request(arch)
        assert self._backend is not None
        return self._backend.measure(arch, self._space.latent_size, self._space.context_tokens)

    def final_latency(self, arch: Architecture, first: LatencyRecord) -> LatencyRecord:
        return first if self._remote is None else self._remote.final(arch, first)

    def quality(
        self,
        arch: Architecture,
        *,
        seeds: Sequence[int],
        progress: ProgressCallback,
        artifacts: Path,
        until: int | None = None,
    ) -> Quality:
        assert self._evaluator is not None
        quality = self._evaluator.score(
            arch,
            study_seed=self._settings.seed,
            seeds=seeds,
            progress=progress,
            artifacts=artifacts,
            checkpoints=self.checkpoints(artifacts),
            until=until,
            samples=until is None or self._settings.quality_objectives != ("validation_loss",),
        )
        if self._settings.log_with and until is None:
            self._track(arch, seeds, quality, artifacts)
        proxy = self._space.proxy
        return quality if proxy is None else quality.model_copy(update={"proxy": proxy.name})

    def _track(self, arch: Architecture, seeds: Sequence[int], quality: Quality, folder: Path) -> None:
        """Tell the study's trackers the loss of each short run as it fell."""
        for seed, curve in zip(seeds, quality.curves, strict=False):
            run = f"{arch.id}-seed-{seed}"
            trackers = Trackers(self._settings.log_with, project=self._settings.name, run=run, folder=folder)
            for step, loss in zip(curve.steps, curve.validation_loss, strict=True):
                trackers.log({"validation_loss": loss}, step)
            trackers.finish()

    def checkpoints(self, artifacts: Path) -> Checkpoints:
        """Where the training of a candidate is saved."""
        from archsearch.quality.short_run import Checkpoints

        return Checkpoints(artifacts / CHECKPOINTS, seconds=60 * self._settings.checkpoint_minutes)
