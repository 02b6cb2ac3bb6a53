"""Metrics on a small folder of shapes: readings of full nets and of sub-networks, and their differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from archsearch.protocol import EvaluationProtocol
from archsearch.quality import metrics
from archsearch.quality.candidate_evaluator import WORST, CandidateEvaluator
from archsearch.quality.metrics import MetricReading, build_metric, difference, estimate
from archsearch.stats.estimate import DistanceEstimate
from snapgen.errors import InputError
from snapgen.models.subnetworks import blocks_disabled
from snapgen.models.unet import UNet
from tests.archsearch.quality.test_candidate_evaluator import folder, tiny  # noqa: F401 - folder is a fixture
from tests.snapgen import encoders


@pytest.fixture(scope="module")
def evaluator(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CandidateEvaluator:  # noqa: F811
    protocol = EvaluationProtocol(
        data=str(folder),
        resolution=8,
        autoencoder="none",
        num_inference_steps=1,
        guidance_scale=1,
        num_samples=8,
        feature_resolution=32,
        validation_pairs=12,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCHSEARCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield CandidateEvaluator(protocol, torch.device("cpu"))


@pytest.fixture
def unet(evaluator: CandidateEvaluator) -> UNet:
    net = evaluator.net(tiny())
    net.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # no block may begin as the identity
        for weight in net.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return net


BLOCK = "down.0.layers.0.transformers.0"


@pytest.mark.parametrize("metric", ["validation_loss", "kernel_distance", "frechet_distance", "retrieval"])
def test_a_reading_is_repeatable_and_sees_the_mask(metric: str, evaluator: CandidateEvaluator, unet: UNet) -> None:
    net_metric = build_metric(metric, evaluator, samples=8)
    full, again = net_metric.measure(unet), net_metric.measure(unet)  # samples included: no new noise
    nothing = difference(full, again)
    assert full.value == again.value
    assert nothing.value == 0
    with blocks_disabled(unet, [BLOCK]):
        masked = net_metric.measure(unet)
    lost = difference(full, masked)
    assert lost.value == pytest.approx(masked.value - full.value)
    assert lost.value != 0
    assert lost.low < lost.value < lost.high
    assert estimate(full).value == pytest.approx(full.value)


def test_the_validation_loss_is_the_evaluators(evaluator: CandidateEvaluator, unet: UNet) -> None:
    assert build_metric("validation_loss", evaluator, samples=0).measure(unet).value == float(
        evaluator.pair_losses(unet).mean()
    )


def test_the_distances_are_those_of_the_evaluators_samples(evaluator: CandidateEvaluator, unet: UNet) -> None:
    found = evaluator.evaluator.distances(evaluator.samples(unet, 8))
    assert build_metric("frechet_distance", evaluator, samples=8).measure(unet).value == found[0].value
    assert build_metric("kernel_distance", evaluator, samples=8).measure(unet).value == found[1].value


def test_clip_is_taken_of_each_caption_and_negated(evaluator: CandidateEvaluator, unet: UNet, tmp_path: Path) -> None:
    home = encoders.whole_clip(tmp_path / "clip")
    reading = build_metric(f"clip_score:{home}", evaluator, samples=8).measure(unet)
    expected = metrics.clip_score.load_clip_score(str(home))(evaluator.samples(unet, 8), evaluator.evaluator.prompts())
    assert torch.equal(reading.result, -expected)
    assert estimate(reading).value == pytest.approx(-float(expected.mean()))


def test_more_samples_than_the_protocol_draws_begin_with_its_own(evaluator: CandidateEvaluator, unet: UNet) -> None:
    few, many = (build_metric("retrieval", evaluator, samples=count).measure(unet) for count in (8, 10))
    assert len(many.result) == 10
    assert torch.allclose(many.result[:8], few.result)


def test_items_are_compared_in_pairs() -> None:
    base, worse = np.random.default_rng(0).normal(size=(2, 30))
    worse = base + 0.1 + worse / 100
    found = difference(*(MetricReading("retrieval", torch.tensor(one)) for one in (base, worse)))
    low, high = stats.t.interval(0.95, 29, np.mean(worse - base), stats.sem(worse - base))
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(worse - base), low, high))


def test_distances_are_compared_by_both_errors() -> None:
    found = difference(
        MetricReading("kernel_distance", DistanceEstimate(2, 0.3)),
        MetricReading("kernel_distance", DistanceEstimate(3, 0.4)),
    )
    assert (found.value, found.low, found.high) == pytest.approx((1, 1 - 1.96 * 0.5, 1 + 1.96 * 0.5), abs=1e-3)


@pytest.mark.parametrize("metric", ["validation_loss", "kernel_distance", "retrieval"])
def test_a_broken_net_reads_worst(metric: str, evaluator: CandidateEvaluator, unet: UNet) -> None:
    net_metric = build_metric(metric, evaluator, samples=8)
    full = net_metric.measure(unet)
    with torch.no_grad():
        next(unet.parameters()).fill_(torch.nan)
    broken = net_metric.measure(unet)
    assert broken.value == WORST
    assert difference(full, broken).low > 0


@pytest.mark.parametrize(
    ("metric", "samples", "message"),
    [
        ("fid", 8, "'?fid'?.*is not a metric"),
        ("", 8, "is not a metric"),
        ("clip_score", 8, "is not a metric"),
        ("retrieval", 0, "needs at least 8 samples"),
        ("kernel_distance", 7, "needs at least 8 samples"),
        ("clip_score:/nowhere", 8, "does not exist"),
        ("clip_score:", 8, "does not exist"),
    ],
)
def test_bad_gauges_are_one_line(metric: str, samples: int, message: str, evaluator: CandidateEvaluator) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_metric(metric, evaluator, samples=samples)
    assert "\n" not in str(caught.value)
