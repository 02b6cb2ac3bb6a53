from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest

from archsearch.reports.study_report import write_report
from archsearch.score import Cost, ProtocolMismatch, Quality, Score
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search import display
from archsearch.studies.search.candidates import best, eligible, knee, load_candidates, pareto_front
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import create_or_resume, load_study
from archsearch.studies.storage.record import Candidate
from snapgen.architecture.schema import Architecture, LevelConfig
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer
from tests.records import latency_record

NAMES = ("validation_loss", "latency_ms")


def candidate(slot: int, loss: float, ms: float, **changes: object) -> Candidate:
    estimate = Estimate(value=loss, low=loss, high=loss)
    quality = Quality(
        validation_loss=estimate,
        frechet_distance=estimate,
        extractor="efficientnet-lite0",
        protocol_hash=str(changes.pop("protocol_hash", "p")),
        training_seconds=1,
    )
    width = 32 * int(changes.pop("width", slot + 1))  # type: ignore[call-overload]
    stage = (LevelConfig(channels=width),)
    values = {
        "trial_id": slot + 1,
        "worker": {"host": "here", "pid": 1},
        "number": slot,
        "slot": slot,
        "name": None,
        "point": {"k": slot},
        "architecture": Architecture(down=stage, up=stage),
        "score": Score(
            cost=Cost(params=10 * slot, macs=1, activation_bytes=1), latency=latency_record(ms), quality=quality
        ),
        "state": "scored",
        "infeasible": None,
        "artifacts": {},
        "constraints": {},
        "sampler_attrs": {},
        "started": None,
        "ended": None,
    }
    return Candidate.model_validate({**values, **changes})


def test_front_by_hand() -> None:
    points = [candidate(0, 3, 1), candidate(1, 2, 2), candidate(2, 1, 3), candidate(3, 2, 3), candidate(4, 2.5, 2.5)]
    assert [c.slot for c in pareto_front(points, NAMES)] == [2, 1, 0]


def test_of_equals_the_first_stays() -> None:
    assert [c.slot for c in pareto_front([candidate(1, 1, 1), candidate(0, 1, 1)], NAMES)] == [0]


def test_front_leaves_out_what_is_no_candidate() -> None:
    points = [
        candidate(0, 5, 5),
        candidate(1, 1, 1, state="infeasible", infeasible="latency_ms"),
        candidate(2, 1, 1, infeasible="validation_loss by 3 %"),
        candidate(3, 1, 1, state="failed"),
        candidate(4, 1, 1, state="running"),
        candidate(5, 5, 5, reused_from=0, width=1),
    ]
    assert [c.slot for c in eligible(points)] == [0]
    assert [c.slot for c in pareto_front(points, NAMES)] == [0]


def test_three_objectives() -> None:
    points = [candidate(3, 1, 1), candidate(2, 1, 1), candidate(1, 2, 2)]
    assert [c.slot for c in pareto_front(points, (*NAMES, "params"))] == [2, 1]


def test_different_protocols_are_refused() -> None:
    with pytest.raises(ProtocolMismatch):
        pareto_front([candidate(0, 1, 2), candidate(1, 2, 1, protocol_hash="q")], NAMES)


def test_the_knee_is_furthest_below_the_chord() -> None:
    # Latency counts by its logarithm: 1, 10, 100 are evenly spread.
    points = [candidate(0, 10, 1), candidate(1, 3, 10), candidate(2, 0, 100), candidate(3, 2.9, 40)]
    choice = knee(pareto_front(points, NAMES), NAMES)
    assert choice.candidate.slot == 1
    assert "the knee of a front of 4, furthest below the line" in choice.reason
    assert "latency 10 ms, 10.00 times the lowest" in choice.reason


def test_a_front_without_a_bend() -> None:
    choice = knee([candidate(0, 2, 1), candidate(1, 1, 2)], NAMES)
    assert choice.candidate.slot == 1
    assert choice.reason == "lowest validation loss of a front of 2"


def test_a_knee_in_three_objectives() -> None:
    points = [candidate(0, 10, 1), candidate(1, 2, 2), candidate(9, 1, 9)]
    assert knee(points, (*NAMES, "params")).candidate.slot == 1


def test_best_of_a_study(settings: Callable[..., StudyConfig]) -> None:
    study = search(settings(trials=6), quiet=True, scorer=QuickScorer)
    candidates = load_candidates(study)
    assert best(study).candidate.number in [c.number for c in pareto_front(candidates, NAMES)]
    smallest = best(study, objective="params")
    assert smallest.candidate.value("params") == min(c.value("params") for c in candidates)
    assert smallest.reason == "lowest parameters of 6 scored candidates"
    with pytest.raises(InputError, match="--objective: unknown objective 'fid'; use validation_loss"):
        best(study, objective="fid")


def test_a_point_may_be_written_while_it_is_read(settings: Callable[..., StudyConfig]) -> None:
    study = search(settings(trials=3), quiet=True, scorer=QuickScorer)
    points = [c.point for c in load_candidates(study)]
    *_, last = points[-1]
    with contextlib.closing(sqlite3.connect(settings().folder / "study.db")) as database, database:
        database.execute("delete from trial_params where trial_id = 3 and param_name = ?", [last])
        database.execute("update trials set state = 'RUNNING' where trial_id = 3")
    read = load_candidates(load_study(settings()))
    assert [c.state for c in read] == ["scored", "scored", "running"]
    assert [c.point for c in read] == [*points[:2], {k: v for k, v in points[2].items() if k != last}]


def test_the_interval_of_the_best_is_that_of_the_report(settings: Callable[..., StudyConfig], tmp_path: Path) -> None:
    study = search(settings(trials=6), quiet=True, scorer=QuickScorer)
    table = pandas.read_csv(write_report(study, tmp_path / "report.html").with_suffix(".csv")).set_index("trial")
    found = best(study).candidate
    assert found.score.quality is not None
    shown = table.loc[found.number]
    for name in ("validation_loss", "frechet_distance"):
        estimate = getattr(found.score.quality, name)
        assert (estimate.low, estimate.high) == pytest.approx((shown[f"{name}_low"], shown[f"{name}_high"]))
    stored = next(c for c in load_candidates(study) if c.number == found.number).score.quality
    assert stored is not None
    assert stored.validation_loss != found.score.quality.validation_loss, "of one candidate alone it is another"


def test_a_predicted_latency_is_called_so_in_reasons_and_in_the_log() -> None:
    told = {"source": "predicted", "interval_ms": (6.0, 15.0)}
    chosen = candidate(1, 2, 10)
    predicted = chosen.with_score(latency=latency_record(10, **told))
    assert chosen.label("latency_ms") == "latency"
    assert knee([predicted], ["latency_ms"]).reason == "lowest predicted latency of a front of 1"
    assert display.format_value(predicted, "latency_ms") == "predicted latency 10 ms (90 % interval 6 to 15)"
    assert display.format_value(chosen, "latency_ms") == "latency 10 ms"


def test_best_of_nothing(settings: Callable[..., StudyConfig]) -> None:
    scorer = QuickScorer(settings(), None)  # type: ignore[arg-type]
    study = create_or_resume(settings(), {"space": {"digest": "d"}, **scorer.describe()})
    with pytest.raises(InputError, match="no candidate is scored yet"):
        best(study)
