"""Metrics of a net without training it, always on the same pairs, prompts and noise, so that differences are paired."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archsearch.quality import clip_score
from archsearch.quality.candidate_evaluator import WORST, CandidateEvaluator
from archsearch.quality.clip_score import ClipScore
from archsearch.quality.retrieval import Retriever
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen.errors import InputError
from snapgen.models.unet import UNet

PAIRS = "validation_loss"
DISTANCES = ("frechet_distance", "kernel_distance")
RETRIEVAL = "retrieval"
CLIP = "clip_score:"
"""Prefix of a CLIP model's folder or hub name."""
METRICS = (PAIRS, *DISTANCES, RETRIEVAL, f"{CLIP}FOLDER")
MIN_SAMPLES = 8
"""Fewest samples for the metrics that generate samples."""


@dataclass(frozen=True)
class MetricReading:
    """Measurement of a metric; smaller is better."""

    metric: str
    result: Tensor | DistanceEstimate
    """A value for each validation pair or prompt, (items,) float64 on the CPU, or a distance with its error."""

    @property
    def value(self) -> float:
        """Value of the metric."""
        return self.result.value if isinstance(self.result, DistanceEstimate) else float(self.result.mean())


class NetMetric(ABC):
    """A metric of nets that is always computed on the same data.

    Samples are generated with the number of steps and the guidance scale of the evaluator's protocol. Nets with
    non-finite outputs get the value `WORST`.
    """

    metric: str

    def measure(self, unet: UNet) -> MetricReading:
        """Measure a net in its current state, e.g. with disabled blocks (`subnetworks.blocks_disabled`)."""
        try:
            result = self._measure(unet)
        except FloatingPointError:
            result = self._worst()
        if isinstance(result, Tensor):
            result = result.double().cpu().nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        return MetricReading(self.metric, result)

    @abstractmethod
    def _measure(self, unet: UNet) -> Tensor | DistanceEstimate:
        """Compute `MetricReading.result`."""

    def _worst(self) -> Tensor | DistanceEstimate:
        """Result for a net with non-finite samples."""
        return DistanceEstimate(WORST, 0)


class _ValidationLoss(NetMetric):
    metric = PAIRS

    def __init__(self, evaluator: CandidateEvaluator) -> None:
        self._evaluator = evaluator

    def _measure(self, unet: UNet) -> Tensor:
        return self._evaluator.pair_losses(unet)


class _Distance(NetMetric):
    def __init__(
        self,
        metric: Literal["frechet_distance", "kernel_distance"],
        evaluator: CandidateEvaluator,
        samples: int,
    ) -> None:
        self.metric = metric
        self._evaluator, self._samples = evaluator, samples

    def _measure(self, unet: UNet) -> DistanceEstimate:
        return self._evaluator.distances(self._evaluator.samples(unet, self._samples))[DISTANCES.index(self.metric)]


class _TextAlignment(NetMetric):
    """Negated cosine similarity of each sample and its caption."""

    def __init__(self, metric: str, scorer: Retriever | ClipScore, evaluator: CandidateEvaluator, samples: int) -> None:
        self.metric = metric
        self._scorer, self._evaluator, self._samples = scorer, evaluator, samples

    def _measure(self, unet: UNet) -> Tensor:
        captions = self._evaluator.evaluator.prompts(self._samples)
        images = self._evaluator.samples(unet, self._samples)
        return -(self._scorer.cosines if isinstance(self._scorer, Retriever) else self._scorer)(images, captions)

    def _worst(self) -> Tensor:
        return torch.full((self._samples,), WORST)


def build_metric(metric: str, evaluator: CandidateEvaluator, *, samples: int) -> NetMetric:
    """Build a metric by name.

    Args:
        metric: ``validation_loss`` (on the protocol's validation pairs), ``frechet_distance`` or ``kernel_distance``
            (samples against the protocol's reference), ``retrieval`` (negated cosine of a sample's predicted and actual
            caption embedding, see `archsearch.quality.retrieval`), or ``clip_score:FOLDER`` (negated CLIP score).
        evaluator: provides pairs, captions, noise and sampling settings.
        samples: number of images per measurement; unused for the validation loss.

    Raises:
        InputError: for an unknown metric, a missing CLIP model, or too few samples.
    """
    if metric == PAIRS:
        return _ValidationLoss(evaluator)
    if metric not in (*DISTANCES, RETRIEVAL) and not metric.startswith(CLIP):
        raise InputError(metric or "metric", "is not a metric", f"use one of: {', '.join(METRICS)}", place="metric")
    if samples < MIN_SAMPLES:
        remedy = f"raise num_samples, or use {PAIRS}"
        raise InputError(metric, f"needs at least {MIN_SAMPLES} samples, not {samples}", remedy, place="num_samples")
    scorer = (
        clip_score.load_clip_score(metric.removeprefix(CLIP), evaluator.device) if metric.startswith(CLIP) else None
    )
    if metric in DISTANCES:
        evaluator.evaluator.preload(samples=True)
        return _Distance(metric, evaluator, samples)  # type: ignore[arg-type]
    return _TextAlignment(metric, scorer or evaluator.evaluator.retriever, evaluator, samples)


def estimate(reading: MetricReading) -> Estimate:
    """The metric with a 95 % interval that covers the choice of pairs, captions or samples."""
    if isinstance(reading.result, DistanceEstimate):
        return intervals.distance_estimate([reading.result])
    return intervals.validation_estimate([reading.result])


def difference(base: MetricReading, other: MetricReading) -> Estimate:
    """Difference of ``other`` and ``base`` with a 95 % interval; positive if ``other`` is worse.

    Differences are taken for each pair or caption, so that their difficulty cancels. For distances the errors of both
    are combined as if independent; as the samples share prompts and noise, these intervals are conservative.
    """
    assert base.metric == other.metric, f"{base.metric} against {other.metric}"
    if isinstance(base.result, DistanceEstimate) and isinstance(other.result, DistanceEstimate):
        error = math.hypot(base.result.error, other.result.error)
        freedom = min((r.freedom for r in (base.result, other.result) if r.freedom is not None), default=None)
        return intervals.distance_estimate([DistanceEstimate(other.result.value - base.result.value, error, freedom)])
    assert isinstance(base.result, Tensor)
    assert isinstance(other.result, Tensor)
    return intervals.validation_estimate([other.result - base.result])
