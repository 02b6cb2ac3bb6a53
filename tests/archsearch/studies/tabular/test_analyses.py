"""The analyses recover what a synthetic table was made of."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from archsearch.stats.factorial import Change
from archsearch.studies.tabular.agreement import AS_IS, agreements, best_budget, sample_errors
from archsearch.studies.tabular.effects import (
    effects_on,
    fresh_verdicts,
    noise_by_source,
    pooled_coverage,
    published_changes,
    reproduction,
    run_noise,
)
from archsearch.studies.tabular.predictors import IN_DISTRIBUTION, predictions, splits
from archsearch.studies.tabular.table import LOWER_IS_BETTER, BenchmarkTable, Run
from tests.archsearch import synthetic_table
from tests.archsearch.synthetic_table import EFFECTS, INTERACTION, NOISE


@pytest.fixture(scope="module")
def table() -> BenchmarkTable:
    return synthetic_table.make()


def test_every_main_effect_is_recovered(table: BenchmarkTable) -> None:
    missed = 0
    for each in (table, *(synthetic_table.make(seed=seed) for seed in (1, 2, 3))):
        found = effects_on(each, "validation_loss")
        knobs = {knob.name: knob for knob in each.space.knobs}
        for (name, choice), size in EFFECTS.items():
            base = each.space.base_point[name]
            effect = found.main[Change(name, knobs[name].choices[base], knobs[name].choices[choice])]
            # The interaction adds its average over the other knob's choices.
            expected = size + INTERACTION * {"convs": 1 / 2, "width": 1 / 3}.get(name, 0) * (choice == 1)
            assert effect.value == pytest.approx(expected, abs=5 * NOISE / 192**0.5)
            missed += not effect.low <= expected <= effect.high
        assert found.explained > 0.98
    assert missed <= 5, "of 36 intervals of 95 %"


def test_the_only_interaction_is_the_strongest(table: BenchmarkTable) -> None:
    found = effects_on(table, "validation_loss").interactions
    (a, b), size = next(iter(found.items()))
    assert {a.knob, b.knob} == {"convs", "width"}
    assert abs(size.value) == pytest.approx(INTERACTION, rel=0.2)


def test_costs_and_latencies_are_ratios(table: BenchmarkTable) -> None:
    for name in ("params", "latency_ms", "full_size_macs", "iphone-15-pro"):
        wider = effects_on(table, name).main[Change("width", "base", "wider")]
        assert 0 < wider.low < wider.value < wider.high, "the ends are those of the contexts"


def test_verdicts_from_fresh_seeds_agree_with_the_tables() -> None:
    """The effects are known: a small one may be missed by 24 architectures, and none has the other sign."""
    table = synthetic_table.make()
    found = fresh_verdicts(table, "validation_loss")
    assert found is not None
    assert (found.architectures, found.pairs) == (synthetic_table.MORE, 1)
    assert 4 <= found.called <= found.found
    assert found.agreeing >= 0.95 * found.called
    bare = dataclasses.replace(table, runs=tuple(run for run in table.runs if run.seed in table.seeds))
    assert fresh_verdicts(bare, "validation_loss") is None
    few = {run.architecture_id for run in table.runs if run.seed not in table.seeds and run.seed < 4}
    three = sorted(few)[:3]
    thin = tuple(run for run in table.runs if run.seed in table.seeds or run.architecture_id in three)
    assert fresh_verdicts(dataclasses.replace(table, runs=thin), "validation_loss") is None


def test_noise_is_that_of_the_runs(table: BenchmarkTable) -> None:
    assert run_noise(table, "validation_loss") == pytest.approx(NOISE, rel=0.1)
    found = noise_by_source(table, "validation_loss")
    assert found.keys() == {"all", "weights"}
    weights = found["weights"]
    assert (weights.architectures, weights.runs) == (synthetic_table.WEIGHTS, 4 * synthetic_table.WEIGHTS)
    assert weights.deviation.low < NOISE / 2 < weights.deviation.high


def test_pooled_intervals_hold_where_seeds_suit_all_choices_alike(table: BenchmarkTable) -> None:
    shares = pooled_coverage(table, "validation_loss")
    assert shares.keys() == {"any", *(knob.name for knob in table.space.knobs)}
    assert 0.9 < min(shares.values()) <= max(shares.values()) < 0.99


def test_pooled_intervals_fail_where_a_seed_suits_a_choice(table: BenchmarkTable) -> None:
    slopes = {0: 0.01, 1: -0.01, 2: 0.015, 3: -0.012, 4: 0.0}

    def tilted(run: Run) -> Run:
        wide = table.entries[run.architecture_id].point["width"]
        loss = run.scores["validation_loss"] + wide * slopes[run.seed]
        return dataclasses.replace(run, scores={**run.scores, "validation_loss": loss})

    runs = tuple(tilted(run) for run in table.runs)
    shares = pooled_coverage(dataclasses.replace(table, runs=runs), "validation_loss")
    assert shares["width"] < 0.92
    assert shares["any"] < 0.97
    bare = dataclasses.replace(table, runs=tuple(run for run in table.runs if run.seed in table.seeds))
    assert pooled_coverage(bare, "validation_loss") == {}


def test_published_rows_are_changes_of_the_tables_knobs(table: BenchmarkTable) -> None:
    rows = {p.row: p for p in published_changes(table)}
    assert list(rows) == ["1", "2a", "2b", "3", "4", "5", "6"]
    assert rows["2a"].change == Change("convs", "plain", "separable")
    assert rows["2b"].change == Change("convs", "separable", "separable ×2")
    directions = {row: p.direction for row, p in rows.items()}
    assert directions == {
        "1": "better",
        "2a": "worse",
        "2b": "better",
        "3": None,
        "4": None,
        "5": "better",
        "6": "better",
    }


def test_strong_rows_come_out_and_weak_ones_by_chance(table: BenchmarkTable) -> None:
    rows = {p.row: reproduction(table, p, "validation_loss") for p in published_changes(table)}
    assert rows["3"] is None
    worse, better, opposite = rows["2a"], rows["5"], rows["1"]
    assert worse is not None
    assert better is not None
    assert opposite is not None
    assert worse.one_seed > 0.99
    assert worse.observed == 1
    assert better.contexts == 192
    assert better.one_seed > 0.99
    assert opposite.one_seed < 0.1  # the made-up effect is not as published
    noisy = synthetic_table.make(noise=0.02)
    weak = next(reproduction(noisy, p, "validation_loss") for p in published_changes(noisy) if p.row == "6")
    assert weak is not None
    assert 0.5 < weak.one_seed < weak.three_seeds < 0.9
    assert weak.observed == pytest.approx(weak.one_seed, abs=0.1)


def test_agreement_grows_along_the_curve(table: BenchmarkTable) -> None:
    every = agreements(table)
    assert {(r.reference, r.n) for r in every} == {
        ("2,400 steps", synthetic_table.LONG),
        ("64 px", synthetic_table.LARGER),
    }
    assert {r.target for r in every if r.reference == "64 px"} == {*LOWER_IS_BETTER} - {"retrieval_mrr"}
    rows = [r for r in every if r.reference == "2,400 steps"]
    of_loss = {
        r.budget: r for r in rows if (r.score, r.target, r.kind) == ("validation_loss", "validation_loss", AS_IS)
    }
    assert list(of_loss) == [(k + 1) / 8 for k in range(8)]
    rhos = [r.rho.value for r in of_loss.values() if r.rho]
    assert rhos[-1] > 0.97
    assert rhos[0] < rhos[3] < rhos[-1]
    ceilings = [r.ceiling for r in of_loss.values() if r.ceiling is not None]
    assert ceilings[0] < ceilings[-1] <= 1
    budget = best_budget([r for r in rows if r.target == "validation_loss"], "validation_loss")
    assert budget is not None
    assert 0.25 < budget <= 1
    assert {r.target for r in rows} == {"validation_loss", "frechet_distance", "kernel_distance", "retrieval_mrr"}
    retrieval = next(r for r in rows if (r.score, r.budget, r.target) == ("validation_loss", 1.0, "retrieval_mrr"))
    assert retrieval.rho is not None
    assert retrieval.rho.value > 0.97, "a lower loss is a better retrieval"


def test_splits_are_by_id_and_two_are_out_of_distribution(table: BenchmarkTable) -> None:
    found = splits(table)
    assert found.keys() == table.entries.keys()
    counts = Counter(s["split"] for s in found.values())
    assert counts["train"] > 230
    assert min(counts["validation"], counts["test"]) > 20
    assert Counter(s["depth"] for s in found.values()) == {"train": 192, "test": 192}
    for arch_id, entry in table.entries.items():
        assert (found[arch_id]["width"] == "train") == (entry.point["width"] == 0)


def test_predictors_learn_and_are_worse_out_of_distribution(table: BenchmarkTable) -> None:
    found = {(p.model, p.split, p.labels): p.rho for p in predictions(table)}
    for model in ("main effects", "Gaussian process"):
        few, many = (found[model, IN_DISTRIBUTION, n].value for n in (8, 96))
        assert few < many
        assert many > 0.97
        assert found[model, "width", 96].value < found[model, IN_DISTRIBUTION, 96].value
    assert {split for _, split, _ in found} == {IN_DISTRIBUTION, "depth", "width"}


def test_samples_say_what_all_architectures_do(table: BenchmarkTable) -> None:
    found = {(e.score, e.budget, e.target): e for e in sample_errors(table)}
    early, late = (found["validation_loss", budget, "validation_loss"] for budget in (1 / 8, 1.0))
    assert early.rho < late.rho > 0.97
    assert late.spread < early.spread < 0.25
    assert early.sampled == synthetic_table.LONG
    assert abs(late.chosen) < 2 * late.spread
    short = dataclasses.replace(
        table, runs=tuple(run for run in table.runs if run.protocol_hash == table.protocol.hash)
    )
    header = table.header.model_copy(update={"protocols": {table.protocol.hash: table.protocol}})
    assert sample_errors(dataclasses.replace(short, header=header)) == []
