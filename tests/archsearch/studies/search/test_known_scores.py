"""Scores that another study has are not measured again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.score import ProtocolMismatch, Quality
from archsearch.stats.estimate import Estimate
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import eligible, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from archsearch.studies.storage.record import Candidate
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Ids of the architectures that have been trained so far."""
    path = tmp_path / "trained.log"
    path.touch()
    monkeypatch.setenv("QUICK_LOG", str(path))
    return lambda: path.read_text().split()


def run(settings: StudyConfig) -> list[Candidate]:
    return load_candidates(search(settings, quiet=True, scorer=QuickScorer))


def test_a_study_starts_from_another_one(settings: Make, trained: Callable[[], list[str]]) -> None:
    first = run(settings(name="first", trials=6))
    before = trained()
    second = run(settings(name="second", trials=4, start_from="first"))
    assert len(trained()) == len(before) + 4, "four candidates are new"
    known = [c for c in second if c.reused_study]
    assert {c.architecture.id for c in known} == {c.architecture.id for c in eligible(first)}
    assert [c.score for c in second[:6]] == [c.score for c in first[:6]]
    assert known[3].reused_study == "trial 3 of first"
    assert len(eligible(second)) == 10
    assert len({c.architecture.id for c in second}) == 10


def test_it_goes_on_without_the_other_one(settings: Make, trained: Callable[[], list[str]], tmp_path: Path) -> None:
    run(settings(name="first", trials=5))
    run(settings(name="second", trials=2, start_from="first"))
    (tmp_path / "runs" / "first").rename(tmp_path / "moved")
    count = len(trained())
    assert len(eligible(run(settings(name="second", trials=4, start_from="first")))) == 9
    assert len(trained()) == count + 2


def test_on_one_storage_nothing_is_trained_twice(settings: Make, trained: Callable[[], list[str]]) -> None:
    url = "sqlite:///together.db"
    first = run(settings(name="first", trials=6, sampler="random", storage=url))
    points = [dict(c.point) for c in eligible(first)]
    again = settings(name="again", trials=len(points), initial_points=points, sampler="random", storage=url)
    candidates = run(again)
    assert len(trained()) == 6
    assert [c.score for c in candidates] == [c.score for c in eligible(first)]
    assert len(candidates) == 6, "a list of points is done when all have a score, wherever it comes from"
    other_seed = run(settings(name="other", trials=2, seed=5, sampler="random", storage=url))
    assert not any(c.reused_study for c in other_seed)


def test_only_what_a_study_began_with_is_beyond_its_budget(settings: Make, trained: Callable[[], list[str]]) -> None:
    shared: dict[str, Any] = {"storage": "sqlite:///together.db", "sampler": "random"}
    run(settings(name="pool", trials=8, **shared))
    run(settings(name="first", trials=3, **shared))
    (Path("first.yaml")).write_text("space: space.yaml\ntrials: 3\nstorage: sqlite:///together.db\n")
    second = run(settings(name="second", trials=2, start_from="first.yaml", **shared))
    assert len(trained()) == 8, "the pool has all of them"
    assert [c.given for c in second] == [True, True, True, False, False]


class Diverging(QuickScorer):
    """Every training diverges."""

    def quality(self, *args: Any, **options: Any) -> Quality:
        found = super().quality(*args, **options)
        worst = Estimate(value=1e6, low=1e6, high=1e6)
        return found.model_copy(update={"validation_loss": worst, "diverged": True})


def test_what_diverged_elsewhere_is_not_trained_again(settings: Make, trained: Callable[[], list[str]]) -> None:
    url = "sqlite:///together.db"
    for name in ("first", "again"):
        search(settings(name=name, trials=3, sampler="random", storage=url), quiet=True, scorer=Diverging)
        assert len(trained()) == 3


def test_further_seeds_build_on_what_is_known(settings: Make) -> None:
    seeds: dict[str, Any] = {"seeds": {"first": 1, "front": 2}, "protocol": {"train_seeds": [0, 1]}}
    run(settings(name="first", trials=8, **seeds))
    second = run(settings(name="second", trials=3, start_from="first", **seeds))
    assert {c.runs for c in eligible(second)} <= {1, 2}
    reused = [c for c in second if c.reused_study]
    assert any(c.runs == 2 for c in reused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"protocol": {"steps": 7}},
            r"protocol\.steps: differs from first, 7 against 240; start from",
        ),
        ({"seed": 9}, r": seed: differs from first, 9 against 3"),
    ],
)
def test_another_protocol_is_refused_by_its_first_difference(
    settings: Make, changes: dict[str, Any], message: str
) -> None:
    run(settings(name="first", trials=3))
    second = settings(name="second", trials=2, start_from="first", **changes)
    with pytest.raises(ProtocolMismatch, match=message):
        run(second)
    with pytest.raises(InputError, match=r"does not exist|has no study"):
        load_study(second)


def test_what_cannot_be_started_from(settings: Make) -> None:
    with pytest.raises(InputError, match="start_from"):
        run(settings(name="second", start_from="nowhere"))
    with pytest.raises(ValueError, match="start_from is for studies that search by a quality number"):
        settings(start_from="first", objectives=["latency_ms", "params"])
