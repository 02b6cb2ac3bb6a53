from __future__ import annotations

import pytest

from archsearch.reports import comparison as page
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import difference, verdict
from archsearch.training.comparison import ComparisonConfig, Results

VARIANTS = {"plain": {}, "good": {}, "same": {}}


def comparison() -> ComparisonConfig:
    values = {
        "name": "c",
        "recipe": {},
        "variants": VARIANTS,
        "baseline": "plain",
        "metrics": {"validation_loss": "lower", "retrieval_mrr": "higher"},
    }
    return ComparisonConfig.model_validate(values)


def results() -> Results:
    """Results with a large effect of the seed; ``good`` is better by 0.1 and 0.2, ``same`` only by chance."""
    hard = (1.0, 2.0, 3.0)
    noise = {"plain": (0.0, 0.001, -0.001), "good": (0.001, 0.0, -0.001), "same": (-0.001, 0.001, 0.0)}

    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value)

    return {
        name: [
            {
                "validation_loss": estimate(h + n - 0.1 * (name == "good")),
                "retrieval_mrr": estimate(0.1 * h + n + 0.2 * (name == "good")),
            }
            for h, n in zip(hard, noise[name], strict=True)
        ]
        for name in VARIANTS
    }


@pytest.mark.parametrize(("metric", "size"), [("validation_loss", -0.1), ("retrieval_mrr", 0.2)])
def test_differences_are_paired_by_seed(metric: str, size: float) -> None:
    estimates = page.mean_over_seeds(results(), metric)
    assert estimates["good"].by_seed == tuple(run[metric].value for run in results()["good"])
    good = difference(estimates, "good", "plain")
    assert good.value == pytest.approx(size)
    assert good.high - good.low < 0.02, "an effect of the seed on all variants is not part of the difference"
    assert verdict(good, comparison().metrics[metric]) == "better"
    assert verdict(difference(estimates, "same", "plain"), comparison().metrics[metric]) == "cannot tell"


def test_verdict_depends_on_which_direction_is_better() -> None:
    up = Estimate(value=1, low=0.5, high=1.5)
    assert verdict(up, "higher") == "better"
    assert verdict(up, "lower") == "worse"
    assert verdict(up.model_copy(update={"low": -0.1}), "lower") == "cannot tell"


def test_tables_have_every_variant_and_no_verdict_on_the_baseline() -> None:
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
