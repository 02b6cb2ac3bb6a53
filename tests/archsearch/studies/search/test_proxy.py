"""A study that trains the candidates of another space, the twins, in place of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archsearch.cli import inspect
from archsearch.spaces.loading import load_space, with_proxy
from archsearch.spaces.space import Space
from archsearch.studies.config.study import StudyConfig
from archsearch.studies.search.candidates import best, load_candidates
from archsearch.studies.search.run import search
from archsearch.studies.storage.database import load_study
from snapgen.errors import InputError
from tests.archsearch.studies.quick import SPACE, QuickScorer, quick_cost, quick_loss

Make = Callable[..., StudyConfig]

KNOBS, _, REFERENCES = SPACE.partition("references:")
TWIN = KNOBS.replace("channels: 32", "channels: 24").replace("[32, 48, 64]", "[16, 24, 40]")
REAL = SPACE.replace("latent_channels: 12", "latent_channels: 16")  # QuickScorer trains nothing of 16 channels


@pytest.fixture
def proxied(settings: Make, tmp_path: Path) -> Make:
    """Settings of the quick study with a proxy."""
    (tmp_path / "real.yaml").write_text(REAL.replace("channels: 32,", "channels: 48,"))
    (tmp_path / "twin.yaml").write_text(TWIN)
    named = {"space": str(tmp_path / "real.yaml"), "proxy": str(tmp_path / "twin.yaml")}
    return lambda **changes: settings(**{**named, **changes})


def test_the_twin_is_trained_and_the_candidate_counted(
    proxied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICK_LOG", str(tmp_path / "log"))
    real, twins = load_space(tmp_path / "real.yaml"), load_space(tmp_path / "twin.yaml")
    candidates = load_candidates(search(proxied(), quiet=True, scorer=QuickScorer))
    assert [c.architecture for c in candidates] == [real.architecture(c.point) for c in candidates]
    assert [c.trained for c in candidates] == [twins.architecture(c.point) for c in candidates]
    first = [c for c in candidates if c.reused_from is None]
    assert len(first) == 8
    assert (tmp_path / "log").read_text().split() == [c.trained.id for c in first if c.trained]
    for c in first:
        assert c.trained
        assert c.value("validation_loss") == quick_loss(c.trained)
        assert c.score.cost == quick_cost(c.architecture)
        assert c.score.quality
        assert c.score.quality.proxy == "twin"


def test_a_further_seed_is_the_twins(proxied: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUICK_LOG", str(tmp_path / "log"))
    seeds = {"seeds": {"first": 1, "front": 2}, "protocol": {"train_seeds": [0, 1]}}
    search(proxied(trials=4, sampler="random", **seeds), quiet=True, scorer=QuickScorer)
    trained = (tmp_path / "log").read_text().split()
    assert len(trained) > 4
    assert {*trained} <= {c.trained.id for c in load_candidates(load_study(proxied())) if c.trained}


def test_every_quality_number_is_called_the_twins(
    proxied: Make, settings: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    study = search(proxied(), scorer=QuickScorer)
    assert "validation loss of the twin in twin 0." in capsys.readouterr().err
    assert "validation loss of the twin in twin" in best(study).reason
    assert "latency of the twin" not in best(study).reason
    plain = search(settings(name="plain"), scorer=QuickScorer)
    assert "twin" not in capsys.readouterr().err + best(plain).reason
    assert all(c.trained is None for c in load_candidates(plain))


def test_one_architecture_is_scored_by_its_twin(
    proxied: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = proxied()
    file = tmp_path / "study.yaml"
    file.write_text(f"space: {config.space}\nproxy: {config.proxy}\ntrials: 1\n")
    monkeypatch.setattr("archsearch.studies.search.scorer.ArchsearchScorer", QuickScorer)
    inspect.score("thin", study=str(file), quiet=True, as_json=True)
    score = json.loads(capsys.readouterr().out)
    space = config.load_space()
    point = space.references["thin"]
    twin = space.twin(point)
    assert twin
    assert score["quality"]["validation_loss"]["value"] == quick_loss(twin)
    assert score["cost"]["params"] == quick_cost(space.architecture(point)).params
    inspect.score("thin", study=str(file), quiet=True)
    assert "validation loss of the twin in twin" in capsys.readouterr().out


def test_a_point_is_valid_only_with_its_twin(tmp_path: Path) -> None:
    (tmp_path / "real.yaml").write_text(REAL)
    (tmp_path / "twin.yaml").write_text(KNOBS.replace("[32, 48, 64]", "[32, 40, 64]"))
    space = load_space(tmp_path / "real.yaml")
    both = with_proxy(space, load_space(tmp_path / "twin.yaml"))
    point = {**space.base_point, "levels[1].channels": 1, "all.num_kv_heads": 1}
    assert space.valid(point)
    assert not both.valid(point)  # five heads of 8 channels cannot share two key/value heads
    assert both.twin(space.base_point) != both.architecture(space.base_point)
    assert space.twin(space.base_point) is None


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("  levels[1].self_attention: [true, false]\n", "", "levels[1].self_attention: is convs with 3 choices here"),
        ("[2, 3, 4]", "[2, 3, 4, 5]", "all.ffn_ratio: is all.ffn_ratio with 4 choices here and all.ffn_ratio with 3"),
        ("  levels[1].channels: [32, 48, 64]\n", "", "levels[1].channels: is missing here"),
        ("[32, 48, 64]\n", "[32, 48, 64]\n  rope: [false, true]\n", "rope: is rope with 2 choices here and missing in"),
    ],
)
def test_other_knobs_are_refused_by_the_first_that_differs(
    proxied: Make, tmp_path: Path, old: str, new: str, place: str
) -> None:
    (tmp_path / "twin.yaml").write_text(KNOBS.replace(old, new))
    with pytest.raises(InputError) as caught:
        proxied().load_space()
    line = str(caught.value)
    assert line.startswith(f"study: proxy: {tmp_path / 'twin.yaml'}: knobs.{place}")
    assert "\n" not in line


def test_a_twin_of_a_reference_that_cannot_be_is_refused(proxied: Make, tmp_path: Path) -> None:
    thin = 'references:\n  thin: {all.num_kv_heads: 2, "levels[1].channels": 48}\n'
    (tmp_path / "real.yaml").write_text(KNOBS + thin)
    (tmp_path / "twin.yaml").write_text(KNOBS.replace("[32, 48, 64]", "[32, 40, 64]"))
    with pytest.raises(
        InputError, match=r"study: proxy: .*: the twin of thin of .*real.yaml is invalid: .*num_kv_heads"
    ):
        proxied().load_space()


def test_a_study_whose_twins_cannot_be_trained_does_not_begin(proxied: Make, tmp_path: Path) -> None:
    (tmp_path / "twin.yaml").write_text(REAL)
    with pytest.raises(InputError, match="study: proxy: architecture: has no 12 latent channels"):
        search(proxied(), quiet=True, scorer=QuickScorer)


@pytest.mark.parametrize("other", [TWIN.replace("[16, 24, 40]", "[16, 24, 56]"), None])
def test_the_proxy_may_not_change(proxied: Make, tmp_path: Path, other: str | None) -> None:
    search(proxied(trials=2), quiet=True, scorer=QuickScorer)
    search(proxied(trials=3), quiet=True, scorer=QuickScorer)
    changes: dict[str, Any] = {"trials": 4}
    if other:
        (tmp_path / "twin.yaml").write_text(other)
    else:
        changes["proxy"] = None
        (tmp_path / "real.yaml").write_text(SPACE)  # which can be trained
    what = r"proxy: the proxy" if other else r"space\.base: the space"
    with pytest.raises(InputError, match=f"study: {what} has changed since quick began"):
        search(proxied(**changes), quiet=True, scorer=QuickScorer)


def test_a_proxy_of_the_same_content_may_move(proxied: Make, tmp_path: Path) -> None:
    search(proxied(trials=2), quiet=True, scorer=QuickScorer)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "twin.yaml").rename(tmp_path / "elsewhere" / "twin.yaml")
    assert load_candidates(search(proxied(trials=3, proxy=str(moved)), quiet=True, scorer=QuickScorer))


def test_a_digest_of_a_space_without_proxy_is_as_before(proxied: Make, tmp_path: Path) -> None:
    space: Space = load_space(tmp_path / "real.yaml")
    assert "proxy" not in space.to_dict()
    assert proxied().load_space().digest != space.digest
    assert proxied().load_space().to_dict()["proxy"]["name"] == "twin"
