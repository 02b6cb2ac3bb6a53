from __future__ import annotations

import random

import pytest

from archsearch.reports.rendering import formatting
from archsearch.spaces.loading import load_space
from archsearch.stats.estimate import Estimate
from snapgen.architecture.schema import Architecture
from tests.archsearch.reports.factory import made_up


@pytest.mark.parametrize(
    ("value", "noise", "text"),
    [
        (0.512345, 0.0123, "0.512"),
        (822.4, 31.0, "822"),
        (0.0004, 0.01, "0.000"),
        (-0.0004, 0.01, "0.000"),
        (-0.0213, 0.004, "−0.0213"),
        (12.3456, 0.0, "12.3"),
        (1234567.0, 0.0, "1,234,567"),
        (0.0, 0.0, "0"),
        (5.0, 1e-9, "5.0000"),
        (float("nan"), 0.0, "nan"),
    ],
)
def test_as_many_digits_as_the_noise_allows(value: float, noise: float, text: str) -> None:
    assert formatting.number(value, noise) == text


def test_values_have_unit_and_interval() -> None:
    nbsp = formatting.NBSP
    measured, exact = Estimate(value=12.34, low=12.1, high=12.9), Estimate.exact(0.7)
    assert formatting.format_value(measured, "latency_ms", ends=True) == f"12.34{nbsp}ms [12.10, 12.90]"
    assert formatting.format_value(exact, "params", ends=True) == f"0.700{nbsp}M"
    rise, fall = Estimate(value=0.124, low=0.08, high=0.16), Estimate(value=-0.02, low=-0.03, high=-0.01)
    assert formatting.format_change(rise, relative=True) == f"+12.4{nbsp}% [8.0, 16.0]"
    assert formatting.format_change(fall, relative=False) == "−0.020 [−0.030, −0.010]"


def test_values_are_in_their_units() -> None:
    base = load_space("emoji").base
    score = made_up(base, random.Random(0))
    params, macs = formatting.value_of(score, "params"), formatting.value_of(score, "macs")
    assert params is not None
    assert macs is not None
    assert params.value == pytest.approx(score.cost.params / 1e6)
    assert macs.value == pytest.approx(score.cost.macs / 1e6)
    assert (formatting.axis("macs", ""), formatting.axis("validation_loss", "")) == ("MACs (M)", "Validation loss")


def test_a_missing_number_is_none() -> None:
    score = made_up(Architecture.model_validate(load_space("emoji").base.model_dump()), random.Random(0))
    bare = score.model_copy(update={"quality": None, "latency": None})
    assert formatting.value_of(bare, "validation_loss") is None
    assert formatting.value_of(bare, "latency_ms") is None


def test_only_inception_is_called_fid() -> None:
    assert formatting.axis("frechet_distance", "inception") == "FID"
    assert formatting.axis("frechet_distance", "efficientnet-lite0") == "Fréchet distance (efficientnet-lite0)"


def test_ticks_only_where_a_logarithm_helps() -> None:
    assert formatting.ticks([1, 4]) == []
    assert formatting.ticks([0, 100]) == []
    assert formatting.ticks([]) == []
    assert {2, 5, 10} < set(formatting.ticks([2, 14]))
    assert formatting.ticks([0.01, 90]) == sorted(formatting.ticks([0.01, 90]))
