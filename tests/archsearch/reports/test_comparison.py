from __future__ import annotations

import pytest

from archsearch.reports import comparison as page
from archsearch.stats.estimate import Estimate
from archsearch.training.comparison import ComparisonConfig, Results

VARIANTS = {"plain": {}, "good": {}, "same": {}}


def comparison() -> ComparisonConfig:
    values = {
        "name": "c",
        "recipe": {},
        "variants": VARIANTS,
        "against": "plain",
        "metrics": {"validation_loss": "lower", "retrieval_mrr": "higher"},
    }
    return ComparisonConfig.model_validate(values)


def results() -> Results:
    """Seeds differ widely, to all variants alike; ``good`` is better by 0.1 and 0.2, ``same`` by chance alone."""
    hard = (1.0, 2.0, 3.0)
    noise = {"plain": (0.0, 0.001, -0.001), "good": (0.001, 0.0, -0.001), "same": (-0.001, 0.001, 0.0)}

    def of(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value)

    return {
        name: [
            {
                "validation_loss": of(h + n - 0.1 * (name == "good")),
                "retrieval_mrr": of(0.1 * h + n + 0.2 * (name == "good")),
            }
            for h, n in zip(hard, noise[name], strict=True)
        ]
        for name in VARIANTS
    }


@pytest.mark.parametrize(("metric", "size"), [("validation_loss", -0.1), ("retrieval_mrr", 0.2)])
def test_a_difference_is_told_over_the_same_seeds(metric: str, size: float) -> None:
    found = page.over_seeds(results(), metric)
    assert found["good"].by_seed == tuple(run[metric].value for run in results()["good"])
    good = page.difference(found, "good", "plain")
    assert good.value == pytest.approx(size)
    assert good.high - good.low < 0.02, "what a seed does to all alike is no part of it"
    assert page.verdict(good, comparison().metrics[metric]) == "better"
    assert page.verdict(page.difference(found, "same", "plain"), comparison().metrics[metric]) == "cannot tell"


def test_which_way_is_better_decides_the_verdict() -> None:
    up = Estimate(value=1, low=0.5, high=1.5)
    assert page.verdict(up, "higher") == "better"
    assert page.verdict(up, "lower") == "worse"
    assert page.verdict(up.model_copy(update={"low": -0.1}), "lower") == "cannot tell"


def test_the_tables_hold_every_variant_and_the_one_compared_with_has_no_verdict() -> None:
    lines = page.markdown(comparison(), results()).splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ") and "---" not in line}
    assert set(rows) == {"variant", *VARIANTS}
    assert "better (-0.1 [" in rows["good"]
    assert "cannot tell" in rows["same"]
    assert not any(word in rows["plain"] for word in ("better", "worse", "cannot"))
    frame = page.frame(comparison(), results())
    assert len(frame) == 6
    assert frame[frame.variant == "good"].verdict.tolist() == ["better", "better"]
    assert frame[frame.variant == "plain"].difference.isna().all()
