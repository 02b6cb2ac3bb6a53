"""How good a net is as it runs, by one metric: always on the same pairs, prompts and noise, for paired differences."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from archsearch.quality import clip_score
from archsearch.quality.clip_score import ClipScore
from archsearch.quality.evaluator import WORST, Evaluator
from archsearch.quality.retrieval import Retriever
from archsearch.stats import intervals
from archsearch.stats.estimate import DistanceEstimate, Estimate
from snapgen.data import dataset
from snapgen.errors import InputError
from snapgen.models.unet import UNet

PAIRS = "validation_loss"
DISTANCES = ("frechet_distance", "kernel_distance")
RETRIEVAL = "retrieval"
CLIP = "clip_score:"
"""And behind it a CLIP's folder or its name on the hub."""
METRICS = (PAIRS, *DISTANCES, RETRIEVAL, f"{CLIP}FOLDER")
FEWEST = 8
"""Samples, for those metrics that take them."""


@dataclass(frozen=True)
class MetricReading:
    """What a gauge showed: a number for each fixed pair or prompt, or one for all samples; smaller is better."""

    metric: str
    found: Tensor | DistanceEstimate
    """(items,) float64 on the CPU, or a distance with its error."""

    @property
    def value(self) -> float:
        """The metric itself."""
        return self.found.value if isinstance(self.found, DistanceEstimate) else float(self.found.mean())


class NetMetric(ABC):
    """One metric of a net, taken again and again on the same material.

    Sampling has the evaluator's protocol's steps and guidance. A net that gives no finite numbers reads `WORST`.
    """

    metric: str

    def take(self, unet: UNet) -> MetricReading:
        """Of a net as it runs: blocks that are left out (`subnets.without`) are so here, too."""
        try:
            found = self._found(unet)
        except FloatingPointError:
            found = self._broken()
        if isinstance(found, Tensor):
            found = found.double().cpu().nan_to_num(nan=WORST, posinf=WORST, neginf=WORST)
        return MetricReading(self.metric, found)

    @abstractmethod
    def _found(self, unet: UNet) -> Tensor | DistanceEstimate:
        """As `MetricReading.found`."""

    def _broken(self) -> Tensor | DistanceEstimate:
        """Of a net that gives no finite samples."""
        return DistanceEstimate(WORST, 0)


class _OfPairs(NetMetric):
    metric = PAIRS

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def _found(self, unet: UNet) -> Tensor:
        return self._evaluator.pair_losses(unet)


class _OfDistance(NetMetric):
    def __init__(self, metric: Literal["frechet_distance", "kernel_distance"], evaluator: Evaluator, samples: int):
        self.metric = metric
        self._evaluator, self._samples = evaluator, samples

    def _found(self, unet: UNet) -> DistanceEstimate:
        return self._evaluator.distances(self._evaluator.samples(unet, self._samples))[DISTANCES.index(self.metric)]


class _OfCaptions(NetMetric):
    """How little each sample shows its caption: the cosine, negated."""

    def __init__(self, metric: str, judge: Retriever | ClipScore, evaluator: Evaluator, samples: int) -> None:
        self.metric = metric
        self._judge, self._evaluator, self._samples = judge, evaluator, samples

    def _found(self, unet: UNet) -> Tensor:
        images, captions = self._evaluator.samples(unet, self._samples), self._evaluator.prompts[: self._samples]
        return -(self._judge.cosines if isinstance(self._judge, Retriever) else self._judge)(images, captions)

    def _broken(self) -> Tensor:
        return torch.full((self._samples,), WORST)


def gauge(metric: str, evaluator: Evaluator, *, samples: int) -> NetMetric:
    """The gauge of a metric.

    Args:
        metric: ``validation_loss`` (the protocol's fixed pairs), ``frechet_distance`` or ``kernel_distance`` (samples
            against the protocol's reference), ``retrieval`` (cosine of the caption that a sample calls for and its own,
            negated; see `archsearch.quality.retrieval`), or ``clip_score:FOLDER`` (CLIP's cosine, negated).
        evaluator: whose pairs, captions, noise and sampling settings they are.
        samples: images drawn for a reading; unused for the validation loss.

    Raises:
        InputError: if there is no such metric, no such CLIP, or too few samples.
    """
    if metric == PAIRS:
        return _OfPairs(evaluator)
    if metric not in (*DISTANCES, RETRIEVAL) and not metric.startswith(CLIP):
        raise InputError(metric or "metric", "is no metric", f"use one of: {', '.join(METRICS)}", place="metric")
    if samples < FEWEST:
        remedy = f"draw {FEWEST} or more, or use {PAIRS}"
        raise InputError(metric, f"is taken from samples, and {samples} are too few", remedy, place="samples")
    judge = clip_score.load_clip_score(metric.removeprefix(CLIP), evaluator.device) if metric.startswith(CLIP) else None
    if samples > evaluator.protocol.samples:
        evaluator = Evaluator(evaluator.protocol.model_copy(update={"samples": samples}), evaluator.device)
    if metric in DISTANCES:
        return _OfDistance(metric, evaluator, samples)  # type: ignore[arg-type]
    return _OfCaptions(metric, judge or _retriever(evaluator), evaluator, samples)


def estimate(reading: MetricReading) -> Estimate:
    """The metric with a 95 % interval: for other pairs or captions, or for other samples."""
    if isinstance(reading.found, DistanceEstimate):
        return intervals.distance_estimate([reading.found])
    return intervals.validation_estimate([reading.found])


def difference(base: MetricReading, other: MetricReading) -> Estimate:
    """How much worse ``other`` is than ``base``: its metric less that of base, with a 95 % interval.

    Pairs and captions are compared one by one, so that how hard they are cancels. Of the distances both errors count in
    full, though the samples share prompts and noise: their intervals are wider than need be.
    """
    assert base.metric == other.metric, f"{base.metric} against {other.metric}"
    if isinstance(base.found, DistanceEstimate) and isinstance(other.found, DistanceEstimate):
        error = math.hypot(base.found.error, other.found.error)
        return intervals.distance_estimate([DistanceEstimate(other.found.value - base.found.value, error)])
    assert isinstance(base.found, Tensor)
    assert isinstance(other.found, Tensor)
    return intervals.validation_estimate([other.found - base.found])


def _retriever(evaluator: Evaluator) -> Retriever:
    protocol = evaluator.protocol
    train = dataset.open_images(protocol.data, split="train", resolution=protocol.resolution)
    return Retriever.fitted(train, device=evaluator.device)
