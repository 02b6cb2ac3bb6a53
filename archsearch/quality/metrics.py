"""Metrics of a net without training it, always on the same pairs, prompts and noise, so that differences are paired."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from archsearch.quality import clip_score
from archsearch.quality.candidate_evaluator import WORST, CandidateEvaluator
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
WORST_DISTANCE = DistanceEstimate(WORST, 0)


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


@dataclass(frozen=True)
class NetMetric:
    """A metric of nets that is always computed on the same data.

    Samples are generated with the number of steps and the guidance scale of the evaluator's protocol. Nets with
    non-finite outputs get the value `WORST`.
    """

    metric: str
    compute: Callable[[UNet], Tensor | DistanceEstimate]
    """Computes `MetricReading.result`."""
    worst: Tensor | DistanceEstimate = WORST_DISTANCE
    """Result for a net with non-finite samples."""

    def measure(self, unet: UNet) -> MetricReading:
        """Measure a net in its current state, e.g. with disabled blocks (`subnetworks.blocks_disabled`)."""
        try:
            result = self.compute(unet)
        except FloatingPointError:
            result = self.worst
        if isinstance(result, Tensor):
            result = result.double().cpu().nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        return MetricReading(self.metric, result)


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
        return NetMetric(metric, evaluator.pair_losses)
    if metric not in (*DISTANCES, RETRIEVAL) and not metric.startswith(CLIP):
        raise InputError(metric or "metric", "is not a metric", f"use one of: {', '.join(METRICS)}", place="metric")
    if samples < MIN_SAMPLES:
        remedy = f"raise num_samples, or use {PAIRS}"
        raise InputError(metric, f"needs at least {MIN_SAMPLES} samples, not {samples}", remedy, place="num_samples")
    judge = evaluator.evaluator
    if metric in DISTANCES:
        judge.preload(samples=True)
        distance = DISTANCES.index(metric)
        return NetMetric(metric, lambda unet: judge.distances(evaluator.samples(unet, samples))[distance])
    cosines = (
        clip_score.load_clip_score(metric.removeprefix(CLIP), evaluator.device)
        if metric.startswith(CLIP)
        else judge.retriever.cosines
    )
    return NetMetric(
        metric,
        lambda unet: -cosines(evaluator.samples(unet, samples), judge.prompts(samples)),
        worst=torch.full((samples,), WORST),
    )


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
