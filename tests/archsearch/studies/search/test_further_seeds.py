"""Studies in which only the candidates that may be on the front are trained with several seeds."""

from __future__ import annotations

import collections
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from archsearch.samplers.surrogate import RUN_NOISE
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import eligible, load_attempts, load_candidates, pareto_front
from archsearch.studies.search.run import search
from archsearch.studies.storage import trial_queue
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.further_runs import (
    LIKELY,
    SHARE,
    FurtherRuns,
)
from archsearch.studies.storage.ranking import Ranking, Row, run_noise, seed_offsets
from archsearch.studies.storage.record import Candidate, TrialRecord
from archsearch.studies.storage.study_trials import StudyTrials
from snapgen.architecture.schema import Architecture
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer
from tests.archsearch.studies.search.test_candidates import candidate
from tests.records import latency_record

Make = Callable[..., StudyConfig]
Start = Callable[..., BaseProcess]

SEEDS = {"seeds": {"first": 1, "front": 3}, "protocol": {"train_seeds": [0, 1, 2]}}


def run(settings: StudyConfig) -> list[Candidate]:
    return load_candidates(search(settings, quiet=True, scorer=QuickScorer))


def seeds_of(c: Candidate) -> tuple[float, ...]:
    assert c.score.quality is not None
    return c.score.quality.validation_loss.by_seed


def test_the_front_gets_its_seeds_and_the_others_one(settings: Make) -> None:
    candidates = run(settings(trials=24, sampler="random", **SEEDS))
    scored = eligible(candidates)
    assert len({c.architecture.id for c in scored}) == len(scored) == 24
    assert {c.runs for c in scored} >= {1, 3}
    front = pareto_front(candidates, ("validation_loss", "latency_ms"))
    assert {c.runs for c in front} == {3}
    for c in scored:
        by_seed = seeds_of(c)
        assert c.value("validation_loss") == pytest.approx(sum(by_seed) / len(by_seed))
    attempts = load_attempts(load_study(settings()))
    further = [t for t in attempts if t.continues is not None]
    assert len(further) == sum(c.runs - 1 for c in scored)
    assert all("samples.png" in c.artifacts for c in candidates), "the first seed's artifacts stay with the candidate"


def test_no_initial_point_gives_way_to_a_further_seed(settings: Make) -> None:
    points = [dict(c.point) for c in run(settings(name="first", trials=14, sampler="random"))]
    candidates = run(settings(name="second", trials=16, initial_points=points, sampler="random", **SEEDS))
    assert [dict(c.point) for c in candidates[:14]] == points
    attempts = load_attempts(load_study(settings(name="second")))
    assert any(t.continues is not None for t in attempts[:14]), "some were trained again in between"


def test_few_further_seeds_while_candidates_are_proposed(settings: Make) -> None:
    run(settings(trials=12, **SEEDS))
    trials = StudyTrials(load_study(settings())).read()
    last_new = max(t.number for t in trials if t.continues is None)
    early = [t for t in trials if t.number < last_new and t.continues is not None]
    assert 1 <= len(early) <= 12 / SHARE
    assert len({t.continues for t in early}) == len(early), "the noise is known best from as many candidates"


@pytest.mark.slow
def test_two_workers_train_no_seed_twice(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.02")
    scored = eligible(run(settings(trials=10, workers=2, **SEEDS)))
    assert len(scored) == 10
    attempts = load_attempts(load_study(settings()))
    counts = collections.Counter(t.continues for t in attempts if t.continues is not None and t.state == "scored")
    assert {c.number: c.runs - 1 for c in scored if c.runs > 1} == dict(counts)
    assert max(c.runs for c in scored) == 3


@pytest.mark.slow
def test_of_two_processes_that_continue_a_trial_at_once_one_gives_way(settings: Make) -> None:
    run(settings(trials=10, **SEEDS))
    study = load_study(settings())
    queue = trial_queue.TrialQueue(study, settings(trials=10, **SEEDS))
    number = queue.trials()[3].number
    first, second = (queue._create(continues=number) for _ in range(2))
    queue._further_runs = type("Same", (), {"next": lambda *_, **__: number, "count": lambda *_: 1})()
    with pytest.raises(RecursionError):  # this stand-in asks for it again and again
        queue.claim()
    TrialRecord.end(study._storage, first)
    TrialRecord.end(study._storage, second)
    lost = [t for t in queue.trials() if t.lost]
    assert lost
    assert not {t.slot for t in lost} & set(queue.trials().open_slots)


class FailingTwice(QuickScorer):
    def quality(self, arch: Architecture, **given: Any) -> Any:
        if tuple(given["seeds"]) != (0,):
            raise RuntimeError("out of memory")
        return super().quality(arch, **given)


def test_a_further_seed_that_fails_costs_the_candidate_nothing(settings: Make) -> None:
    failing = settings(trials=6, name="failing", **SEEDS)
    with pytest.raises(InputError, match="3 candidates in a row failed, the last with RuntimeError: out of memory"):
        search(failing, quiet=True, scorer=FailingTwice)
    scored = eligible(load_candidates(load_study(failing)))
    assert len(scored) == 5
    assert {c.runs for c in scored} == {1}


def test_time_is_kept_for_the_seeds_of_the_front(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_SECONDS", "0.1")
    timed = settings(trials=None, time_budget_minutes=0.1, sampler="random", **SEEDS)
    candidates = run(timed)
    assert {c.runs for c in pareto_front(candidates, timed.objectives)} & {2, 3}


def test_noise_is_learned_from_candidates_of_several_seeds() -> None:
    from archsearch.stats.estimate import Estimate

    def with_seeds(slot: int, by_seed: tuple[float, ...]) -> Candidate:
        c = candidate(slot, by_seed[0], 10.0 + slot)
        assert c.score.quality is not None
        estimate = Estimate(value=sum(by_seed) / len(by_seed), low=0, high=9, by_seed=by_seed)
        return c.with_score(quality=c.score.quality.model_copy(update={"validation_loss": estimate}))

    def noise(candidates: list[Candidate]) -> float:
        return run_noise(seeds_of(c) for c in candidates)

    once = [with_seeds(i, (1.0 + i,)) for i in range(4)]
    assert noise(once) == RUN_NOISE
    noisy = [with_seeds(i, (1 + i, (1 + i) * (1.1 if i % 2 else 0.9))) for i in range(40)]
    assert noise([*once, *noisy]) == pytest.approx(0.1 / 2**0.5, rel=0.1)
    two = noisy[:2]
    assert RUN_NOISE < noise(two) < 0.1, "of little evidence the prior keeps its share"


def chances(candidates: list[Candidate]) -> dict[int, float]:
    return Ranking(StudyConfig.model_validate({"name": "a", "space": "emoji", "trials": 3}), candidates).chances


def test_probability_of_being_on_the_front() -> None:
    """By hand: the second is surely dominated, the third and the fourth differ by a tenth of their noise."""
    points = [candidate(0, 1.0, 20.0), candidate(1, 1.5, 21.0), candidate(2, 1.2, 10.0), candidate(3, 1.201, 10.0)]
    found = chances(points)
    assert (found[0], found[1]) == (1.0, 0.0)
    assert 0.35 < found[3] < found[2] < 0.65
    assert found[2] + found[3] == pytest.approx(1)
    assert found[3] > LIKELY
    assert chances([]) == {}


def test_candidates_are_compared_without_the_effects_of_their_seeds() -> None:
    """The first seed makes every value 0.1 too large: a candidate of one seed is as good as those of three."""
    from archsearch.stats.intervals import mean_over_seeds

    def trained(slot: int, ms: float, truth: float, count: int) -> Candidate:
        c = candidate(slot, truth, ms)
        by_seed = [truth + effect for effect in (0.1, -0.06, -0.04)][:count]
        assert c.score.quality is not None
        estimate = mean_over_seeds(by_seed, 0.0)
        return c.with_score(quality=c.score.quality.model_copy(update={"validation_loss": estimate}))

    points = [trained(0, 30.0, 1.0, 3), trained(1, 10.0, 1.4, 3), trained(2, 20.0, 1.35, 1)]
    by_seed = [seeds_of(c) for c in points]
    assert seed_offsets(by_seed) == pytest.approx((0.1, 0.02, 0.0))
    assert seed_offsets(by_seed[1:]) == ()
    assert points[2].value("validation_loss") > points[1].value("validation_loss"), "as they are, it is dominated"
    assert chances(points)[2] > 0.9


def test_a_kept_ranking_is_that_of_a_first_one(settings: Make) -> None:
    """Whatever was added or has changed since."""
    made, known = settings(trials=24, sampler="random", **SEEDS), list[Row]()
    candidates = run(made)
    for count in range(1, 25):
        some = candidates[:count]
        if count % 3 == 0:  # another measurement
            some[count // 2] = candidates[count // 2] = some[count // 2].with_score(latency=latency_record(count))
        if count % 5 == 0:  # one was given up, or comes late
            del some[count // 3]
        kept, first = Ranking(made, some, known=known), Ranking(made, some)
        assert (kept.chances, kept.noise, kept.offsets) == (first.chances, first.noise, first.offsets)
        assert kept.scored == eligible(some)


def test_nothing_is_wanted_without_the_setting(settings: Make) -> None:
    study = search(settings(trials=5), quiet=True, scorer=QuickScorer)
    plan = FurtherRuns(settings())
    assert plan.next(StudyTrials(study).read(), proposing=False) is None
    assert plan.count(StudyTrials(study).read()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": {"first": 0}}, "greater than or equal to 1"),
        ({"seeds": {"first": 3, "front": 2}}, "front is 2, but first is 3; raise front"),
        ({"seeds": {}, "protocol": {"train_seeds": [0, 1]}}, "front is 3, but protocol.train_seeds lists 2"),
        ({"seeds": {}, "objectives": ["latency_ms", "params"]}, "search by a quality number"),
    ],
)
def test_settings_that_cannot_be(settings: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_the_protocol_lists_as_many_seeds_as_the_front_gets() -> None:
    given = {"name": "a", "space": "emoji", "trials": 3, "seeds": {"first": 2, "front": 4}}
    read = StudyConfig.model_validate(given)
    assert (read.protocol.train_seeds, read.first_seeds) == ((0, 1, 2, 3), (0, 1))
    assert StudyConfig.model_validate(read.model_dump(mode="json")) == read


def test_time_that_passes_during_a_claim_does_not_undo_it(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time runs only while a trial does: a claim that is undone for it would be made again for ever."""
    run(settings(trials=3, sampler="random"))
    timed = settings(trials=None, time_budget_minutes=1, sampler="random")
    queue = trial_queue.TrialQueue(load_study(timed), timed)
    monkeypatch.setattr(StudyTrials, "median_seconds", lambda _: 50.0)
    monkeypatch.setattr(StudyTrials, "busy_seconds", lambda trials: 11.0 if trials.running else 9.0)
    assert isinstance(queue.claim(), TrialRecord)
