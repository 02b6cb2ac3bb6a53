"""Studies that score every architecture of a space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from archsearch.library import shipped
from archsearch.spaces.loading import load_space
from archsearch.studies.config.study import StudyConfig, load_config
from archsearch.studies.search.candidates import load_candidates
from archsearch.studies.search.proposer import Proposer
from archsearch.studies.search.run import search
from snapgen.errors import InputError
from tests.archsearch.studies.quick import QuickScorer

Make = Callable[..., StudyConfig]
FACTORIALS = [name for name in shipped("search") if name.startswith("factorial")]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_architecture_is_trained_once(
    settings: Make, space: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "trained.log"
    monkeypatch.setenv("QUICK_LOG", str(log))
    config = settings(space=space, sampler="grid", trials=100, workers=workers)
    candidates = load_candidates(search(config, quiet=True, scorer=QuickScorer))
    assert Counter(log.read_text().split()) == Counter(c.architecture.id for c in candidates)
    assert len(candidates) == 9
    assert {c.state for c in candidates} == {"scored"}
    assert candidates[0].name == "base"
    again = load_candidates(search(config, quiet=True, scorer=QuickScorer))
    assert [c.number for c in again] == [c.number for c in candidates]


def test_it_says_why_it_ends(settings: Make, space: str, capsys: pytest.CaptureFixture[str]) -> None:
    search(settings(space=space, sampler="grid", trials=100), scorer=QuickScorer)
    assert "finished, all 9 architectures of the space were tried" in capsys.readouterr().err


def test_a_part_of_it_comes_first(settings: Make, space: str) -> None:
    part, whole = (
        load_candidates(
            search(settings(name=f"n{n}", space=space, sampler="grid", trials=n), quiet=True, scorer=QuickScorer)
        )
        for n in (4, 9)
    )
    assert [c.point for c in part] == [c.point for c in whole[:4]]


def test_large_spaces_and_options_are_refused(settings: Make) -> None:
    config = settings(space="emoji", sampler="grid")
    space = config.load_space()
    with pytest.raises(InputError, match="sampler: is grid, but emoji has 165,888 points; at most 4,096"):
        Proposer(config, space)
    with pytest.raises(InputError, match="sampler grid does not accept its options"):
        search(settings(sampler={"name": "grid", "options": {"n": 1}}), quiet=True, scorer=QuickScorer)


def test_the_factorial_has_384_networks_which_the_quick_start_has_too() -> None:
    factorial, emoji = load_space("emoji-factorial"), load_space("emoji")
    assert factorial.distinct() == (384, True)
    assert load_config("factorial").trials == 384
    assert factorial.base == emoji.base
    for point in [*factorial.points()][::37]:
        arch = factorial.architecture(point)
        inside = emoji.point_of(arch)
        assert inside is not None
        assert emoji.architecture(inside).id == arch.id


def test_the_full_size_twins_have_the_same_knobs() -> None:
    config = load_config("factorial").with_changes({"space": "snapgen-factorial", "proxy": "emoji-factorial"})
    space = config.load_space()
    assert space.distinct() == (384, True)
    assert space.twin(space.references["snapgen"]) == load_space("emoji-factorial").architecture(
        load_space("emoji-factorial").references["snapgen"]
    )
    assert (
        space.architecture(space.references["snapgen"]).id
        == load_space("snapgen").architecture(load_space("snapgen").references["row 6"]).id
    )


@pytest.mark.parametrize("name", FACTORIALS)
def test_smaller_studies_score_the_first_of_the_same_order(name: str) -> None:
    whole, part = load_config("factorial"), load_config(name)
    assert (part.space, part.sampler, part.seed) == (whole.space, whole.sampler, whole.seed)
    assert part.trials is not None
    assert part.trials <= 384
