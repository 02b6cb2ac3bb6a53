"""An ablation run with quick scores: rows, effects, sums, and going on after a kill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from archsearch.stats.estimate import Estimate
from archsearch.stats.intervals import verdict
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.experiments.ablation import ablate, train_rows_too
from archsearch.studies.experiments.ablation_results import Ablation, load_results
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.config.test_ablation import LADDER
from tests.archsearch.studies.quick import QuickScorer, quick_cost, quick_latency, quick_loss

Make = Callable[..., StudyConfig]

SEEDS = {"protocol": {"train_seeds": [0, 1, 2]}}


def ablation(settings: Make, **changes: Any) -> StudyConfig:
    given = {"rows": LADDER, "final_row": "3", "one_at_a_time": True}
    return settings(name="rows", ablation=given, trials=None, **{**SEEDS, **changes})


def run(settings: StudyConfig) -> Ablation:
    return load_results(ablate(settings, quiet=True, scorer=QuickScorer))


def test_every_architecture_is_trained_once_and_every_row_told(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "trained.log"
    monkeypatch.setenv("QUICK_LOG", str(log))
    done = run(ablation(settings))
    trained = log.read_text().split()
    assert len(trained) == len(set(trained)) == 9
    assert len(done.results) == 11
    assert all(r.score is not None and r.error is None for r in done.results)
    same, twice = done.result("0 with 1"), done.result("1")
    assert (same.score, same.trial) == (twice.score, twice.trial)


def test_changes_and_effects_are_against_the_row_below(settings: Make) -> None:
    done = run(ablation(settings))
    row, below = done.result("2b"), done.result("1")
    ours, theirs = (r.planned.architecture for r in (row, below))
    expected = 100 * (quick_cost(ours).params / quick_cost(theirs).params - 1)
    assert row.changes["params"] == pytest.approx(expected)
    effect = row.effects["validation_loss"]
    assert effect.difference.value == pytest.approx(quick_loss(ours) - quick_loss(theirs))
    assert effect.verdict == verdict(effect.difference)
    assert done.result("0").effects == {}
    assert done.metrics == ("validation_loss", "frechet_distance", "kernel_distance")


def test_single_effects_are_set_against_the_joint_one(settings: Make) -> None:
    done = run(ablation(settings))
    by_key = {(s.name, s.group): s for s in done.sums}
    loss = {r.planned.name: quick_loss(r.planned.architecture) for r in done.results}
    alone, without = by_key["validation_loss", "one_at_a_time"], by_key["validation_loss", "leave_one_out"]
    joint = loss["3"] - loss["0"]
    assert alone.joint == pytest.approx(joint)
    assert without.joint == pytest.approx(joint)
    singles = ("0 with 1", "0 with 2b", "0 with 3")
    assert alone.single == pytest.approx(sum(loss[n] - loss["0"] for n in singles))
    assert without.single == pytest.approx(sum(loss["3"] - loss[n] for n in ("3 without 1", "3 without 2b", "2b")))
    assert alone.excess is not None
    assert alone.excess.value == pytest.approx(alone.joint - alone.single)
    params = {r.planned.name: quick_cost(r.planned.architecture).params for r in done.results}
    product = 1.0
    for name in singles:
        product *= params[name] / params["0"]
    assert by_key["params", "one_at_a_time"].single == pytest.approx(100 * (product - 1))
    assert by_key["params", "one_at_a_time"].joint == pytest.approx(100 * (params["3"] / params["0"] - 1))


class Additive(QuickScorer):
    """Costs that multiply and losses that add up exactly, choice by choice."""

    def cost(self, arch: Architecture) -> Any:
        factor = 1.0
        factor *= 1 if arch.down[1].self_attention else 0.9
        factor *= 0.5 if arch.down[1].conv == "separable" else 1
        factor *= 0.8 if arch.down[1].num_kv_heads == 1 else 1
        return super().cost(arch).model_copy(update={"params": round(1e9 * factor)})

    def quality(self, arch: Architecture, *, seeds: Sequence[int], progress: Any, artifacts: Path) -> Any:
        quality = super().quality(arch, seeds=seeds, progress=progress, artifacts=artifacts)
        loss = 1.0 + 0.1 * (arch.down[1].conv == "separable") + 0.2 * (arch.down[1].num_kv_heads == 1)
        by_seed = (loss - 0.01, loss, loss + 0.01)
        return quality.model_copy(update={"validation_loss": Estimate(value=loss, low=0, high=2, by_seed=by_seed)})


def test_what_adds_up_is_said_to(settings: Make) -> None:
    done = load_results(ablate(ablation(settings), quiet=True, scorer=Additive))
    told = {(s.name, s.group): s.verdict for s in done.sums}
    assert {told["params", g] for g in ("one_at_a_time", "leave_one_out")} == {"adds up"}
    assert {told["validation_loss", g] for g in ("one_at_a_time", "leave_one_out")} == {"adds up"}


def test_a_shared_seed_is_no_part_of_a_difference(settings: Make) -> None:
    """The seeds of `Additive` shift every row equally: no noise is left, and the verdicts are certain."""
    done = load_results(ablate(ablation(settings), quiet=True, scorer=Additive))
    effect = done.result("3").effects["validation_loss"]
    assert (effect.difference.value, effect.verdict) == (pytest.approx(0.2), "worse")
    assert effect.difference.high - effect.difference.low < 1e-6
    assert done.result("1").effects["validation_loss"].difference.value == pytest.approx(0)


class Disturbed(QuickScorer):
    """Every other measurement is slower."""

    taken = 0

    def latency(self, arch: Architecture) -> Any:
        Disturbed.taken += 1
        record = super().latency(arch)
        if Disturbed.taken % 2:
            return record
        return record.model_copy(
            update={"median_ms": 1.7 * record.median_ms, "upper_quartile_ms": 2 * record.median_ms}
        )


def test_rows_are_timed_in_turns_until_two_measurements_agree(settings: Make) -> None:
    chosen = ablation(settings, objectives=["latency_ms"])
    assert chosen.ablation is not None
    disturbed = load_results(ablate(chosen, quiet=True, scorer=Disturbed))
    turns = chosen.with_changes(
        {"ablation": {**chosen.ablation.model_dump(mode="json"), "latency_repeats": 6}, "name": "turns"}
    )
    done = load_results(ablate(turns, quiet=True, scorer=Disturbed))

    def ms(found: Ablation) -> list[float]:
        return [r.score.latency.median_ms for r in found.results if r.score and r.score.latency]

    undisturbed = [quick_latency(r.planned.architecture) for r in done.results]
    assert ms(done) == undisturbed
    assert ms(disturbed) != undisturbed


def test_it_goes_on_where_it_was_killed(settings: Make, start: Any, tmp_path: Path) -> None:
    log = tmp_path / "trained.log"
    chosen = ablation(settings)
    environment = {"QUICK_LOG": str(log), "QUICK_FAULT": f"{_id(chosen, '2b')}:die"}
    victim = start(ablate_in, tmp_path, chosen, environment)
    victim.join()
    assert victim.exitcode == 9
    partial = load_results(load_study(chosen))
    assert 0 < sum(r.score is not None for r in partial.results) < 11
    assert {r.error for r in partial.results if r.score is None} <= {"not started", "running"}
    assert all(r.score is not None for r in run(chosen).results)
    done = log.read_text().split()
    assert len(done) == len(set(done))


def ablate_in(folder: Path, settings: StudyConfig, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    ablate(settings, quiet=True, scorer=QuickScorer)


def _id(settings: StudyConfig, row: str) -> str:
    space = settings.load_space()
    return space.architecture(space.references[row]).id


def test_a_row_that_fails_is_told_and_the_others_go_on(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ablation(settings)
    monkeypatch.setenv("QUICK_FAULT", f"{_id(chosen, '2a')}:raise")
    done = run(chosen)
    failed = done.result("2a")
    assert failed.score is None
    assert failed.error == "RuntimeError: out of memory"
    assert sum(r.score is None for r in done.results) == 1


def test_costs_alone_need_no_seeds_and_no_training(settings: Make, tmp_path: Path) -> None:
    done = run(
        ablation(settings, objectives=["latency_ms"], protocol={"train_seeds": [0], "data": str(tmp_path / "no")})
    )
    assert done.metrics == ()
    assert {s.name for s in done.sums} == {"params", "macs", "latency_ms"}
    assert done.result("3").effects == {}


def test_quality_is_a_study_of_its_own(settings: Make) -> None:
    costs = ablation(settings, objectives=["latency_ms"])
    trained = train_rows_too(costs, "validation_loss")
    assert (trained.objectives, trained.name) == (("validation_loss", "latency_ms"), "rows-validation_loss")
    assert train_rows_too(trained, "validation_loss") is trained
    assert train_rows_too(costs, None) is costs
    with pytest.raises(InputError, match="'speed' is not a quality number; use validation_loss"):
        train_rows_too(costs, "speed")


def test_what_is_refused(settings: Make) -> None:
    with pytest.raises(InputError, match="has no rows to ablate"):
        ablate(settings(), quiet=True, scorer=QuickScorer)
    with pytest.raises(InputError, match=r"protocol\.train_seeds: 2 seeds cannot separate .*; give 3 or more"):
        ablate(ablation(settings, protocol={"train_seeds": [0, 1]}), quiet=True, scorer=QuickScorer)
    with pytest.raises(InputError, match="is an ablation; run archsearch ablate"):
        search(ablation(settings), quiet=True, scorer=QuickScorer)
    search(settings(trials=1), quiet=True, scorer=QuickScorer)
    with pytest.raises(InputError, match="is not an ablation; run archsearch report"):
        load_results(load_study(settings()))
