from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import ValidationError

from archsearch import score as scores
from archsearch.score import OBJECTIVES, Cost, MissingScore, ProtocolMismatch, Quality, Score
from archsearch.stats.estimate import Estimate
from snapgen.errors import InputError
from tests.records import latency_record

finite = st.floats(allow_nan=False, allow_infinity=False)


def quality(**changes: Any) -> Quality:
    values: dict[str, Any] = {
        "validation_loss": Estimate(value=0.4, low=0.39, high=0.42, by_seed=(0.39, 0.41)),
        "frechet_distance": Estimate(value=800, low=780, high=830),
        "kernel_distance": Estimate(value=-0.01, low=-0.02, high=0.01),
        "extractor": "efficientnet-lite0",
        "protocol_hash": "0123456789abcdef",
        "training_seconds": 20.0,
    }
    return Quality(**(values | changes))


def full_score() -> Score:
    return Score(cost=Cost(params=10, macs=20, activation_bytes=30), latency=latency_record(), quality=quality())


def test_score_survives_json() -> None:
    for score in (full_score(), Score(cost=full_score().cost), full_score().model_copy(update={"quality": None})):
        assert Score.model_validate_json(score.model_dump_json()) == score


def test_the_number_of_runs_is_that_of_the_values_by_seed() -> None:
    assert quality().runs == 2
    worst = Estimate(value=1e6, low=1e6, high=1e6)
    diverged = quality(validation_loss=worst, diverged=True)
    assert diverged.runs == 1
    assert quality().covers(2)
    assert not quality().covers(3)
    assert diverged.covers(3), "a candidate that diverged has no further runs"


@given(value=finite, low=finite, high=finite)
def test_an_estimate_is_within_its_interval(value: float, low: float, high: float) -> None:
    if low > high:
        with pytest.raises(ValidationError, match="above high"):
            Estimate(value=value, low=low, high=high)
        return
    estimate = Estimate(value=value, low=low, high=high)
    assert estimate.low <= estimate.value == value <= estimate.high
    assert Estimate.model_validate_json(estimate.model_dump_json()) == estimate


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_number_is_infinite_or_missing(bad: float) -> None:
    for make in (
        lambda: Estimate(value=bad, low=0, high=1),
        lambda: Estimate(value=0, low=bad, high=1),
        lambda: Estimate(value=0, low=0, high=bad),
        lambda: Estimate(value=0, low=0, high=1, by_seed=(0.0, bad)),
        lambda: quality(training_seconds=bad),
        lambda: latency_record(median_ms=bad),
        lambda: latency_record(load_ms=bad),
        lambda: Cost(params=bad, macs=0, activation_bytes=0),
    ):
        with pytest.raises(ValidationError):
            make()


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_json_brings_no_infinity_in(text: str) -> None:
    with pytest.raises(ValidationError):
        Estimate.model_validate_json(f'{{"value": {text}, "low": 0, "high": 1}}')


def test_impossible_records_are_rejected() -> None:
    for changes in (
        {"lower_quartile_ms": 2.1},
        {"upper_quartile_ms": 1.95},
        {"median_ms": 0.0},
        {"source": "guessed"},
        {"threads": 0},
        {"speed": 3},
    ):
        with pytest.raises(ValidationError):
            latency_record(**changes)


def test_objectives_read_the_score() -> None:
    assert {name: full_score().value(name) for name in OBJECTIVES} == {
        "validation_loss": 0.4,
        "frechet_distance": 800,
        "kernel_distance": -0.01,
        "latency_ms": 2.0,
        "params": 10,
        "macs": 20,
        "activation_bytes": 30,
    }


def test_missing_numbers_are_named() -> None:
    untrained = Score(cost=full_score().cost)
    with pytest.raises(MissingScore, match=r"latency_ms.*not measured"):
        untrained.value("latency_ms")
    for name in ("validation_loss", "frechet_distance", "kernel_distance"):
        with pytest.raises(MissingScore, match=f"{name}.*not trained"):
            untrained.value(name)
    unsampled = Score(cost=full_score().cost, quality=quality(frechet_distance=None))
    assert unsampled.value("validation_loss") == 0.4
    with pytest.raises(MissingScore, match=r"frechet_distance.*no samples"):
        unsampled.value("frechet_distance")


def test_only_inception_makes_a_fid() -> None:
    assert scores.metric_label("frechet_distance", "efficientnet-lite0") == "Fréchet distance (efficientnet-lite0)"
    assert scores.metric_label("frechet_distance", scores.INCEPTION) == "FID"
    assert scores.metric_label("kernel_distance", scores.INCEPTION) == "KID"
    assert scores.metric_label("kernel_distance", "efficientnet-lite0") == "kernel distance (efficientnet-lite0)"
    assert scores.metric_label("validation_loss", scores.INCEPTION) == "validation loss"


def test_a_quality_number_of_a_twin_says_so() -> None:
    assert scores.metric_label("validation_loss", "none", "small") == "validation loss of the twin in small"
    assert scores.metric_label("frechet_distance", scores.INCEPTION, "small") == "FID of the twin in small"
    assert scores.metric_label("latency_ms", "none", "small") == "latency"
    assert scores.metric_label("params", "none", "small") == "parameters"


def test_numbers_of_two_protocols_are_not_compared() -> None:
    scores.comparable(quality(), quality(training_seconds=3.0))
    other = quality(protocol_hash="fedcba9876543210")
    with pytest.raises(ProtocolMismatch, match="0123456789abcdef and fedcba9876543210") as caught:
        scores.comparable(quality(), other)
    assert isinstance(caught.value, InputError)
    with pytest.raises(ProtocolMismatch, match="steps: 400 against 800"):
        scores.comparable(quality(), other, difference="steps: 400 against 800")
    with pytest.raises(ProtocolMismatch, match="extractor: efficientnet-lite0 against inception"):
        scores.comparable(quality(), quality(protocol_hash="f", extractor="inception"))


def test_latencies_of_two_machines_have_different_conditions() -> None:
    assert latency_record().conditions == latency_record(2.1).conditions
    assert latency_record().conditions != latency_record(chip="another").conditions
    assert latency_record().conditions != latency_record(threads=2).conditions


def test_a_predicted_latency_comes_with_its_interval_and_a_measured_one_with_its_quartiles() -> None:
    measured = latency_record(2.0, lower_quartile_ms=1.9, upper_quartile_ms=2.2)
    assert (measured.estimate.low, measured.estimate.high, measured.interval_name) == (1.9, 2.2, "quartiles")
    predicted = measured.model_copy(update={"source": "predicted", "interval_ms": (0.3, 20.0)})
    assert (predicted.estimate.low, predicted.estimate.high, predicted.interval_name) == (0.3, 20.0, "90 % interval")
