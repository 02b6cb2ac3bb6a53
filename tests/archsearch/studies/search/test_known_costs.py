"""A study whose sampler knows costs before a candidate is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from archsearch.samplers.screening import Screening
from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.known_costs import KnownCosts
from archsearch.studies.search.run import search
from snapgen.errors import InputError
from tests.archsearch.studies.quick import SPACE, QuickScorer

Make = Callable[..., StudyConfig]


def test_a_study_with_it_resumes_as_the_unbroken_one(
    settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Screening.__init__, "__defaults__", (12,))
    whole = load_candidates(search(settings(name="whole", trials=9, sampler="ehvi"), quiet=True, scorer=QuickScorer))
    search(settings(name="broken", trials=6, sampler="ehvi"), quiet=True, scorer=QuickScorer)
    broken = load_candidates(search(settings(name="broken", trials=9, sampler="ehvi"), quiet=True, scorer=QuickScorer))
    assert [c.architecture.id for c in broken] == [c.architecture.id for c in whole]
    assert len({c.architecture.id for c in whole}) == 9
    assert list((tmp_path / "cache" / "costs").iterdir())


def test_costs_are_counted_once_a_space(settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Screening.__init__, "__defaults__", (5,))
    (tmp_path / "space.yaml").write_text(SPACE)
    space, changed = load_space(tmp_path / "space.yaml"), settings(sampler="ehvi", constraints={"params": 1e6})
    first = KnownCosts(changed, space)
    arguments = first.sampler_arguments()
    assert arguments["objectives"] == [None, "latency_ms"]
    assert arguments["limits"] == {"params": 1e6}
    monkeypatch.setattr(KnownCosts, "_count", lambda *_: pytest.fail("counted again"))
    second = KnownCosts(changed, space)
    second.sampler_arguments()
    assert second._numbers == first._numbers
    assert len(first._numbers) == 5


@pytest.mark.parametrize("objectives", [("latency_ms", "params"), ("validation_loss",)])
def test_a_study_of_other_objectives_is_one_line(settings: Make, objectives: tuple[str, ...]) -> None:
    with pytest.raises((InputError, ValueError), match="sampler ehvi needs one quality objective"):
        settings(sampler="ehvi", objectives=objectives)


def test_a_predicted_latency_is_kept_below_its_limit_whatever_the_objectives(
    settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARCHSEARCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Screening.__init__, "__defaults__", (5,))
    (tmp_path / "space.yaml").write_text(SPACE)
    limited = {"objectives": ["validation_loss", "params"], "constraints": {"latency_ms": 3.0}}
    predicted = settings(sampler="ehvi", latency={"device": "predicted:iphone-15-pro"}, **limited)
    arguments = KnownCosts(predicted, load_space(tmp_path / "space.yaml")).sampler_arguments()
    assert arguments["limits"] == {"latency_ms": 3.0}
    measured = KnownCosts(settings(sampler="ehvi", **limited), load_space(tmp_path / "space.yaml"))
    assert measured.sampler_arguments()["limits"] == {}, "a measured latency is not known before the trial"
