"""Searches on a synthetic table, by the real worker, queue and proposer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.tabular.convergence import Trace, Truth
from archsearch.studies.tabular.file import write_table
from archsearch.studies.tabular.replay import Scored, replay, settings_of, simulate, true_points
from archsearch.studies.tabular.scorer import space_on
from archsearch.studies.tabular.table import BenchmarkTable
from snapgen.errors import InputError
from tests.archsearch import synthetic_table


@pytest.fixture(scope="module")
def table() -> BenchmarkTable:
    return synthetic_table.make()


def study(**changes: Any) -> StudyConfig:
    values = {"space": "emoji-factorial", "seeds": {"first": 1, "front": 2}, "trials": 12, "sampler": "random"}
    return StudyConfig.model_validate({"name": "s", **values, **changes})


def config(**changes: Any) -> StudyConfig:
    return settings_of(study(**changes), [])[0].config


def test_a_search_is_told_what_the_table_says(table: BenchmarkTable) -> None:
    history = simulate(table, config(), 0)
    assert [scored.seconds for scored in history] == sorted(scored.seconds for scored in history)
    new = list(dict.fromkeys(scored.architecture_id for scored in history))
    assert len(new) == 12
    assert new[0] == table.space.architecture(table.space.base_point).id
    assert any(scored.runs == 2 for scored in history), "those that may be on the front have a second seed"
    for scored in history:
        runs = table.short_runs[scored.architecture_id]
        values = [runs[s].scores["validation_loss"] for s in (0, 1)]
        expected = sum(values) / 2 if scored.runs == 2 else None
        assert scored.observed[0] in [pytest.approx(v) for v in (values if expected is None else [expected])]
        assert scored.observed[1] == table.entries[scored.architecture_id].quartiles_ms[1]


def test_time_is_that_of_the_runs(table: BenchmarkTable) -> None:
    history = simulate(table, config(), 0)
    assert history[-1].seconds == pytest.approx(_seconds(table, history))
    two = simulate(table, config(workers=2), 0)
    assert two[-1].seconds < 0.7 * _seconds(table, two)
    assert two[-1].seconds >= 0.5 * _seconds(table, two)


def _seconds(table: BenchmarkTable, history: Sequence[Scored]) -> float:
    return sum(next(iter(table.short_runs[scored.architecture_id].values())).seconds for scored in history)


def test_runs_pause_at_rungs() -> None:
    table = synthetic_table.make(early=1)
    whole = simulate(table, config(sampler="ehvi", trials=40), 0)
    rungs = simulate(table, config(sampler="ehvi", trials=40, rungs={"steps": [60, 120]}), 0)
    last = {scored.architecture_id: scored.runs for scored in rungs}
    assert whole[-1].spent == sum({scored.architecture_id: scored.runs for scored in whole}.values())
    assert rungs[-1].spent > sum(last.values()), "those that went no further than a rung cost a part of a run"
    assert {scored.spent % 0.25 for scored in rungs} == {0}
    with pytest.raises(
        InputError, match=r"rungs.steps\[0\]: is 50, but synthetic has validation losses at steps 30, 60"
    ):
        space_on(table, config(rungs={"steps": [50, 120]}))


@pytest.mark.parametrize("changes", [{}, {"workers": 3}, {"sampler": "ehvi", "workers": 2}, {"seeds": None}])
def test_a_search_repeats(table: BenchmarkTable, changes: dict[str, Any]) -> None:
    first, again, other = (simulate(table, config(**changes), seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_search_that_has_tried_everything_ends(table: BenchmarkTable) -> None:
    history = simulate(table, config(trials=1000, workers=2, seeds=None, sampler="grid"), 0)
    assert len({scored.architecture_id for scored in history}) == 384


def test_the_quick_start_searches_the_table_within_its_own_limits(table: BenchmarkTable) -> None:
    quick = settings_of(load_config("emoji"), [])[0].config
    assert space_on(table, quick).constraints == {"params": 1.5e6}
    history = simulate(table, quick, 0)
    assert len({scored.architecture_id for scored in history}) == 24
    assert all(table.entries[scored.architecture_id].cost.params <= 1.5e6 for scored in history)


def test_full_size_twins_have_counted_costs_and_predicted_latencies(table: BenchmarkTable) -> None:
    twins = config(
        space="snapgen-factorial",
        proxy="emoji-factorial",
        latency={"device": "predicted:iphone-15-pro"},
        sampler="ehvi",
    )
    for scored in simulate(table, twins, 0):
        assert scored.observed[1] == pytest.approx(table.entries[scored.architecture_id].predicted_ms["iphone-15-pro"])
    assert sorted(p[1] for p in true_points(table, twins).values()) == pytest.approx(
        sorted(e.predicted_ms["iphone-15-pro"] for e in table.entries.values())
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": "snapgen"},
            "space: snapgen lacks 384 of the 384 architectures of synthetic; name a study of emoji-f",
        ),
        ({"space": "emoji-blocks"}, "space: emoji-blocks lacks"),
        (
            {"space": "snapgen", "proxy": "snapgen-small"},
            "space: snapgen with the proxy snapgen-small is not the space of",
        ),
        (
            {"protocol": {"steps": 480}, "seeds": None},
            "protocol.steps: is 480 against 240 in synthetic; make the two alike",
        ),
        ({"protocol": {"data": "faces"}, "seeds": None}, "protocol.data: is faces against emoji in synthetic"),
        (
            {"seeds": {"front": 3}},
            "seeds.front: lists 3 seeds, but synthetic has 2 runs of each architecture; use at most 2",
        ),
        ({"latency": {"device": "predicted:iphone-15-pro"}}, "latency.device: is predicted:iphone-15-pro, of which"),
        ({"objectives": ["latency_ms", "params"], "seeds": None}, "objectives: no quality is among them"),
    ],
)
def test_a_study_that_is_not_the_tables_is_refused(
    table: BenchmarkTable, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        space_on(table, study(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_samplers_or_changes() -> None:
    own, gp, more = settings_of(study(), ["gp", "{sampler: tpe, seeds: null, workers: 4}"], trials=7)
    assert (own.label, own.config.trials) == ("random", 7)
    assert (gp.config.sampler.name, gp.config.seeds) == ("gp", own.config.seeds)
    assert (more.config.sampler.name, more.config.seeds, more.config.workers) == ("tpe", None, 4)
    with pytest.raises(InputError, match="--setting: 'annealing' is neither a sampler nor settings"):
        settings_of(study(), ["annealing"])
    with pytest.raises(InputError, match=r"--setting \{samplr: gp\}: samplr"):
        settings_of(study(), ["{samplr: gp}"])
    for twice in (["gp", "gp"], ["random"]):
        with pytest.raises(InputError, match="is there twice"):
            settings_of(study(), twice)
    with pytest.raises(InputError, match="give --trials"):
        settings_of(study(trials=None, time_budget_minutes=7), [])


@pytest.mark.slow
def test_processes_give_what_one_gives(table: BenchmarkTable, tmp_path: Path) -> None:
    write_table(table, tmp_path / "table.csv.gz")
    settings = settings_of(study(trials=4), ["qmc"])
    one, two = (replay(tmp_path / "table.csv.gz", settings, seeds=2, processes=n) for n in (1, 2))
    assert one == two
    assert [len(searches) for searches in one] == [2, 2]


def test_a_trace_has_the_shares_of_the_front() -> None:
    truth = Truth({"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 1.0), "d": (3.0, 3.0)})
    assert truth.front == [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
    history = [
        Scored(10.0, "d", 1, 1.0, (2.9, 3.0), True),
        Scored(20.0, "b", 1, 2.0, (3.1, 2.0), True),
        Scored(30.0, "b", 2, 3.0, (2.1, 2.0), True),
        Scored(40.0, "a", 1, 4.0, (1.1, 3.0), True),
        Scored(50.0, "c", 1, 5.0, (2.0, 1.0), True),
    ]
    trace = Trace.of(history, truth)
    assert trace.candidates.tolist() == [1, 2, 2, 3, 4]
    assert trace.runs.tolist() == [1, 2, 3, 4, 5]
    assert trace.regret.tolist() == [2, 2, 1, 0, 0]
    assert (trace.hypervolume[:-1] < 1).all()
    assert trace.hypervolume[-1] == pytest.approx(1)
    assert trace.after_candidates(2) == (trace.hypervolume[1], 2)
    assert trace.after_seconds(35) == (trace.hypervolume[2], 1)
    assert trace.after_seconds(5)[0] == 0
    assert trace.reaches(1.0) == (4, 5, 50.0)
    assert trace.reaches(1.1)[0] == float("inf")


def test_true_points_have_no_noise_of_a_single_run(table: BenchmarkTable) -> None:
    points = true_points(table, config())
    assert points.keys() == table.entries.keys()
    limit = sorted(point[1] for point in points.values())[100]
    limited = true_points(table, config(constraints={"latency_ms": limit}))
    assert 100 < len(limited) < 384
    assert all(point[1] <= limit for point in limited.values())
    with pytest.raises(
        InputError, match="constraints: leave none of the 384 architectures of synthetic; raise those of the study or"
    ):
        true_points(table, config(constraints={"latency_ms": 1e-3}))
