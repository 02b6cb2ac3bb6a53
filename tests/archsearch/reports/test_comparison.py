from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from archsearch.reports import comparison as page
from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import verdict
from archsearch.training.comparison import ComparisonConfig, Results, load_comparison

RESULTS = Path(__file__).parents[3] / "reports" / "results"
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
    table = page.seed_tables(comparison(), results())[metric]
    assert table.mean("good").by_seed == tuple(run[metric].value for run in results()["good"])
    good = table.difference("good", "plain")
    assert good.value == pytest.approx(size)
    assert good.high - good.low < 0.02, "an effect of the seed on all variants is not part of the difference"
    assert verdict(good, comparison().metrics[metric]) == "better"
    assert verdict(table.difference("same", "plain"), comparison().metrics[metric]) == "cannot tell"


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


def test_a_variant_is_compared_with_its_own_baselines() -> None:
    """E.g. with what takes as many evaluations of the net."""
    variants = {**VARIANTS, "same": {"baselines": ["good", "plain"]}, "good": {"baselines": []}}
    config = ComparisonConfig.model_validate({**comparison().model_dump(exclude={"variants"}), "variants": variants})
    frame = page.frame(config, results())
    losses = frame[frame.metric == "validation_loss"]
    assert losses.variant.tolist() == ["plain", "good", "same", "same"]
    assert losses.baseline.tolist() == ["", "", "good", "plain"]
    assert losses.verdict.tolist() == ["", "", "worse", "cannot tell"]
    text = page.markdown(config, results())
    assert "the difference from “plain” or the row after “vs”, paired" in text
    row = next(line for line in text.splitlines() if line.startswith("| same"))
    assert "; vs good: worse (+0.1" in row
    assert "; vs plain: cannot tell (" in row
    assert "Of the 4 together, these hold at once (Bonferroni): same vs good (validation loss)" in text


def test_verdicts_that_hold_at_once_are_told_beside_the_table() -> None:
    page_text = page.markdown(comparison(), results())
    assert "with 95 % intervals [a, b], pooled over variants." in page_text
    assert "Of the 4 together, these hold at once (Bonferroni): good (validation loss); good (MRR)." in page_text
    assert "differ more between seeds" not in page_text


def test_a_variant_that_differs_more_between_seeds_is_named() -> None:
    wild = [{metric: Estimate.exact(value) for metric in comparison().metrics} for value in (9, 1, 5)]
    variants = {**comparison().variants, "wild": comparison().variants["same"]}
    config = comparison().model_copy(update={"variants": variants})
    text = page.markdown(config, results() | {"wild": wild})
    assert "where these are wider: wild (validation loss); wild (MRR)." in text


PUBLISHED = {
    "distillation": "distillation",
    "steps": "step_distillation",
    "guided_steps": "guided_steps",
    "emoji_styles": "emoji_styles",
    "emoji_styles_64": "emoji_styles_64",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tables_follow_from_the_values_beside_them(name: str) -> None:
    """The CSV has the value of each seed; variants that evaluate the same net are known from the comparison."""
    config = load_comparison(name)
    stored = pandas.read_csv(RESULTS / f"{PUBLISHED[name]}.csv")
    values = stored.drop_duplicates(["variant", "metric"]).set_index(["variant", "metric"])  # a row per baseline
    of_seeds = {
        variant: [
            {metric: Estimate.exact(float(values.loc[variant, metric][f"seed {seed}"])) for metric in config.metrics}
            for seed in config.seeds
        ]
        for variant in config.variants
    }
    assert page.markdown(config, of_seeds) in (RESULTS / f"{PUBLISHED[name]}.md").read_text()
    frame = page.frame(config, of_seeds)
    texts = ["variant", "metric", "baseline", "verdict"]
    assert frame[texts].to_numpy().tolist() == stored[texts].fillna("").to_numpy().tolist()
    assert frame[["low", "difference low"]].to_numpy() == pytest.approx(
        stored[["low", "difference low"]].to_numpy(), nan_ok=True
    )
